// Causal attention inside each document, bf16, for processors with AVX512-bf16.
//
// A thread takes a document's queries of one key/value head, BLOCK of them of one query head at a time, against all
// keys that any of them sees. Their scores lie whole in its workspace, so that a softmax needs no second thoughts and
// the backward nothing but q, k and v. Scores, weights before they are multiplied with, and all sums are fp32. A
// document gets the same bits whatever it stands beside and however many threads there are.
//
// Products are C [M, N] (+)= A [M, 2P] B [2P, N], A in rows and B in panels of PANEL columns, in which the numbers of
// two rows stand in pairs, as VDPBF16PS takes them: [N / PANEL][P][PANEL][2].

#include <omp.h>

#include <cstring>
#include <type_traits>

#include "vectors.h"

namespace {

using std::max, std::min;

constexpr int64_t PANEL = 2 * LANES;  // columns of B that are multiplied at once
constexpr int TILE = 12;              // rows of A that are: their sums take 24 of 32 registers
constexpr int64_t BLOCK = 32;         // queries of one head whose scores are made at once

int64_t up(int64_t n, int64_t multiple) { return (n + multiple - 1) / multiple * multiple; }

// a[r][c] -> a[c][r], 16 x 16 numbers of 32 bits.
void transpose(__m512i (&a)[16]) {
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
void multiply(const bf16* a, int64_t lda, int64_t rows, const bf16* b, int64_t pairs, int64_t b_step, int64_t panels,
              float* c, int64_t ldc, int64_t c_step, bool add = false) {
    for (int64_t panel = 0; panel < panels; panel++, b += b_step, c += c_step)
        for (int64_t r = 0; r < rows; r += TILE)
            multiply_rest<TILE>(min<int64_t>(rows - r, TILE), a + r * lda, lda, b, pairs, c + r * ldc, ldc, add);
}

struct Shape {
    int64_t heads, kv_heads, width, window;
    float scale;
    int64_t padded_width() const { return up(width, PANEL); }
    int64_t group() const { return heads / kv_heads; }
};

// Memory of one thread, for documents of up to `longest` tokens.
struct Workspace {
    int64_t keys, stride;  // of the longest document, and from one row of scores to the next
    float *scores, *dscores, *result, *dkeys, *dvalues;
    bf16 *across_keys, *across_values, *along_keys, *along_values, *rows, *weights, *pairs_of_dscores, *turned_queries,
        *turned_douts;
    int64_t bytes;

    Workspace(char* memory, int64_t longest, int64_t width, bool backward) {
        keys = up(longest, PANEL), stride = keys + LANES;
        char* next = memory;
        auto take = [&](auto*& pointer, int64_t count) {
            pointer = reinterpret_cast<std::remove_reference_t<decltype(pointer)>>(next);
            next += up(count * sizeof *pointer, 64);
        };
        take(scores, BLOCK * stride);
        take(result, BLOCK * width);
        take(rows, BLOCK * stride);
        take(across_keys, keys * width);
        if (backward) {
            take(dscores, BLOCK * stride);
            take(dkeys, keys * width);
            take(dvalues, keys * width);
            take(across_values, keys * width);
            take(along_keys, keys * width);
            take(weights, keys * BLOCK);
            take(pairs_of_dscores, keys * BLOCK);
            take(turned_queries, BLOCK * width);
            take(turned_douts, BLOCK * width);
        } else {
            take(along_values, keys * width);
        }
        bytes = next - memory;
    }
};

// Rows of one head in a packed tensor, `step` numbers from one to the next, or in the order of `map`.
struct Rows {
    const bf16* x;
    int64_t step;
    const int64_t* map = nullptr;
    const bf16* operator[](int64_t i) const { return x + (map ? map[i] : i) * step; }
};

// x [n, width] -> B of products whose columns are the n rows: [n / PANEL][padded width / 2][PANEL][2].
void lay_across(Rows x, int64_t n, int64_t width, bf16* out) {
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
__m512i pair_of_rows(Rows x, int64_t i, int64_t n, int64_t width, int64_t e) {
    const auto mask = first(width - e);
    const auto load = [&](int64_t row) {
        return row < n ? _mm256_maskz_loadu_epi16(mask, x[row] + e) : _mm256_setzero_si256();
    };
    return paired(load(i), load(i + 1));
}

// x [n, width] -> B of products that sum over the n rows: [padded width / PANEL][keys / 2][PANEL][2], zero from n on.
void lay_along(Rows x, int64_t n, int64_t keys, int64_t width, bf16* out) {
    for (int64_t i = 0; i < up(n, PANEL); i += 2)
        for (int64_t e = 0; e < up(width, PANEL); e += LANES)
            _mm512_storeu_si512(out + e / PANEL * PANEL * keys + i * PANEL + e % PANEL * 2,
                                pair_of_rows(x, i, n, width, e));
}

// x [n, width], n <= BLOCK -> [width, BLOCK], zero from n on.
void turn(Rows x, int64_t n, int64_t width, bf16* out) {
    static_assert(BLOCK == 2 * LANES);
    for (int64_t e = 0; e < width; e += LANES) {
        __m512i a[16];
        for (int i = 0; i < 16; i++) a[i] = pair_of_rows(x, 2 * i, n, width, e);
        transpose(a);
        for (int i = 0; i < 16; i++) _mm512_storeu_si512(out + (e + i) * BLOCK, a[i]);
    }
}

// Keys that a block of queries sees: from `begin`, a panel's first, to before `end`.
struct Seen {
    int64_t begin, end;
    int64_t panels() const { return (up(end, PANEL) - begin) / PANEL; }
};

// Of one document, what belongs to one key/value head.
struct Document {
    const Shape& shape;
    int64_t n, unread;
    Rows keys, values;

    int64_t query_step() const { return shape.heads * shape.width; }

    Seen seen(int64_t query, int64_t rows) const {
        return {max<int64_t>(query - shape.window + 1, 0) / PANEL * PANEL, query + rows};
    }

    // Lanes from key `at` on that `query` sees.
    __mmask16 mask(int64_t query, int64_t at) const {
        return first(query + 1 - at) & ~first(query - shape.window + 1 - at);
    }

    // Scores of a row, from key `begin` on -> exp(scale * (score - highest)), 0 where not seen; returns their sum.
    float weigh(float* row, int64_t query, Seen keys) const {
        __m512 highest = _mm512_set1_ps(-__builtin_inff());
        for (int64_t at = keys.begin; at < keys.end; at += LANES)
            highest = _mm512_mask_max_ps(highest, mask(query, at), _mm512_loadu_ps(row + at - keys.begin), highest);
        const auto most = _mm512_set1_ps(_mm512_reduce_max_ps(highest));
        const auto factor = _mm512_set1_ps(shape.scale * LOG2_E);
        __m512 sum = _mm512_setzero_ps();
        for (int64_t at = keys.begin; at < up(keys.end, PANEL); at += LANES) {
            float* here = row + at - keys.begin;
            const auto difference = _mm512_mul_ps(_mm512_sub_ps(_mm512_loadu_ps(here), most), factor);
            const auto weight = _mm512_maskz_mov_ps(mask(query, at), power_of_two(difference));
            _mm512_storeu_ps(here, weight);
            sum = _mm512_add_ps(sum, weight);
        }
        return _mm512_reduce_add_ps(sum);
    }
};

// x [rows, padded width], each row times its factor -> bf16.
void store_narrow(const float* x, int64_t rows, int64_t width, int64_t step, const float* factors, bf16* out) {
    for (int64_t r = 0; r < rows; r++)
        for (int64_t e = 0; e < width; e += LANES)
            _mm256_mask_storeu_epi16(
                out + r * step + e, first(width - e),
                narrow(_mm512_mul_ps(_mm512_loadu_ps(x + r * up(width, PANEL) + e), _mm512_set1_ps(factors[r]))));
}

// q and out [n, group, width], of queries whose results nobody reads there need be no rows.
void forward(const Document& document, const bf16* q, bf16* out, Workspace& w) {
    const auto& s = document.shape;
    const int64_t width = s.padded_width(), step = document.query_step();
    lay_across(document.keys, document.n, s.width, w.across_keys);
    lay_along(document.values, document.n, w.keys, s.width, w.along_values);
    for (int64_t head = 0; head < s.group(); head++, q += s.width, out += s.width)
        for (int64_t query = document.unread; query < document.n; query += BLOCK) {
            const int64_t rows = min(BLOCK, document.n - query);
            const auto keys = document.seen(query, rows);
            multiply(q + query * step, step, rows, w.across_keys + keys.begin * width, s.width / 2, PANEL * width,
                     keys.panels(), w.scores, w.stride, PANEL);
            float inverse[BLOCK];
            for (int64_t r = 0; r < rows; r++) {
                float* row = w.scores + r * w.stride;
                inverse[r] = 1 / document.weigh(row, query + r, keys);
                for (int64_t at = 0; at < keys.panels() * PANEL; at += LANES)
                    _mm256_storeu_si256((__m256i*)(w.rows + r * w.stride + at), narrow(_mm512_loadu_ps(row + at)));
            }
            multiply(w.rows, w.stride, rows, w.along_values + keys.begin * PANEL, keys.panels() * PANEL / 2,
                     PANEL * w.keys, width / PANEL, w.result, width, PANEL);
            store_narrow(w.result, rows, s.width, step, inverse, out + query * step);
        }
}

// Of scores and of the weights' gradients (w.scores, w.dscores) makes the weights, in pairs of queries (w.weights), and
// the scores' gradients, in rows (w.rows) and in pairs of queries (w.pairs_of_dscores).
void lay_out_gradients(const Document& document, int64_t query, int64_t rows, Seen keys, Workspace& w) {
    const int64_t length = keys.panels() * PANEL;
    const auto scale = _mm512_set1_ps(document.shape.scale);
    for (int64_t r = 0; r < rows; r += 2) {
        __m512 inverse[2], mean[2];
        float* p[2] = {w.scores + r * w.stride, w.scores + (r + 1) * w.stride};
        float* d[2] = {w.dscores + r * w.stride, w.dscores + (r + 1) * w.stride};
        bf16* out[2] = {w.rows + r * w.stride, w.rows + (r + 1) * w.stride};
        for (int i = 0; i < 2 && r + i < rows; i++) {
            inverse[i] = _mm512_set1_ps(1 / document.weigh(p[i], query + r + i, keys));
            __m512 sum = _mm512_setzero_ps();
            for (int64_t at = 0; at < length; at += LANES)
                sum = _mm512_mask3_fmadd_ps(_mm512_loadu_ps(p[i] + at), _mm512_loadu_ps(d[i] + at), sum,
                                            document.mask(query + r + i, keys.begin + at));
            mean[i] = _mm512_mul_ps(_mm512_set1_ps(_mm512_reduce_add_ps(sum)), inverse[i]);
        }
        for (int64_t at = 0; at < length; at += LANES) {
            __m256i weight[2] = {}, dscore[2] = {};
            for (int i = 0; i < 2 && r + i < rows; i++) {
                const auto exact = _mm512_mul_ps(_mm512_loadu_ps(p[i] + at), inverse[i]);
                const auto change = _mm512_mul_ps(_mm512_sub_ps(_mm512_loadu_ps(d[i] + at), mean[i]), scale);
                weight[i] = narrow(exact);
                dscore[i] = narrow(_mm512_maskz_mul_ps(document.mask(query + r + i, keys.begin + at), exact, change));
                _mm256_storeu_si256((__m256i*)(out[i] + at), dscore[i]);
            }
            const int64_t place = at / PANEL * PANEL * BLOCK + r * PANEL + at % PANEL * 2;
            _mm512_storeu_si512(w.weights + place, paired(weight[0], weight[1]));
            _mm512_storeu_si512(w.pairs_of_dscores + place, paired(dscore[0], dscore[1]));
        }
    }
}

// Sums [keys / PANEL][width][PANEL] fp32 -> bf16 rows of n keys.
void store_turned(const float* sums, int64_t n, int64_t width, int64_t step, bf16* out) {
    for (int64_t begin = 0; begin < n; begin += LANES)
        for (int64_t e = 0; e < width; e += LANES) {
            __m512i a[16];
            for (int i = 0; i < 16; i++)
                a[i] = _mm512_loadu_si512(sums + begin / PANEL * PANEL * up(width, PANEL) + (e + i) * PANEL + begin % PANEL);
            transpose(a);
            for (int i = 0; i < min<int64_t>(n - begin, 16); i++)
                _mm256_mask_storeu_epi16(out + (begin + i) * step + e, first(width - e), narrow((__m512)a[i]));
        }
}

// As `forward`; dk and dv [n, width], `step` numbers from row to row.
void backward(const Document& document, const bf16* q, const bf16* dout, bf16* dq, bf16* dk, bf16* dv, int64_t step,
              Workspace& w) {
    const auto& s = document.shape;
    const int64_t width = s.padded_width(), q_step = document.query_step();
    lay_across(document.keys, document.n, s.width, w.across_keys);
    lay_across(document.values, document.n, s.width, w.across_values);
    lay_along(document.keys, document.n, w.keys, s.width, w.along_keys);
    const int64_t sums = up(document.n, PANEL) * width * sizeof(float);
    memset(w.dkeys, 0, sums), memset(w.dvalues, 0, sums);
    float ones[BLOCK];
    std::fill(ones, ones + BLOCK, 1.0f);
    for (int64_t head = 0; head < s.group(); head++, q += s.width, dout += s.width, dq += s.width)
        for (int64_t query = document.unread; query < document.n; query += BLOCK) {
            const int64_t rows = min(BLOCK, document.n - query), pairs = (rows + 1) / 2;
            const auto keys = document.seen(query, rows);
            const bf16 *queries = q + query * q_step, *douts = dout + query * q_step;
            multiply(queries, q_step, rows, w.across_keys + keys.begin * width, s.width / 2, PANEL * width,
                     keys.panels(), w.scores, w.stride, PANEL);
            multiply(douts, q_step, rows, w.across_values + keys.begin * width, s.width / 2, PANEL * width,
                     keys.panels(), w.dscores, w.stride, PANEL);
            lay_out_gradients(document, query, rows, keys, w);
            multiply(w.rows, w.stride, rows, w.along_keys + keys.begin * PANEL, keys.panels() * PANEL / 2,
                     PANEL * w.keys, width / PANEL, w.result, width, PANEL);
            store_narrow(w.result, rows, s.width, q_step, ones, dq + query * q_step);
            turn({queries, q_step}, rows, s.width, w.turned_queries);
            turn({douts, q_step}, rows, s.width, w.turned_douts);
            multiply(w.turned_douts, BLOCK, s.width, w.weights, pairs, PANEL * BLOCK, keys.panels(),
                     w.dvalues + keys.begin * width, PANEL, PANEL * width, true);
            multiply(w.turned_queries, BLOCK, s.width, w.pairs_of_dscores, pairs, PANEL * BLOCK, keys.panels(),
                     w.dkeys + keys.begin * width, PANEL, PANEL * width, true);
        }
    store_turned(w.dkeys, document.n, s.width, step, dk);
    store_turned(w.dvalues, document.n, s.width, step, dv);
}

// A row of the table of documents: where the keys of one begin, its tokens, of how many first queries nobody reads the
// result, and the row that its first query has or would have.
struct Entry {
    int64_t place, tokens, unread, row;
};

// Calls `work(document, offset of its queries, offset of its keys' gradients, workspace)` for each document and each
// key/value head; the table begins with the longest.
template <class Work>
void for_each(const bf16* k, const bf16* v, const int64_t* map, const Entry* table, int64_t count, const Shape& shape,
              bool backward, char* memory, int64_t threads, Work work) {
    const int64_t longest = count ? table[0].tokens : 0, step = shape.kv_heads * shape.width;
    const int64_t each = Workspace(nullptr, longest, shape.padded_width(), backward).bytes;
#pragma omp parallel for num_threads(threads) schedule(dynamic, 1)
    for (int64_t task = 0; task < count * shape.kv_heads; task++) {
        Workspace workspace(memory + omp_get_thread_num() * each, longest, shape.padded_width(), backward);
        const Entry& entry = table[task / shape.kv_heads];
        const int64_t head = task % shape.kv_heads, channel = head * shape.width;
        const auto rows = [&](const bf16* x) {
            return map ? Rows{x + channel, step, map + entry.place} : Rows{x + entry.place * step + channel, step};
        };
        const Document document{shape, entry.tokens, entry.unread, rows(k), rows(v)};
        work(document, entry.row * document.query_step() + channel * shape.group(), entry.place * step + channel,
             workspace);
    }
}

}  // namespace

extern "C" {

int64_t attention_workspace_bytes(int64_t longest, int64_t width, bool backward) {
    return Workspace(nullptr, longest, up(width, PANEL), backward).bytes;
}

// q and out [T, heads, width]; k and v [T, kv_heads, width], whose rows stand in the order of `map` if there is one.
void attention_forward(const bf16* q, const bf16* k, const bf16* v, bf16* out, const int64_t* map, const Entry* table,
                       int64_t count, int64_t heads, int64_t kv_heads, int64_t width, int64_t window, float scale,
                       char* memory, int64_t threads) {
    const Shape shape{heads, kv_heads, width, window, scale};
    for_each(k, v, map, table, count, shape, false, memory, threads,
             [&](const Document& document, int64_t queries, int64_t, Workspace& workspace) {
                 forward(document, q + queries, out + queries, workspace);
             });
}

// dq as q; dk and dv in the order of `map`, or as k and v.
void attention_backward(const bf16* q, const bf16* k, const bf16* v, const bf16* dout, bf16* dq, bf16* dk, bf16* dv,
                        const int64_t* map, const Entry* table, int64_t count, int64_t heads, int64_t kv_heads,
                        int64_t width, int64_t window, float scale, char* memory, int64_t threads) {
    const Shape shape{heads, kv_heads, width, window, scale};
    for_each(k, v, map, table, count, shape, true, memory, threads,
             [&](const Document& document, int64_t queries, int64_t keys, Workspace& workspace) {
                 backward(document, q + queries, dout + queries, dq + queries, dk + keys, dv + keys,
                          shape.kv_heads * shape.width, workspace);
             });
}
}
