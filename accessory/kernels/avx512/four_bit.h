// A matrix of 4-bit codes in memory.
#pragma once

#include "vectors.h"

namespace {

constexpr int64_t WEIGHTS = 64;  // of a row that share a scale

}  // namespace

extern "C" {

// W [n, k]: codes [n, k / 2], high nibble first, into the 16 values of `codebook`, and a scale for each 64 of a row.
// scales: fp32, or codes into the 256 values of `nested_codebook`, times a nested scale for each 256, plus offset.
struct Packed {
    const uint8_t* codes;
    const float* codebook;
    const void* scales;
    const float *nested_codebook, *nested_scales, *offset;
    int64_t n, k;

    float scale(int64_t row, int64_t column) const {
        const uint64_t block = (row * k + column) / WEIGHTS;
        if (!nested_codebook) return static_cast<const float*>(scales)[block];
        return nested_codebook[static_cast<const uint8_t*>(scales)[block]] * nested_scales[block / 256] + *offset;
    }
};
}
