// bf16 numbers in memory, fp32 in registers of LANES.
#pragma once

#include <immintrin.h>

#include <algorithm>
#include <cstdint>

namespace {

using bf16 = uint16_t;

constexpr int64_t LANES = 16;

// The first n lanes: none for a negative n, all for a large one.
inline __mmask16 first(int64_t n) { return (1u << std::max<int64_t>(std::min(n, LANES), 0)) - 1; }

inline __m256i narrow(__m512 x) { return (__m256i)_mm512_cvtneps_pbh(x); }

inline __m512 wide(__m256i x) { return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(x), 16)); }

// The lanes that `mask` names, the others zero.
inline __m512 load(const bf16* x, __mmask16 mask) { return wide(_mm256_maskz_loadu_epi16(mask, x)); }

inline void store(bf16* x, __mmask16 mask, __m512 value) { _mm256_mask_storeu_epi16(x, mask, narrow(value)); }

// Interleaves a and b: a0 b0 a1 b1 ...
inline __m512i paired(__m256i a, __m256i b) {
    return _mm512_or_si512(_mm512_cvtepu16_epi32(a), _mm512_slli_epi32(_mm512_cvtepu16_epi32(b), 16));
}

// a[r][c] -> a[c][r], 16 x 16 numbers of 32 bits.
inline void transpose(__m512i (&a)[16]) {
    __m512i b[16];
#pragma GCC unroll 8
    for (int i = 0; i < 16; i += 2) {
        b[i] = _mm512_unpacklo_epi32(a[i], a[i + 1]);
        b[i + 1] = _mm512_unpackhi_epi32(a[i], a[i + 1]);
    }
#pragma GCC unroll 4
    for (int i = 0; i < 16; i += 4) {
        a[i] = _mm512_unpacklo_epi64(b[i], b[i + 2]);
        a[i + 1] = _mm512_unpackhi_epi64(b[i], b[i + 2]);
        a[i + 2] = _mm512_unpacklo_epi64(b[i + 1], b[i + 3]);
        a[i + 3] = _mm512_unpackhi_epi64(b[i + 1], b[i + 3]);
    }
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++) {
        b[i] = _mm512_shuffle_i32x4(a[i], a[i + 4], 0x88);
        b[i + 4] = _mm512_shuffle_i32x4(a[i], a[i + 4], 0xDD);
        b[i + 8] = _mm512_shuffle_i32x4(a[i + 8], a[i + 12], 0x88);
        b[i + 12] = _mm512_shuffle_i32x4(a[i + 8], a[i + 12], 0xDD);
    }
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++) {
        a[i] = _mm512_shuffle_i32x4(b[i], b[i + 8], 0x88);
        a[i + 8] = _mm512_shuffle_i32x4(b[i], b[i + 8], 0xDD);
        a[i + 4] = _mm512_shuffle_i32x4(b[i + 4], b[i + 12], 0x88);
        a[i + 12] = _mm512_shuffle_i32x4(b[i + 4], b[i + 12], 0xDD);
    }
}

// The sum of each of 16 vectors, in its lane. Each step adds halves of two vectors, side by side in the next.
inline __m512 sum_each(const __m512 (&x)[16]) {
    __m512 a[8], b[4], c[2];
    const auto pd = [](__m512 v) { return _mm512_castps_pd(v); };
    const auto ps = [](__m512d v) { return _mm512_castpd_ps(v); };
#pragma GCC unroll 8
    for (int i = 0; i < 8; i++) {
        // As the next steps leave them, vectors are in order at the end.
        const auto &v = x[i % 2 * 8 + i / 2], &w = x[i % 2 * 8 + 4 + i / 2];
        a[i] = _mm512_add_ps(_mm512_shuffle_f32x4(v, w, 0x44), _mm512_shuffle_f32x4(v, w, 0xEE));
    }
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++) {
        const auto v = a[2 * i], w = a[2 * i + 1];
        b[i] = _mm512_add_ps(_mm512_shuffle_f32x4(v, w, 0x88), _mm512_shuffle_f32x4(v, w, 0xDD));
    }
#pragma GCC unroll 2
    for (int i = 0; i < 2; i++) {
        const auto v = pd(b[2 * i]), w = pd(b[2 * i + 1]);
        c[i] = _mm512_add_ps(ps(_mm512_unpacklo_pd(v, w)), ps(_mm512_unpackhi_pd(v, w)));
    }
    return _mm512_add_ps(_mm512_shuffle_ps(c[0], c[1], 0x88), _mm512_shuffle_ps(c[0], c[1], 0xDD));
}

// 2^x, to a unit or two in the last place.
inline __m512 power_of_two(__m512 x) {
    const __m512 whole = _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    const __m512 rest = _mm512_sub_ps(x, whole);
    __m512 y = _mm512_set1_ps(1.5403530e-4f);  // Taylor: ln(2)^n / n!
    for (float factor : {1.3333558e-3f, 9.6181291e-3f, 5.5504109e-2f, 2.4022651e-1f, 6.9314718e-1f, 1.0f})
        y = _mm512_fmadd_ps(y, rest, _mm512_set1_ps(factor));
    return _mm512_scalef_ps(y, whole);
}

constexpr float LOG2_E = 1.44269504f;

}  // namespace
