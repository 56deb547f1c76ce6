// Cross-entropy of rows of scores, which become their own gradient: a thread some rows at a time.

#include "vectors.h"

namespace {

constexpr float LEAST = -200;  // 2^LEAST is 0; smaller powers, -inf too, are raised to it
constexpr int SUMS = 4;        // at once: an exponential need not wait for the one before

// exp(score - highest). A NaN stays one.
__m512 exponential(__m512 score, float highest) {
    const auto power = _mm512_mul_ps(_mm512_sub_ps(score, _mm512_set1_ps(highest)), _mm512_set1_ps(LOG2_E));
    return power_of_two(_mm512_max_ps(_mm512_set1_ps(LEAST), power));
}

float highest_of(const bf16* scores, int64_t width) {
    __m512 best = _mm512_set1_ps(-__builtin_inff());
    for (int64_t at = 0; at < width; at += LANES) {
        const auto mask = first(width - at);
        best = _mm512_mask_max_ps(best, mask, load(scores + at, mask), best);
    }
    return _mm512_reduce_max_ps(best);
}

float mass_of(const bf16* scores, int64_t width, float highest) {
    __m512 sums[SUMS] = {};
    for (int64_t at = 0; at < width; at += SUMS * LANES)
#pragma GCC unroll 4
        for (int i = 0; i < SUMS; i++) {
            const int64_t here = at + i * LANES;
            const auto mask = first(width - here);
            const auto share = exponential(load(scores + here, mask), highest);
            sums[i] = _mm512_mask_add_ps(sums[i], mask, sums[i], share);
        }
    return _mm512_reduce_add_ps(_mm512_add_ps(_mm512_add_ps(sums[0], sums[1]), _mm512_add_ps(sums[2], sums[3])));
}

}  // namespace

extern "C" {

// Of each of `rows` rows of scores, `stride` apart: its highest, the sum of exp(score - highest), its label's score.
// Scores from `width` on count as -inf; a label beyond `columns` is another rank's, whose score is not known here.
void cross_entropy_statistics(const bf16* scores, const int64_t* labels, float* highest, float* mass, float* target,
                              int64_t rows, int64_t stride, int64_t columns, int64_t width, int64_t threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t row = 0; row < rows; row++) {
        const bf16* here = scores + row * stride;
        const int64_t label = labels[row];
        highest[row] = highest_of(here, width);
        mass[row] = mass_of(here, width, highest[row]);
        target[row] = 0;
        if (label >= 0 && label < columns)
            target[row] = label < width ? _mm512_cvtss_f32(load(here + label, 1)) : -__builtin_inff();
    }
}

// Scores become softmax minus one-hot, those from `width` on zero; highest and mass are those of whole rows.
void cross_entropy_gradient(bf16* scores, const int64_t* labels, const float* highest, const float* mass, int64_t rows,
                            int64_t stride, int64_t columns, int64_t width, int64_t threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t row = 0; row < rows; row++) {
        bf16* here = scores + row * stride;
        const int64_t label = labels[row];
        const auto scale = _mm512_set1_ps(1 / mass[row]);
        const bool known = label >= 0 && label < width;
        // Before its score is written over: the difference is rounded once, like all others.
        const auto of_label = known ? load(here + label, 1) : _mm512_setzero_ps();
        for (int64_t at = 0; at < columns; at += LANES) {
            const auto share = exponential(load(here + at, first(columns - at)), highest[row]);
            store(here + at, first(columns - at), _mm512_maskz_mul_ps(first(width - at), share, scale));
        }
        const auto one = _mm512_set1_ps(1);
        if (known) store(here + label, 1, _mm512_fmsub_ps(exponential(of_label, highest[row]), scale, one));
    }
}
}
