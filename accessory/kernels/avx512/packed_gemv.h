// Products of a few rows with several packed matrices, and with their biases and LoRA.
//
// Codes are read where they are stored, once for every four or eight rows. Lanes are columns of the matrices.
//
// How a format's matrices are multiplied with is up to its Operands, made of (matrices, count, x, rows, k):
//   multiply<ROWS>(i, n, there, row, sums): sums[r][j] = lanes whose sum is that of row `row + r` of x with row n + j
//   of matrix i, for j < there, 16 at most. The other sums may be anything.
//   MOST: rows of x that share what is unpacked (see `for_each_group`).
#pragma once

#include <type_traits>
#include <vector>

#include "vectors.h"

// What is added to a product: scale * (x a^T) b^T, with a [rank, k] and b [n, rank], and bias [n]; null where absent.
struct BiasAndLora {
    const float *bias, *a, *b;
    int64_t rank;
    float scale;
};

namespace {


// Calls use(ROWS, row) for each group of rows of x, from `row` on: MOST rows, and of those that are left halves of it.
template <int MOST, class Use>
void for_each_group(int64_t rows, Use use, int64_t row = 0) {
    for (; rows - row >= MOST; row += MOST) use(std::integral_constant<int, MOST>(), row);
    if constexpr (MOST > 1) for_each_group<MOST / 2>(rows, use, row);
}

// Aligned memory for a vector.
struct Lanes {
    __m512i value;
};

float dot(const float* a, const bf16* x, int64_t n) {
    __m512 sum = _mm512_setzero_ps();
    for (int64_t at = 0; at < n; at += LANES) {
        const auto mask = first(n - at);
        sum = _mm512_fmadd_ps(_mm512_maskz_loadu_ps(mask, a + at), load(x + at, mask), sum);
    }
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

// 16 columns of a result, from row n of matrix i on, whose rows there are `height`.
template <int ROWS, class Operands>
void tile(const Operands& operands, int64_t i, int64_t height, const BiasAndLora* added, int64_t n, int64_t row,
          const float* low, int64_t low_step, bf16* out, int64_t step) {
    __m512 sums[ROWS][16];
    const int64_t there = std::min(LANES, height - n);
    operands.template multiply<ROWS>(i, n, there, row, sums);
    for (int r = 0; r < ROWS; r++) {
        for (int64_t j = 0; added && j < there; j++)
            for (int64_t q = 0; q < added->rank; q += LANES) {
                const float* b = added->b + (n + j) * added->rank + q;
                const auto factor = _mm512_maskz_loadu_ps(first(added->rank - q), b);
                sums[r][j] = _mm512_fmadd_ps(factor, _mm512_loadu_ps(low + r * low_step + q), sums[r][j]);
            }
        auto sum = sum_each(sums[r]);
        const auto mask = first(there);
        if (added && added->bias) sum = _mm512_add_ps(sum, _mm512_maskz_loadu_ps(mask, added->bias + n));
        store(out + r * step, mask, sum);
    }
}

// out [rows, n of all matrices]: x [rows, k] times each W^T, side by side, plus bias and LoRA, if any.
template <class Operands, class Matrix>
void multiply_few_rows(const Matrix* matrices, const BiasAndLora* added, int64_t count, const bf16* x, bf16* out,
                       int64_t rows, int64_t threads) {
    const int64_t k = matrices->k;
    const auto tiles = [&](int64_t i) { return (matrices[i].n + LANES - 1) / LANES; };
    int64_t tasks = 0, step = 0;
    for (int64_t i = 0; i < count; i++) tasks += tiles(i), step += matrices[i].n;
    const Operands operands(matrices, count, x, rows, k);
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
            for (; t >= tiles(i); i++) t -= tiles(i), column += matrices[i].n;
            for_each_group<Operands::MOST>(rows, [&](auto rows_here, int64_t row) {
                const float* numbers = low.width ? low.numbers.data() + row * low.width + low.begin[i] : nullptr;
                tile<rows_here>(operands, i, matrices[i].n, added ? added + i : nullptr, t * LANES, row, numbers,
                                low.width, out + row * step + column + t * LANES, step);
            });
        }
    }
}

}  // namespace
