// Products of a few rows with several matrices of 4-bit codes, and with their biases and LoRA.
//
// Two dot products of 32 weights with 32 numbers make a block, whose sum is scaled. So weights are code values rounded
// to bf16, and scales exact.

#include "four_bit.h"
#include "packed_gemv.h"

namespace {

constexpr int64_t AHEAD = 2048;  // bytes of codes that are asked for before they are read

// Deinterleaves each 64 numbers into those of even columns, then those of odd ones: as nibbles are.
void deinterleave(const bf16* x, bf16* out, int64_t n) {
    for (int64_t at = 0; at < n; at += 2 * LANES) {
        const auto pairs = _mm512_loadu_si512(x + at);
        bf16* to = out + at / WEIGHTS * WEIGHTS + at % WEIGHTS / 2;
        _mm256_storeu_si256((__m256i*)to, _mm512_cvtepi32_epi16(pairs));
        _mm256_storeu_si256((__m256i*)(to + 2 * LANES), _mm512_cvtepi32_epi16(_mm512_srli_epi32(pairs, 16)));
    }
}

struct FourBitOperands {
    static constexpr int MOST = 8;

    const Packed* matrices;
    std::vector<bf16> x;  // deinterleaved
    std::vector<Lanes> codebooks;

    FourBitOperands(const Packed* matrices, int64_t count, const bf16* from, int64_t rows, int64_t k)
        : matrices(matrices), x(rows * k), codebooks(count) {
        deinterleave(from, x.data(), rows * k);
        for (int64_t i = 0; i < count; i++)
            codebooks[i].value = _mm512_broadcast_i64x4(narrow(_mm512_loadu_ps(matrices[i].codebook)));
    }

    template <int ROWS>
    void multiply(int64_t matrix, int64_t n, int64_t there, int64_t row, __m512 (*sums)[16]) const {
        constexpr int AT_ONCE = ROWS >= 4 ? 2 : 1;  // as many as is fastest
        for (int64_t at = 0; at < there; at += AT_ONCE) multiply_rows<AT_ONCE, ROWS>(matrix, n + at, row, sums, at);
    }

    template <int N, int ROWS>
    void multiply_rows(int64_t matrix, int64_t n, int64_t first_row, __m512 (*sums)[16], int64_t place) const {
        const Packed w = matrices[matrix];  // a copy, which no store can change
        const auto codebook = codebooks[matrix].value;
        const bf16* rows = x.data() + first_row * w.k;
        __m512 sum[ROWS][N] = {};
#pragma GCC unroll 2
        for (int64_t column = 0; column < w.k; column += WEIGHTS) {
            __m512bh even[N], odd[N];
            __m512 scale[N];
            for (int i = 0; i < N; i++) {
                const auto* codes = reinterpret_cast<const __m256i*>(w.codes + ((n + i) * w.k + column) / 2);
                _mm_prefetch(reinterpret_cast<const char*>(codes) + AHEAD, _MM_HINT_T0);
                const auto words = _mm512_cvtepu8_epi16(_mm256_loadu_si256(codes));
                even[i] = (__m512bh)_mm512_permutexvar_epi16(_mm512_srli_epi16(words, 4), codebook);
                odd[i] = (__m512bh)_mm512_permutexvar_epi16(words, codebook);  // bit 4 is moot: the codebook repeats
                scale[i] = _mm512_set1_ps(w.scale(n + i, column));
            }
            for (int r = 0; r < ROWS; r++) {
                const bf16* here = rows + r * w.k + column;
                const auto left = (__m512bh)_mm512_loadu_si512(here), right = (__m512bh)_mm512_loadu_si512(here + 32);
                for (int i = 0; i < N; i++) {
                    const auto half = _mm512_dpbf16_ps(_mm512_setzero_ps(), even[i], left);
                    sum[r][i] = _mm512_fmadd_ps(_mm512_dpbf16_ps(half, odd[i], right), scale[i], sum[r][i]);
                }
            }
        }
        for (int r = 0; r < ROWS; r++)
            for (int i = 0; i < N; i++) sums[r][place + i] = sum[r][i];
    }
};

}  // namespace

extern "C" {

void four_bit_gemv(const Packed* matrices, const BiasAndLora* added, int64_t count, const bf16* x, bf16* out,
                   int64_t rows, int64_t threads) {
    multiply_few_rows<FourBitOperands>(matrices, added, count, x, out, rows, threads);
}
}
