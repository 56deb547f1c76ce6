// Causal attention inside each document, bf16, for processors with AVX512-bf16.
//
// A thread takes a document's queries of one key/value head, BLOCK of them of one query head at a time, against all
// keys that any of them sees. All their scores fit into its workspace, so that a softmax need not be rescaled and
// the backward needs only q, k and v. Scores, weights before they are multiplied with, and all sums are fp32. A
// document's result has the same bits whatever the other documents and however many the threads.

#include <omp.h>

#include <cstring>
#include <type_traits>

#include "products.h"

namespace {

constexpr int64_t BLOCK = 32;         // queries of one head whose scores are made at once

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
    bf16 *key_columns, *value_columns, *key_rows, *value_rows, *rows, *weights, *pairs_of_dscores, *transposed_queries,
        *transposed_douts;
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
        take(key_columns, keys * width);
        if (backward) {
            take(dscores, BLOCK * stride);
            take(dkeys, keys * width);
            take(dvalues, keys * width);
            take(value_columns, keys * width);
            take(key_rows, keys * width);
            take(weights, keys * BLOCK);
            take(pairs_of_dscores, keys * BLOCK);
            take(transposed_queries, BLOCK * width);
            take(transposed_douts, BLOCK * width);
        } else {
            take(value_rows, keys * width);
        }
        bytes = next - memory;
    }
};

// x [n, width], n <= BLOCK -> [width, BLOCK], zero from n on.
void transpose_rows(Rows x, int64_t n, int64_t width, bf16* out) {
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

// One document and one key/value head.
struct Document {
    const Shape& shape;
    int64_t n, skipped;
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

// q and out [n, group, width]; rows of skipped queries need not exist.
void forward(const Document& document, const bf16* q, bf16* out, Workspace& w) {
    const auto& s = document.shape;
    const int64_t width = s.padded_width(), step = document.query_step();
    pack_as_columns(document.keys, document.n, s.width, w.key_columns);
    pack_as_rows(document.values, document.n, w.keys, s.width, w.value_rows);
    for (int64_t head = 0; head < s.group(); head++, q += s.width, out += s.width)
        for (int64_t query = document.skipped; query < document.n; query += BLOCK) {
            const int64_t rows = min(BLOCK, document.n - query);
            const auto keys = document.seen(query, rows);
            multiply(q + query * step, step, rows, w.key_columns + keys.begin * width, s.width / 2, PANEL * width,
                     keys.panels(), w.scores, w.stride, PANEL);
            float inverse[BLOCK];
            for (int64_t r = 0; r < rows; r++) {
                float* row = w.scores + r * w.stride;
                inverse[r] = 1 / document.weigh(row, query + r, keys);
                for (int64_t at = 0; at < keys.panels() * PANEL; at += LANES)
                    _mm256_storeu_si256((__m256i*)(w.rows + r * w.stride + at), narrow(_mm512_loadu_ps(row + at)));
            }
            multiply(w.rows, w.stride, rows, w.value_rows + keys.begin * PANEL, keys.panels() * PANEL / 2,
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
void store_transposed(const float* sums, int64_t n, int64_t width, int64_t step, bf16* out) {
    for (int64_t begin = 0; begin < n; begin += LANES) {
        const float* panel = sums + begin / PANEL * PANEL * up(width, PANEL) + begin % PANEL;
        for (int64_t e = 0; e < width; e += LANES) {
            __m512i a[16];
            for (int i = 0; i < 16; i++)
                a[i] = _mm512_loadu_si512(panel + (e + i) * PANEL);
            transpose(a);
            for (int i = 0; i < min<int64_t>(n - begin, 16); i++)
                _mm256_mask_storeu_epi16(out + (begin + i) * step + e, first(width - e), narrow((__m512)a[i]));
        }
    }
}

// As `forward`; dk and dv [n, width], `step` numbers from row to row.
void backward(const Document& document, const bf16* q, const bf16* dout, bf16* dq, bf16* dk, bf16* dv, int64_t step,
              Workspace& w) {
    const auto& s = document.shape;
    const int64_t width = s.padded_width(), q_step = document.query_step();
    pack_as_columns(document.keys, document.n, s.width, w.key_columns);
    pack_as_columns(document.values, document.n, s.width, w.value_columns);
    pack_as_rows(document.keys, document.n, w.keys, s.width, w.key_rows);
    const int64_t sums = up(document.n, PANEL) * width * sizeof(float);
    memset(w.dkeys, 0, sums), memset(w.dvalues, 0, sums);
    float ones[BLOCK];
    std::fill(ones, ones + BLOCK, 1.0f);
    for (int64_t head = 0; head < s.group(); head++, q += s.width, dout += s.width, dq += s.width)
        for (int64_t query = document.skipped; query < document.n; query += BLOCK) {
            const int64_t rows = min(BLOCK, document.n - query), pairs = (rows + 1) / 2;
            const auto keys = document.seen(query, rows);
            const bf16 *queries = q + query * q_step, *douts = dout + query * q_step;
            multiply(queries, q_step, rows, w.key_columns + keys.begin * width, s.width / 2, PANEL * width,
                     keys.panels(), w.scores, w.stride, PANEL);
            multiply(douts, q_step, rows, w.value_columns + keys.begin * width, s.width / 2, PANEL * width,
                     keys.panels(), w.dscores, w.stride, PANEL);
            lay_out_gradients(document, query, rows, keys, w);
            multiply(w.rows, w.stride, rows, w.key_rows + keys.begin * PANEL, keys.panels() * PANEL / 2,
                     PANEL * w.keys, width / PANEL, w.result, width, PANEL);
            store_narrow(w.result, rows, s.width, q_step, ones, dq + query * q_step);
            transpose_rows({queries, q_step}, rows, s.width, w.transposed_queries);
            transpose_rows({douts, q_step}, rows, s.width, w.transposed_douts);
            multiply(w.transposed_douts, BLOCK, s.width, w.weights, pairs, PANEL * BLOCK, keys.panels(),
                     w.dvalues + keys.begin * width, PANEL, PANEL * width, true);
            multiply(w.transposed_queries, BLOCK, s.width, w.pairs_of_dscores, pairs, PANEL * BLOCK, keys.panels(),
                     w.dkeys + keys.begin * width, PANEL, PANEL * width, true);
        }
    store_transposed(w.dkeys, document.n, s.width, step, dk);
    store_transposed(w.dvalues, document.n, s.width, step, dv);
}

// A row of `Documents.table`: a document's first key, its tokens, how many leading queries are skipped, and the row of
// its first query, as if that were packed.
struct Entry {
    int64_t place, tokens, skipped, row;
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
        const Document document{shape, entry.tokens, entry.skipped, rows(k), rows(v)};
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
