// Products with packed matrices, unpacked by the thread that multiplies with them, where it multiplies.
//
// A thread has some panels of columns: it unpacks them into memory that stays in its own cache, and sums one block of
// rows after the other. So a matrix is unpacked once, no core reads what another has written, and it need not be laid
// out for the product again.
//
// A Matrix [n, k] has `read`, which calls a function with what unpacks its weights. That has n and k too, and:
//   block: so many columns of a row, a multiple of 32, have something in common,
//   common(row, column): that,
//   weights(common, row, column): 32 weights of a row from a column on, which 32 divides, in bf16. What is behind the
//   last column may be any number.
#pragma once

#include <omp.h>

#include "products.h"

// A summand: a times the matrix, plus low times scale * factor (fp32, of `rank` rows or columns), if any. Rows of a are
// padded to an even length.
template <class Matrix>
struct Term {
    const bf16* a;
    Matrix matrix;
    const bf16* low;
    const float* factor;
    int64_t low_step, rank;
    float scale;
};

namespace {

constexpr int64_t MOST_PANELS = 4;         // that share what is read of A
constexpr int64_t PANELS_BYTES = 1 << 20;  // that these may take unpacked, unless it is one
constexpr int64_t DEPTH = 144;             // pairs that are summed while their part of a panel stays in the first cache
constexpr int64_t HEIGHT = 480;            // rows whose sums are alive at once

// (a0 b0 a1 b1 ...), rounded.
__m512i rounded_pairs(__m512 a, __m512 b) {
    const auto order = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6, 21,
                                        5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
    return _mm512_permutexvar_epi16(order, (__m512i)_mm512_cvtne2ps_pbh(b, a));
}

// A panel whose columns are W's rows from n on: [k / 2][PANEL][2].
template <class Weights>
void unpack_rows(const Weights& w, int64_t n, bf16* out) {
    for (int64_t half = 0; half < PANEL; half += LANES)
        for (int64_t block = 0; block < w.k; block += w.block) {
            const int64_t top = n + half, there = w.n - top, end = min(block + w.block, w.k);
            decltype(w.common(0, 0)) common[16];
            for (int r = 0; r < 16 && r < there; r++) common[r] = w.common(top + r, block);
            for (int64_t column = block; column < end; column += 2 * LANES) {
                __m512i a[16];
                for (int r = 0; r < 16; r++)
                    a[r] = r < there ? w.weights(common[r], top + r, column) : _mm512_setzero_si512();
                transpose(a);
                const int64_t pairs = min(LANES, (end - column + 1) / 2);
                for (int p = 0; p < pairs; p++)
                    _mm512_storeu_si512(out + (column / 2 + p) * 2 * PANEL + 2 * half, a[p]);
            }
        }
}

// A panel whose columns are W's from k on: [n / 2][PANEL][2].
template <class Weights>
void unpack_columns(const Weights& w, int64_t k, bf16* out) {
    const auto first_half = paired(_mm256_setr_epi16(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15),
                                   _mm256_setr_epi16(32, 33, 34, 35, 36, 37, 38, 39, 40, 41, 42, 43, 44, 45, 46, 47));
    const auto second_half = _mm512_add_epi16(first_half, _mm512_set1_epi16(16));
    for (int64_t row = 0; row < w.n; row += 2) {
        const auto upper = w.weights(w.common(row, k), row, k);
        const auto lower = row + 1 < w.n ? w.weights(w.common(row + 1, k), row + 1, k) : _mm512_setzero_si512();
        _mm512_storeu_si512(out + row * PANEL, _mm512_permutex2var_epi16(upper, first_half, lower));
        _mm512_storeu_si512(out + row * PANEL + PANEL, _mm512_permutex2var_epi16(upper, second_half, lower));
    }
}

// As `unpack_rows`, of scale * factor [n, rank].
template <class Matrix>
void lay_factor_rows(const Term<Matrix>& t, int64_t n, bf16* out) {
    for (int64_t p = 0; p < t.rank; p += 2)
        for (int64_t half = 0; half < PANEL; half += LANES) {
            const auto mask = first(t.matrix.n - n - half);
            const auto lanes = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
            const auto rows = _mm512_mullo_epi32(lanes, _mm512_set1_epi32(t.rank));
            const float* from = t.factor + (n + half) * t.rank + p;
            const auto scale = _mm512_set1_ps(t.scale), zero = _mm512_setzero_ps();
            _mm512_storeu_si512(
                out + p * PANEL + 2 * half,
                rounded_pairs(_mm512_mul_ps(_mm512_mask_i32gather_ps(zero, mask, rows, from, 4), scale),
                              _mm512_mul_ps(_mm512_mask_i32gather_ps(zero, mask, rows, from + 1, 4), scale)));
        }
}

// As `unpack_columns`, of scale * factor [rank, k].
template <class Matrix>
void lay_factor_columns(const Term<Matrix>& t, int64_t k, bf16* out) {
    for (int64_t p = 0; p < t.rank; p += 2)
        for (int64_t half = 0; half < PANEL; half += LANES) {
            const auto mask = first(t.matrix.k - k - half);
            const float* from = t.factor + p * t.matrix.k + k + half;
            const auto scale = _mm512_set1_ps(t.scale);
            _mm512_storeu_si512(out + p * PANEL + 2 * half,
                                rounded_pairs(_mm512_mul_ps(_mm512_maskz_loadu_ps(mask, from), scale),
                                              _mm512_mul_ps(_mm512_maskz_loadu_ps(mask, from + t.matrix.k), scale)));
        }
}

// How a product is cut: `transposed` multiplies with W (its columns are k), else with W^T (n).
template <class Matrix>
struct Cut {
    int64_t columns, depth = 0, panels, group, groups, height, most_rows;
    bool transposed;

    int64_t depth_of(const Term<Matrix>& t) const { return up(transposed ? t.matrix.n : t.matrix.k, 2); }

    Cut(const Term<Matrix>* terms, int64_t count, int64_t rows, bool transposed, int64_t threads)
        : transposed(transposed) {
        columns = transposed ? terms->matrix.k : terms->matrix.n;
        for (int64_t i = 0; i < count; i++) depth += depth_of(terms[i]) + terms[i].rank;
        panels = up(columns, PANEL) / PANEL;
        const int64_t most = max<int64_t>(min(MOST_PANELS, PANELS_BYTES / (PANEL * depth * int64_t(sizeof(bf16)))), 1);
        const int64_t share = (panels + threads - 1) / threads, rounds = (share + most - 1) / most;
        group = (share + rounds - 1) / rounds;  // as many for each thread
        groups = (panels + group - 1) / group;
        const int64_t blocks = max<int64_t>((rows + HEIGHT - 1) / HEIGHT, 1);
        height = up((rows + blocks - 1) / blocks, TILE);
        most_rows = min(up(rows, TILE), HEIGHT);  // never less for more rows, as the height may be
    }
    int64_t unpacked_bytes() const { return group * PANEL * depth * sizeof(bf16); }
    int64_t bytes() const { return unpacked_bytes() + group * PANEL * most_rows * sizeof(float); }
};

template <class Matrix>
struct Panels {
    const Cut<Matrix>& cut;
    const Term<Matrix>* terms;
    int64_t count, first_panel, here;
    bf16* unpacked;
    float* sums;

    void unpack() const {
        for (int64_t p = 0; p < here; p++) {
            bf16* out = unpacked + p * PANEL * cut.depth;
            const int64_t column = (first_panel + p) * PANEL;
            for (const Term<Matrix>* t = terms; t < terms + count; t++) {
                t->matrix.read([&](const auto& weights) {
                    cut.transposed ? unpack_columns(weights, column, out) : unpack_rows(weights, column, out);
                });
                out += cut.depth_of(*t) * PANEL;
                if (t->rank) (cut.transposed ? lay_factor_columns<Matrix> : lay_factor_rows<Matrix>)(*t, column, out);
                out += t->rank * PANEL;
            }
        }
    }

    // Of rows from `row` on.
    void sum(int64_t row, int64_t rows) const {
        int64_t at = 0;
        for (const Term<Matrix>* t = terms; t < terms + count; t++) {
            const int64_t depth = cut.depth_of(*t);
            add(t->a + row * depth, depth, depth, rows, at);
            at += depth;
            if (t->rank) add(t->low + row * t->low_step, t->low_step, t->rank, rows, at);
            at += t->rank;
        }
    }

    void add(const bf16* a, int64_t step, int64_t depth, int64_t rows, int64_t at) const {
        for (int64_t d = 0; d < depth; d += 2 * DEPTH) {
            const int64_t pairs = min(2 * DEPTH, depth - d) / 2;
            for (int64_t r = 0; r < rows; r += TILE)
                for (int64_t p = 0; p < here; p++)
                    multiply_rest<TILE>(min<int64_t>(TILE, rows - r), a + r * step + d, step,
                                        unpacked + (p * cut.depth + at + d) * PANEL, pairs,
                                        sums + (p * cut.height + r) * PANEL, PANEL, at + d > 0);
        }
    }

    void round(int64_t row, int64_t rows, const float* bias, bf16* out) const {
        for (int64_t p = 0; p < here; p++)
            for (int64_t e = 0; e < PANEL; e += LANES) {
                const int64_t column = (first_panel + p) * PANEL + e;
                const auto mask = first(cut.columns - column);
                const auto more = bias ? _mm512_maskz_loadu_ps(mask, bias + column) : _mm512_setzero_ps();
                for (int64_t r = 0; r < rows; r++)
                    store(out + (row + r) * cut.columns + column, mask,
                          _mm512_add_ps(_mm512_loadu_ps(sums + (p * cut.height + r) * PANEL + e), more));
            }
    }
};

template <class Matrix>
int64_t workspace_bytes(const Term<Matrix>* terms, int64_t count, int64_t rows, bool transposed, int64_t threads) {
    return threads * Cut<Matrix>(terms, count, rows, transposed, threads).bytes();
}

// out [rows, columns] = sum of the terms + bias: of a W^T + low (scale factor)^T, or of a W + low scale factor if it is
// `transposed`.
template <class Matrix>
void sum_of_products(const Term<Matrix>* terms, int64_t count, int64_t rows, bool transposed, const float* bias,
                     bf16* out, char* memory, int64_t threads) {
    const Cut<Matrix> cut(terms, count, rows, transposed, threads);
#pragma omp parallel for num_threads(threads) schedule(dynamic, 1)
    for (int64_t group = 0; group < cut.groups; group++) {
        char* mine = memory + omp_get_thread_num() * cut.bytes();
        const int64_t panel = group * cut.group;
        const Panels<Matrix> panels{cut, terms, count, panel, min(cut.group, cut.panels - panel),
                                    reinterpret_cast<bf16*>(mine),
                                    reinterpret_cast<float*>(mine + cut.unpacked_bytes())};
        panels.unpack();
        for (int64_t row = 0; row < rows; row += cut.height) {
            const int64_t height = min(cut.height, rows - row);
            panels.sum(row, height);
            panels.round(row, height, bias, out);
        }
    }
}

}  // namespace
