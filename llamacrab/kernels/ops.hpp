// What each kind of step computes.
#pragma once

#include <memory>
#include <vector>

#include "../native/thread_pool.hpp"
#include "fusion.hpp"

namespace llamacrab::kernels {

// Memory that grows, aligned to 64 bytes. Its contents are lost when it grows.
struct aligned_memory {
    std::unique_ptr<char[]> block;
    size_t size = 0;
    char * data = nullptr;

    char * reserve(size_t bytes);
};

// Where a step reads and writes. What is null is not wanted.
struct step_data {
    const void *x, *k, *v;
    float * y;
    uint16_t * y_bf16;
    int16_t * y_int16;
    uint8_t * y_int8;
    float * y_scale;       // with y_int8: the scale and the zero of each row
    const float * angles;  // rope only: n_dims / 2 cosines, then as many sines, for each token
};

// How many of the threads a step keeps busy for longer than it takes to wake them. Work is counted
// in multiplications of a product.
int worthwhile_threads(double work, int n_threads);
constexpr int work_per_value = 30;  // of an operation that goes row by row

// The threads of a step, and memory that they divide among them.
struct parallel {
    thread_pool & threads;
    int n_threads;
    aligned_memory & scratch;
};

// What `step_data::angles` holds for a node. It is the same in all layers.
std::vector<float> rope_angles(const ggml_tensor * node);
bool have_same_angles(const ggml_tensor * a, const ggml_tensor * b);

void run_linear(const step & s, const step_data & data, const parallel & workers);
void run_attention(const step & s, const step_data & data, const std::vector<segment> & segments,
                   const parallel & workers);

// All others compute rows [row0, row1) of their result.
void run_norm(const step & s, const step_data & data, int row0, int row1);
void run_gate(const step & s, const step_data & data, int row0, int row1);
void run_binary(const step & s, const step_data & data, int row0, int row1);
void run_scale(const step & s, const step_data & data, int row0, int row1);
void run_get_rows(const step & s, const step_data & data, int row0, int row1);
void run_copy(const step & s, const step_data & data, int row0, int row1);
void run_rope(const step & s, const step_data & data, int row0, int row1);
void run_set_rows(const step & s, const step_data & data, int row0, int row1);
// Write a dense tensor to a slot of another type.
void run_convert(const step & s, const step_data & data, int row0, int row1);
// The same for a tensor with permuted dimensions: the slot gets [tokens][heads][values].
void run_gather(const step & s, const step_data & data, int row0, int row1);
// The mean of the rows of each text: a product with weights that are mostly zero.
void run_pool(const step & s, const step_data & data, int row0, int row1);

}  // namespace llamacrab::kernels
