// Matrices of 2, 3 and 4-bit codes in groups, unpacked.

#include "group_codes.h"

extern "C" {

// W, rounded, into out [n, k].
void group_codes_dequantize(const GroupCodes* matrix, bf16* out, int64_t threads) {
    matrix->read([&](const auto& w) {
#pragma omp parallel for num_threads(threads) schedule(static)
        for (int64_t row = 0; row < w.n; row++)
            for (int64_t block = 0; block < w.k; block += w.block) {
                const auto common = w.common(row, block);
                const int64_t end = std::min(block + w.block, w.k);
                for (int64_t column = block; column < end; column += 2 * LANES) {
                    const int64_t there = std::min(2 * LANES, end - column);
                    const __mmask32 mask = there == 2 * LANES ? ~0u : (1u << there) - 1;
                    _mm512_mask_storeu_epi16(out + row * w.k + column, mask, w.weights(common, row, column));
                }
            }
    });
}
}
