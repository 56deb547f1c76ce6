// Sums over the rows of a matrix, in fp32: a bias's gradient. Chunks of rows first: no long sum swallows small numbers.

#include "vectors.h"

namespace {
constexpr int64_t STRIPE = 4 * LANES;  // columns that a thread takes at a time: whole cache lines of every row
constexpr int64_t CHUNK = 64;          // rows
}

extern "C" {

// x [rows, width] -> out fp32 [width].
void column_sums(const bf16* x, float* out, int64_t rows, int64_t width, int64_t threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t stripe = 0; stripe < width; stripe += STRIPE) {
        __m512 sums[4] = {};
        for (int64_t begin = 0; begin < rows; begin += CHUNK) {
            __m512 chunk[4] = {};
            for (int64_t row = begin; row < std::min(rows, begin + CHUNK); row++)
                for (int i = 0; i < 4; i++) {
                    const int64_t at = stripe + i * LANES;
                    chunk[i] = _mm512_add_ps(chunk[i], load(x + row * width + at, first(width - at)));
                }
            for (int i = 0; i < 4; i++) sums[i] = _mm512_add_ps(sums[i], chunk[i]);
        }
        for (int i = 0; i < 4; i++) {
            const int64_t at = stripe + i * LANES;
            _mm512_mask_storeu_ps(out + at, first(width - at), sums[i]);
        }
    }
}
}
