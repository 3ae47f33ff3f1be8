// A kernel set: all the arithmetic, compiled for one instruction set. simd/ holds its source, which
// is compiled once for each; dispatch.cpp chooses one by CPUID. Nothing here knows of ggml.
#pragma once

#include <cstddef>
#include <cstdint>

namespace llamacrab::kernels {

// How a matrix of weights is packed: panels of 32 columns of the product (rows of the weight), and
// in a panel all k in order, so that a micro-kernel reads it from front to back.
//   f32   [panel][k][32]          floats
//   bf16  [panel][k / 2][32][2]   pairs, as the dot product instruction takes them
//   int8  [panel][k / 4][32][4]   quadruples, as VNNI takes them; then 32-padded scales and sums
// k is padded with zeros to 1, 2 and 4.
enum class packing : int32_t { raw, f32, bf16, int8 };

constexpr int panel_width = 32;
constexpr int widest_row =
    8192;  // columns of what is normed or made 8 bits: a row lies on the stack meanwhile

enum class activation : int32_t { none, gelu, gelu_erf, gelu_quick, silu, relu, tanh, sigmoid };

// y = act(x w + bias), for some rows.
struct linear_args {
    const void * w;
    packing kind;
    const float * w_scale;  // int8: of each column
    const float * w_sum;    // int8: the sum of each column, times its scale
    int k, m;               // columns of x, columns of y
    const void * x;         // f32, bf16 or uint8 rows, as `x_kind`
    packing x_kind;
    size_t ldx;             // elements between rows of x
    const float * x_scale;  // int8: of each row a scale, and what stands for zero
    const float * bias;     // or null
    activation act;
    float * y;          // or null; what is null is not written
    uint16_t * y_bf16;  // or null
    size_t ldy;         // elements between rows of y and of y_bf16
};

// y = norm(x + residual) * weight + bias, row by row, in any of three types.
struct norm_args {
    const float * x;
    size_t ldx;
    const float * residual;  // or null
    size_t ldr;
    bool norm, rms;  // else only the sum
    float eps;
    const float * weight;  // or null
    const float * bias;    // or null
    int n;
    float * y;          // or null
    uint16_t * y_bf16;  // or null
    uint8_t * y_int8;   // or null: value / scale + zero
    float * y_scale;    // of each row its scale and its zero, with y_int8
    size_t ldy;         // of y and y_bf16
    size_t ldq;         // of y_int8
};

// Rows of queries that see no key outside a range.
struct segment {
    int32_t row0, row1;
    int32_t key0, key1;
    bool clean;  // no mask value in the range differs from 0
};

struct attention_args {
    const void *q, *k, *v;
    packing kind;             // of all three: f32 or bf16
    ptrdiff_t q_row, q_head;  // elements from a token, and from a head, to the next
    ptrdiff_t k_row, k_head;
    ptrdiff_t v_row, v_head;
    int d_k, d_v;
    int heads_per_kv;
    float scale, softcap, slope;  // slope: what the mask is multiplied by
    const uint16_t * mask;        // f16
    ptrdiff_t mask_row;
    float * y;          // or null
    uint16_t * y_bf16;  // or null
    ptrdiff_t y_row, y_head;
    void * scratch;  // attention_scratch() bytes, 64-byte aligned
};

struct kernel_table {
    const char * name;
    bool bf16;  // computes with bf16 activations, so that data may stay in it
    int tile;   // rows that a micro-kernel takes
    void (*linear)(const linear_args &, int row0, int row1);
    void (*norm)(const norm_args &, int row0, int row1);
    size_t (*attention_scratch)(int d_k, int d_v, int n_keys);
    void (*attention)(const attention_args &, const segment &, int head);
    void (*to_bf16)(const float * x, uint16_t * y, int64_t n);
    void (*to_f32)(const uint16_t * x, float * y, int64_t n);
    void (*add)(const float * a, const float * b, float * y, int64_t n);
    void (*mul)(const float * a, const float * b, float * y, int64_t n);
    void (*unary)(activation, const float * x, float * y, int64_t n);
    // y = act(a) * b
    void (*gate)(activation, const float * a, const float * b, float * y, uint16_t * y_bf16,
                 int64_t n);
};

const kernel_table * plain_kernels();
const kernel_table * avx2_kernels();  // null where the compiler has no such target
const kernel_table * avx512_bf16_kernels();

// The best set that this CPU can run, or what LLAMACRAB_KERNELS names, if it can run that.
const kernel_table & active_kernels();

}  // namespace llamacrab::kernels
