// The gate of a feed-forward layer, silu(x) * up, and its gradients, each in one pass over memory.

#include "vectors.h"

namespace {

constexpr int64_t PIECE = 1 << 12;  // numbers that a thread takes at a time

__m512 logistic(__m512 x) {
    const auto one = _mm512_set1_ps(1);
    return _mm512_div_ps(one, _mm512_add_ps(one, power_of_two(_mm512_mul_ps(x, _mm512_set1_ps(-LOG2_E)))));
}

// Calls `work(at, mask)` for the lanes of n numbers.
template <class Work>
void for_each(int64_t n, int64_t threads, Work work) {
#pragma omp parallel for num_threads(threads) schedule(static) if (n > PIECE)
    for (int64_t piece = 0; piece < n; piece += PIECE)
        for (int64_t at = piece; at < std::min(n, piece + PIECE); at += LANES) work(at, first(n - at));
}

}  // namespace

extern "C" {

void gate_forward(const bf16* x, const bf16* up, bf16* y, int64_t n, int64_t threads) {
    for_each(n, threads, [=](int64_t at, __mmask16 mask) {
        const auto value = load(x + at, mask);
        store(y + at, mask, _mm512_mul_ps(_mm512_mul_ps(value, logistic(value)), load(up + at, mask)));
    });
}

void gate_backward(const bf16* dy, const bf16* x, const bf16* up, bf16* dx, bf16* dup, int64_t n, int64_t threads) {
    for_each(n, threads, [=](int64_t at, __mmask16 mask) {
        const auto value = load(x + at, mask), given = load(dy + at, mask), share = logistic(value);
        const auto one = _mm512_set1_ps(1), activated = _mm512_mul_ps(value, share);
        const auto slope = _mm512_fmadd_ps(activated, _mm512_sub_ps(one, share), share);
        store(dx + at, mask, _mm512_mul_ps(_mm512_mul_ps(given, load(up + at, mask)), slope));
        store(dup + at, mask, _mm512_mul_ps(given, activated));
    });
}
}
