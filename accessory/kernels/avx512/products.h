// Products of bf16 matrices, summed in fp32: C [M, N] (+)= A [M, 2P] B [2P, N].
//
// A lies in rows, B in panels of PANEL columns, in which the numbers of two rows are interleaved, as VDPBF16PS takes
// them: [N / PANEL][P][PANEL][2]. Each number of C is summed in the order of the pairs, whatever the others are.
#pragma once

#include <cstring>

#include "vectors.h"

namespace {

using std::max, std::min;

constexpr int64_t PANEL = 2 * LANES;  // columns of B that are multiplied at once
constexpr int TILE = 12;              // rows of A that are: their sums take 24 of 32 registers

inline int64_t up(int64_t n, int64_t multiple) { return (n + multiple - 1) / multiple * multiple; }

template <int M>
void multiply_tile(const bf16* a, int64_t lda, const bf16* b, int64_t pairs, float* c, int64_t ldc, bool add) {
    __m512 sums[M][2];
#pragma GCC unroll 12
    for (int r = 0; r < M; r++) {
        sums[r][0] = add ? _mm512_loadu_ps(c + r * ldc) : _mm512_setzero_ps();
        sums[r][1] = add ? _mm512_loadu_ps(c + r * ldc + LANES) : _mm512_setzero_ps();
    }
    for (int64_t p = 0; p < pairs; p++) {
        const auto left = (__m512bh)_mm512_loadu_si512(b + p * 2 * PANEL);
        const auto right = (__m512bh)_mm512_loadu_si512(b + p * 2 * PANEL + PANEL);
#pragma GCC unroll 12
        for (int r = 0; r < M; r++) {
            int32_t pair;
            memcpy(&pair, a + r * lda + 2 * p, sizeof pair);
            const auto both = (__m512bh)_mm512_set1_epi32(pair);
            sums[r][0] = _mm512_dpbf16_ps(sums[r][0], both, left);
            sums[r][1] = _mm512_dpbf16_ps(sums[r][1], both, right);
        }
    }
#pragma GCC unroll 12
    for (int r = 0; r < M; r++) {
        _mm512_storeu_ps(c + r * ldc, sums[r][0]);
        _mm512_storeu_ps(c + r * ldc + LANES, sums[r][1]);
    }
}

template <int M>
void multiply_rest(int64_t rows, const bf16* a, int64_t lda, const bf16* b, int64_t pairs, float* c, int64_t ldc,
                   bool add) {
    if (rows == M) return multiply_tile<M>(a, lda, b, pairs, c, ldc, add);
    if constexpr (M > 1) multiply_rest<M - 1>(rows, a, lda, b, pairs, c, ldc, add);
}

// `panels` of B, `b_step` numbers from one to the next, and of C, `c_step` likewise.
inline void multiply(const bf16* a, int64_t lda, int64_t rows, const bf16* b, int64_t pairs, int64_t b_step,
                     int64_t panels, float* c, int64_t ldc, int64_t c_step, bool add = false) {
    for (int64_t panel = 0; panel < panels; panel++, b += b_step, c += c_step)
        for (int64_t r = 0; r < rows; r += TILE)
            multiply_rest<TILE>(min<int64_t>(rows - r, TILE), a + r * lda, lda, b, pairs, c + r * ldc, ldc, add);
}

// Rows of a matrix, `step` numbers from one to the next, or in the order of `map`.
struct Rows {
    const bf16* x;
    int64_t step;
    const int64_t* map = nullptr;
    const bf16* operator[](int64_t i) const { return x + (map ? map[i] : i) * step; }
};

// x [n, width] -> B of products whose columns are the n rows: [n / PANEL][padded width / 2][PANEL][2].
inline void pack_as_columns(Rows x, int64_t n, int64_t width, bf16* out) {
    for (int64_t begin = 0; begin < up(n, PANEL); begin += LANES)
        for (int64_t e = 0; e < width; e += 2 * LANES) {
            const auto mask = first((width - e + 1) / 2);
            __m512i a[16];
            for (int i = 0; i < 16; i++)
                a[i] = begin + i < n ? _mm512_maskz_loadu_epi32(mask, x[begin + i] + e) : _mm512_setzero_si512();
            transpose(a);
            bf16* panel = out + begin / PANEL * PANEL * up(width, PANEL) + begin % PANEL * 2;
            for (int i = 0; i < 16; i++) _mm512_storeu_si512(panel + (e / 2 + i) * 2 * PANEL, a[i]);
        }
}

// Numbers of rows i and i + 1 of x [n, width] from column e on, in pairs; zero where there are none.
inline __m512i pair_of_rows(Rows x, int64_t i, int64_t n, int64_t width, int64_t e) {
    const auto mask = first(width - e);
    const auto load = [&](int64_t row) {
        return row < n ? _mm256_maskz_loadu_epi16(mask, x[row] + e) : _mm256_setzero_si256();
    };
    return paired(load(i), load(i + 1));
}

// x [n, width] -> B of products that sum over the n rows: [padded width / PANEL][keys / 2][PANEL][2], zero from n on.
inline void pack_as_rows(Rows x, int64_t n, int64_t keys, int64_t width, bf16* out) {
    for (int64_t i = 0; i < up(n, PANEL); i += 2)
        for (int64_t e = 0; e < up(width, PANEL); e += LANES)
            _mm512_storeu_si512(out + e / PANEL * PANEL * keys + i * PANEL + e % PANEL * 2,
                                pair_of_rows(x, i, n, width, e));
}

}  // namespace
