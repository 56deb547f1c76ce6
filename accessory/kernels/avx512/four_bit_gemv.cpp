// Products of a few rows with several matrices of 4-bit codes, and with their biases and LoRA.
//
// Codes are read where they are stored, once for every eight rows. Lanes are columns: two dot products of 32 weights
// with 32 numbers make a block, whose sum is scaled. So weights are code values rounded to bf16, and scales exact.

#include <type_traits>
#include <vector>

#include "four_bit.h"

extern "C" {

// What is added to a product: scale * (x a^T) b^T, with a [rank, k] and b [n, rank], and bias [n]; null where absent.
struct BiasAndLora {
    const float *bias, *a, *b;
    int64_t rank;
    float scale;
};
}

namespace {

constexpr int64_t MOST = 8;      // rows that share what is unpacked
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

float dot(const float* a, const bf16* x, int64_t n) {
    __m512 sum = _mm512_setzero_ps();
    for (int64_t at = 0; at < n; at += LANES)
        sum = _mm512_fmadd_ps(_mm512_loadu_ps(a + at), load(x + at, first(LANES)), sum);
    return _mm512_reduce_add_ps(sum);
}

// scale * x a^T of each matrix, for each row, zeros behind it up to whole vectors.
struct Low {
    std::vector<int64_t> begin;  // of each matrix in a row
    std::vector<float> numbers;
    int64_t width = 0;

    Low(const BiasAndLora* added, int64_t count, int64_t rows) {
        if (!added) return;
        for (int64_t i = 0; i < count; i++) {
            begin.push_back(width);
            width += (added[i].rank + LANES - 1) / LANES * LANES;
        }
        numbers.resize(rows * width);
    }

    // Column `at` of all rows.
    void fill(const BiasAndLora* added, int64_t at, const bf16* x, int64_t rows, int64_t k) {
        int64_t i = begin.size() - 1;
        while (begin[i] > at) i--;
        const BiasAndLora& here = added[i];
        const int64_t r = at - begin[i];
        for (int64_t row = 0; r < here.rank && row < rows; row++)
            numbers[row * width + at] = here.scale * dot(here.a + r * k, x + row * k, k);
    }
};

// sums[r][place + i] = lanes of the product of row r of x, deinterleaved, with row `row + i` of W.
template <int N, int ROWS>
void multiply(const Packed& w, __m512i codebook, int64_t row, const bf16* x, __m512 (*sums)[16], int64_t place) {
    __m512 sum[ROWS][N] = {};
#pragma GCC unroll 2
    for (int64_t column = 0; column < w.k; column += WEIGHTS) {
        __m512bh even[N], odd[N];
        __m512 scale[N];
        for (int i = 0; i < N; i++) {
            const auto* codes = reinterpret_cast<const __m256i*>(w.codes + ((row + i) * w.k + column) / 2);
            _mm_prefetch(reinterpret_cast<const char*>(codes) + AHEAD, _MM_HINT_T0);
            const auto words = _mm512_cvtepu8_epi16(_mm256_loadu_si256(codes));
            even[i] = (__m512bh)_mm512_permutexvar_epi16(_mm512_srli_epi16(words, 4), codebook);
            odd[i] = (__m512bh)_mm512_permutexvar_epi16(words, codebook);  // bit 4 is moot: the codebook repeats
            scale[i] = _mm512_set1_ps(w.scale(row + i, column));
        }
        for (int r = 0; r < ROWS; r++) {
            const bf16* here = x + r * w.k + column;
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

// 16 columns of a result, from W's row n on.
template <int ROWS>
void tile(const Packed& w, const BiasAndLora* added, int64_t n, const bf16* x, const float* low, int64_t low_step,
          bf16* out, int64_t step) {
    constexpr int N = ROWS >= 4 ? 2 : 1;  // as many as is fastest
    const auto codebook = _mm512_broadcast_i64x4(narrow(_mm512_loadu_ps(w.codebook)));
    __m512 sums[ROWS][16] = {};
    const int64_t there = std::min(LANES, w.n - n);
    for (int64_t i = 0; i < there; i += N) multiply<N, ROWS>(w, codebook, n + i, x, sums, i);
    for (int r = 0; r < ROWS; r++) {
        for (int64_t i = 0; added && i < there; i++)
            for (int64_t q = 0; q < added->rank; q += LANES) {
                const float* b = added->b + (n + i) * added->rank + q;
                const auto factor = _mm512_maskz_loadu_ps(first(added->rank - q), b);
                sums[r][i] = _mm512_fmadd_ps(factor, _mm512_loadu_ps(low + r * low_step + q), sums[r][i]);
            }
        auto sum = sum_each(sums[r]);
        if (added && added->bias) sum = _mm512_add_ps(sum, _mm512_maskz_loadu_ps(first(w.n - n), added->bias + n));
        store(out + r * step, first(w.n - n), sum);
    }
}

int64_t tiles(const Packed& w) { return (w.n + LANES - 1) / LANES; }

}  // namespace

extern "C" {

// out [rows, n of all matrices]: x [rows, k] times each W^T, side by side, plus bias and LoRA, if any.
void four_bit_gemv(const Packed* matrices, const BiasAndLora* added, int64_t count, const bf16* x, bf16* out,
                   int64_t rows, int64_t threads) {
    const int64_t k = matrices->k;
    int64_t tasks = 0, step = 0;
    for (int64_t i = 0; i < count; i++) tasks += tiles(matrices[i]), step += matrices[i].n;
    std::vector<bf16> deinterleaved(rows * k);
    deinterleave(x, deinterleaved.data(), rows * k);
    Low low(added, count, rows);
#pragma omp parallel num_threads(threads)
    {
        if (low.width) {
#pragma omp for schedule(static)
            for (int64_t at = 0; at < low.width; at++) low.fill(added, at, x, rows, k);
        }
#pragma omp for schedule(static)
        for (int64_t task = 0; task < tasks; task++) {
            int64_t i = 0, t = task, column = 0;
            for (; t >= tiles(matrices[i]); i++) t -= tiles(matrices[i]), column += matrices[i].n;
            const Packed& w = matrices[i];
            const auto some = [&](auto rows_here, int64_t row) {
                const float* numbers = low.width ? low.numbers.data() + row * low.width + low.begin[i] : nullptr;
                tile<rows_here>(w, added ? added + i : nullptr, t * LANES, deinterleaved.data() + row * k, numbers,
                                low.width, out + row * step + column + t * LANES, step);
            };
            int64_t row = 0;
            for (; rows - row >= MOST; row += MOST) some(std::integral_constant<int, MOST>(), row);
            if (rows - row >= 4) some(std::integral_constant<int, 4>(), row), row += 4;
            if (rows - row >= 2) some(std::integral_constant<int, 2>(), row), row += 2;
            if (rows - row >= 1) some(std::integral_constant<int, 1>(), row);
        }
    }
}
}
