// Rows are rotated before they are rounded to 8 bits: each block of up to 64 values is multiplied
// by a Hadamard matrix. Outliers, which would make the steps of the whole row coarse, are spread
// over their block. Weights and activations are rotated alike, so products stay the same.
#pragma once

namespace llamacrab::kernels {

constexpr int widest_rotation = 64;

// The values that are rotated together in rows of n: the largest power of two that divides n.
constexpr int rotation_of(int n) {
    const int power = n & -n;
    return power < widest_rotation ? power : widest_rotation;
}

// Rotate without scaling: twice gives the row again, times rotation_of(n). Static, as everything
// that is compiled once per instruction set.
static inline void rotate(float * x, int n) {
    for (int h = 1; h < rotation_of(n); h *= 2) {
        for (int i = 0; i < n; i += 2 * h) {
            for (int j = i; j < i + h; j++) {
                const float a = x[j], b = x[j + h];
                x[j] = a + b;
                x[j + h] = a - b;
            }
        }
    }
}

}  // namespace llamacrab::kernels
