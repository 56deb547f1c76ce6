// Attention of one new token a document to the keys and values that a cache holds, a key/value head at a time.

#include <vector>

#include "vectors.h"

namespace {

constexpr int64_t CHANNELS = 4 * LANES;  // of values that are mixed at once

struct Head {
    const bf16 *q, *keys, *values;  // of the first query head, and of the first key
    int64_t group, count, step, width;
    bf16* out;
};

// Numbers from `at` on, zeros behind the last of n.
__m512bh load_pairs(const bf16* x, int64_t at, int64_t n) {
    const auto mask = static_cast<__mmask32>((uint64_t{1} << std::min(n - at, 2 * LANES)) - 1);
    return (__m512bh)_mm512_maskz_loadu_epi16(mask, x + at);
}

// Keys from `begin` on, up to LANES of them, times a query.
__m512 scores(const Head& head, const bf16* q, int64_t begin) {
    __m512 sums[16];
    for (int64_t j = 0; j < LANES; j++) {
        sums[j] = _mm512_setzero_ps();
        if (begin + j >= head.count) continue;
        const bf16* key = head.keys + (begin + j) * head.step;
        for (int64_t at = 0; at < head.width; at += 2 * LANES)
            sums[j] = _mm512_dpbf16_ps(sums[j], load_pairs(q, at, head.width), load_pairs(key, at, head.width));
    }
    return sum_each(sums);
}

// weights[count] = exp(scale * score - the highest); returns their sum.
float weigh(const Head& head, const bf16* q, float scale, float* weights) {
    auto best = _mm512_set1_ps(-__builtin_inff()), mass = _mm512_setzero_ps();
    for (int64_t j = 0; j < head.count; j += LANES) {
        const auto found = _mm512_mul_ps(scores(head, q, j), _mm512_set1_ps(scale * LOG2_E));
        _mm512_storeu_ps(weights + j, found);
        best = _mm512_mask_max_ps(best, first(head.count - j), best, found);
    }
    best = _mm512_set1_ps(_mm512_reduce_max_ps(best));
    for (int64_t j = 0; j < head.count; j += LANES) {
        const auto weight = power_of_two(_mm512_sub_ps(_mm512_loadu_ps(weights + j), best));
        _mm512_storeu_ps(weights + j, weight);
        mass = _mm512_mask_add_ps(mass, first(head.count - j), mass, weight);
    }
    return _mm512_reduce_add_ps(mass);
}

// Sum of the values times `weights`, divided by `mass`.
void mix(const Head& head, const float* weights, float mass, bf16* out) {
    for (int64_t from = 0; from < head.width; from += CHANNELS) {
        __m512 sums[CHANNELS / LANES] = {};
        for (int64_t j = 0; j < head.count; j++)
            for (int64_t i = 0; i < CHANNELS / LANES; i++) {
                const int64_t at = from + i * LANES;
                const auto value = load(head.values + j * head.step + at, first(head.width - at));
                sums[i] = _mm512_fmadd_ps(_mm512_set1_ps(weights[j]), value, sums[i]);
            }
        for (int64_t i = 0; i < CHANNELS / LANES; i++) {
            const int64_t at = from + i * LANES;
            store(out + at, first(head.width - at), _mm512_mul_ps(sums[i], _mm512_set1_ps(1 / mass)));
        }
    }
}

void attend(const Head& head, float scale) {
    std::vector<float> weights((head.count + LANES - 1) / LANES * LANES);
    for (int64_t g = 0; g < head.group; g++) {
        const int64_t at = g * head.width;
        const float mass = weigh(head, head.q + at, scale, weights.data());
        mix(head, weights.data(), mass, head.out + at);
    }
}

}  // namespace

extern "C" {

// q and out [documents, heads, width]; keys and values [documents, longest, kv_heads, width], of which a document sees
// counts[i], up to `window`, the last ones.
void cached_attention(const bf16* q, const bf16* keys, const bf16* values, bf16* out, const int64_t* counts,
                      int64_t documents, int64_t longest, int64_t heads, int64_t kv_heads, int64_t width,
                      int64_t window, float scale, int64_t threads) {
    const int64_t step = kv_heads * width, group = heads / kv_heads;
#pragma omp parallel for num_threads(threads) schedule(dynamic, 1)
    for (int64_t task = 0; task < documents * kv_heads; task++) {
        const int64_t i = task / kv_heads, head = task % kv_heads, count = std::min(counts[i], window);
        const int64_t place = (i * longest + counts[i] - count) * step + head * width;
        const int64_t row = (i * heads + head * group) * width;
        attend({q + row, keys + place, values + place, group, count, step, width, out + row}, scale);
    }
}
}
