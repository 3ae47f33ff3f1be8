// The table of kernels: all arithmetic, compiled for one instruction set. simd/ holds the source,
// which is compiled once per instruction set; dispatch.cpp selects a table by CPUID. Nothing here
// depends on ggml.
#pragma once

#include <cstddef>
#include <cstdint>

namespace llamacrab::kernels {

// How a matrix of weights lies in memory. Packed weights lie in panels of 32 columns of the product
// (rows of the weight). A panel holds all of k in order, so that a micro-kernel reads it from front
// to back.
//   unpacked     as in ggml
//   f32_panels   [panel][k][32]          floats
//   bf16_panels  [panel][k / 2][32][2]   pairs, as the bf16 dot product takes them
//   int16_panels [panel][block of k][k / 2][32][2]   pairs; after each block the 32 scales of its
//                                        columns
//   int8_panels  [panel][k / 4][32][4]   quadruples, as VNNI takes them; then scales and sums
// k is padded with zeros to a multiple of 1, 2, 2 and 8. int8_panels have as many scales and sums
// as columns, padded to 32.
enum class weight_layout : int32_t { unpacked, f32_panels, bf16_panels, int16_panels, int8_panels };

// The type of activations.
//   int16  integers, padded with a zero to pairs; after a row the scales of its blocks, as floats
//   int8   unsigned bytes, with a scale and a zero for each row
enum class data_type : int32_t { f32, bf16, int16, int8 };

constexpr int panel_width = 32;

// Products of 16-bit integers. Weights and activations have a scale for each block of k. Within a
// block, products are summed in int32: activations are in -int16_max .. int16_max, and the absolute
// values of a column's weights sum to at most int16_weight_sum, so that no sum overflows.
constexpr int int16_block = 256;
constexpr int int16_max = 16383;
constexpr int int16_weight_sum = INT32_MAX / int16_max;

constexpr int int16_padded(int k) { return (k + 1) / 2 * 2; }
constexpr int int16_blocks(int k) { return (k + int16_block - 1) / int16_block; }
// Elements from a row of activations to the next, with the scales.
constexpr int int16_row(int k) { return int16_padded(k) + 2 * int16_blocks(k); }
constexpr size_t int16_panel_bytes(int k) {
    return (size_t) panel_width *
           (int16_padded(k) * sizeof(int16_t) + int16_blocks(k) * sizeof(float));
}

// Products of bytes without VNNI are summed in int16, four at a time. Then activations are in
// 0 .. 127, and the absolute values of four weights sum to at most int8_weight_sum.
constexpr int int8_weight_sum = INT16_MAX / 127;

constexpr int int8_padded(int k) { return (k + 7) / 8 * 8; }

// The most columns of a row that is normed or quantized: meanwhile the row lies on the stack.
constexpr int widest_row = 8192;
constexpr int widest_head = 512;

enum class activation : int32_t { none, gelu, gelu_erf, gelu_quick, silu, relu, tanh, sigmoid };

// y = act(x w + bias), for some rows. Outputs that are null are not written.
struct linear_args {
    const void * w;
    weight_layout layout;   // of w
    const float * w_scale;  // int8_panels: the scale of each column
    const float * w_sum;    // int8_panels: the sum of each column, times its scale
    int k, m;               // columns of x, columns of y
    int column0, column1;   // columns of y to compute: from a multiple of panel_width, or of
                            // int16_block with y_int16, on
    const void * x;         // rows of `x_type`
    data_type x_type;
    size_t ldx;             // elements from a row of x to the next
    const float * x_scale;  // int8: the scale and the zero of each row
    const float * bias;     // or null
    activation act;
    float * y;          // or null
    uint16_t * y_bf16;  // or null
    size_t ldy;         // elements from a row to the next, of y and y_bf16
    int16_t * y_int16;  // or null: rows of int16_row(m) elements
    float * scratch;    // with y_int16: int16_block floats for each row
};

// y = norm(x + residual) * weight + bias, row by row. Outputs that are null are not written.
struct norm_args {
    const float * x;
    size_t ldx;
    const float * residual;  // or null
    size_t ldr;
    bool norm;  // false: without a norm, y is the sum alone
    bool rms;
    float eps;
    const float * weight;  // or null
    const float * bias;    // or null
    int n;                 // columns
    float * y;             // or null
    uint16_t * y_bf16;     // or null
    uint8_t * y_int8;      // or null: value / scale + zero
    float * y_scale;       // with y_int8: the scale and the zero of each row
    int16_t * y_int16;     // or null: rows of int16_row(n) elements
    size_t ldy;            // of y and y_bf16
    size_t ldq;            // of y_int8
};

// Rows of queries, and the range of keys outside which they see none.
struct segment {
    int32_t row0, row1;
    int32_t key0, key1;
    bool unmasked;  // all mask values in the range are 0
};

struct attention_args {
    const void *q, *k, *v;
    data_type type;           // of all three: f32 or bf16
    bool k_f16, v_f16;        // but these are f16, as in a KV cache
    ptrdiff_t q_row, q_head;  // elements from a token to the next, from a head to the next
    ptrdiff_t k_row, k_head;
    ptrdiff_t v_row, v_head;
    int d_k, d_v;  // head sizes
    int heads_per_kv;
    float scale, softcap;
    float slope;            // factor of the mask
    const uint16_t * mask;  // f16
    ptrdiff_t mask_row;
    float * y;          // or null
    uint16_t * y_bf16;  // or null
    ptrdiff_t y_row, y_head;
    void * scratch;  // attention_scratch() bytes, aligned to 64
};

struct kernel_table {
    const char * name;
    // The layout of matrices of all types but f32: bf16_panels or int16_panels.
    weight_layout usual_layout;
    bool int8;           // multiplies 8-bit matrices, faster than others
    bool int8_in_int16;  // sums four products of bytes in int16
    int tile;            // rows per call of a micro-kernel
    void (*linear)(const linear_args &, int row0, int row1);
    void (*norm)(const norm_args &, int row0, int row1);
    size_t (*attention_scratch)(int d_k, int d_v, int n_keys);
    // For some heads that share their keys and values.
    void (*attention)(const attention_args &, const segment &, int head, int n_heads);
    // Rotate the first n_dims values of a head, in pairs; a pair is neighbours, or n_dims / 2
    // apart.
    void (*rope)(const float * x, const float * cosines, const float * sines, float * y, int n_dims,
                 bool neighbours);
    void (*to_bf16)(const float * x, uint16_t * y, int64_t n);
    void (*to_f16)(const float * x, uint16_t * y, int64_t n);
    void (*from_f16)(const uint16_t * x, float * y, int64_t n);
    void (*to_int16)(const float * x, int16_t * y, int n);  // a row, with its scales
    void (*add)(const float * a, const float * b, float * y, int64_t n);
    void (*mul)(const float * a, const float * b, float * y, int64_t n);
    // y = act(a) * b, or act(a) if b is null
    void (*gate)(activation, const float * a, const float * b, float * y, uint16_t * y_bf16,
                 int64_t n);

    bool has_bf16() const { return usual_layout == weight_layout::bf16_panels; }
};

const kernel_table * generic_kernels();  // for any CPU
// These exist where the compiler has x86 targets.
const kernel_table * avx2_kernels();
const kernel_table * avx2_vnni_kernels();
const kernel_table * avx512_vnni_kernels();
const kernel_table * avx512_bf16_kernels();

// The fastest table that this CPU can run, or the one that LLAMACRAB_KERNELS names if it can run
// that one.
const kernel_table & active_kernels();

}  // namespace llamacrab::kernels
