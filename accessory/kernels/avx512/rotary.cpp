// Rotary embedding: a token's heads rotated in fp32, read and written once.

#include <cstring>

#include "vectors.h"

namespace {

// Cosines and sines of LANES angles of a token, from neighbours in memory.
struct Rotations {
    __m512 cosine, sine;

    Rotations(const float* rotations, int64_t angles, float direction) {
        const auto low = _mm512_maskz_loadu_ps(first(2 * angles), rotations);
        const auto high = _mm512_maskz_loadu_ps(first(2 * angles - LANES), rotations + LANES);
        const auto even = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
        cosine = _mm512_permutex2var_ps(low, even, high);
        sine = _mm512_mul_ps(_mm512_permutex2var_ps(low, _mm512_add_epi32(even, _mm512_set1_epi32(1)), high),
                             _mm512_set1_ps(direction));
    }

    __m512 real(__m512 a, __m512 b) const { return _mm512_fmsub_ps(a, cosine, _mm512_mul_ps(b, sine)); }
    __m512 imaginary(__m512 a, __m512 b) const { return _mm512_fmadd_ps(b, cosine, _mm512_mul_ps(a, sine)); }
};

}  // namespace

extern "C" {

// x and y [tokens, heads, width]; rotations [tokens, half, 2]. Channels 2 i and 2 i + 1 rotate together if they are
// `neighbours`, else i and half + i; those from 2 half on pass through. direction: 1, or -1 to rotate back.
void rotate(const bf16* x, const float* rotations, bf16* y, int64_t tokens, int64_t heads, int64_t width, int64_t half,
            bool neighbours, float direction, int64_t threads) {
#pragma omp parallel for num_threads(threads) schedule(static) if (tokens > 1)
    for (int64_t token = 0; token < tokens; token++) {
        const bf16* from = x + token * heads * width;
        bf16* to = y + token * heads * width;
        for (int64_t i = 0; i < half; i += LANES) {
            const Rotations angles(rotations + (token * half + i) * 2, half - i, direction);
            const auto mask = first(half - i);
            for (int64_t head = 0; head < heads; head++)
                if (neighbours) {
                    const int64_t at = head * width + 2 * i;
                    const auto pairs = _mm512_maskz_loadu_epi32(mask, from + at);
                    const auto a = _mm512_castsi512_ps(_mm512_slli_epi32(pairs, 16));
                    const auto b = _mm512_castsi512_ps(_mm512_and_si512(pairs, _mm512_set1_epi32(0xFFFF0000)));
                    _mm512_mask_storeu_epi32(to + at, mask,
                                             paired(narrow(angles.real(a, b)), narrow(angles.imaginary(a, b))));
                } else {
                    const int64_t at = head * width + i;
                    const auto a = load(from + at, mask), b = load(from + half + at, mask);
                    store(to + at, mask, angles.real(a, b));
                    store(to + half + at, mask, angles.imaginary(a, b));
                }
        }
        for (int64_t head = 0; 2 * half < width && head < heads; head++)
            memcpy(to + head * width + 2 * half, from + head * width + 2 * half, (width - 2 * half) * sizeof *to);
    }
}
}
