// RMSNorm and its gradients: one pass over memory in each direction, a thread some rows at a time.

#include "vectors.h"

namespace {

__m512 unit(const bf16* x, int64_t at, __mmask16 mask, float scale) {
    return _mm512_mul_ps(load(x + at, mask), _mm512_set1_ps(scale));
}

float inverse_rms(const bf16* x, int64_t width, float eps) {
    __m512 sum = _mm512_setzero_ps();
    for (int64_t at = 0; at < width; at += LANES) {
        const auto value = load(x + at, first(width - at));
        sum = _mm512_fmadd_ps(value, value, sum);
    }
    return 1 / __builtin_sqrtf(_mm512_reduce_add_ps(sum) / width + eps);
}

// What `dx` and `sums` of one row need; either may be absent.
void gradients(const bf16* dy, const bf16* x, const float* weight, float scale, bf16* dx, float* sums, int64_t width) {
    __m512 along = _mm512_setzero_ps();
    for (int64_t at = 0; at < width; at += LANES) {
        const auto mask = first(width - at);
        const auto product = _mm512_mul_ps(load(dy + at, mask), unit(x, at, mask, scale));
        along = _mm512_fmadd_ps(product, _mm512_maskz_loadu_ps(mask, weight + at), along);
        if (!sums) continue;
        _mm512_mask_storeu_ps(sums + at, mask, _mm512_add_ps(_mm512_maskz_loadu_ps(mask, sums + at), product));
    }
    if (!dx) return;
    const auto mean = _mm512_set1_ps(_mm512_reduce_add_ps(along) / width);
    for (int64_t at = 0; at < width; at += LANES) {
        const auto mask = first(width - at);
        const auto dunit = _mm512_mul_ps(load(dy + at, mask), _mm512_maskz_loadu_ps(mask, weight + at));
        const auto change = _mm512_fnmadd_ps(unit(x, at, mask, scale), mean, dunit);
        store(dx + at, mask, _mm512_mul_ps(change, _mm512_set1_ps(scale)));
    }
}

}  // namespace

extern "C" {

// x and y [rows, width]; scale [rows], 1 / rms(x): made, or read if it is `known`.
void rms_norm_forward(const bf16* x, const float* weight, bf16* y, float* scale, int64_t rows, int64_t width, float eps,
                      bool known, int64_t threads) {
#pragma omp parallel for num_threads(threads) schedule(static) if (rows > 1)
    for (int64_t row = 0; row < rows; row++) {
        const bf16* here = x + row * width;
        if (!known) scale[row] = inverse_rms(here, width, eps);
        for (int64_t at = 0; at < width; at += LANES) {
            const auto mask = first(width - at);
            const auto factor = _mm512_maskz_loadu_ps(mask, weight + at);
            store(y + row * width + at, mask, _mm512_mul_ps(unit(here, at, mask, scale[row]), factor));
        }
    }
}

// dx [rows, width], and sums fp32 [rows / chunk, width], zero at first, of the weight's gradient over `chunk` rows
// each: that many whatever the number of threads, so that it changes no bits. Either may be absent.
void rms_norm_backward(const bf16* dy, const bf16* x, const float* weight, const float* scale, bf16* dx, float* sums,
                       int64_t rows, int64_t width, int64_t chunk, int64_t threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t part = 0; part < (rows + chunk - 1) / chunk; part++)
        for (int64_t row = part * chunk; row < std::min(rows, (part + 1) * chunk); row++)
            gradients(dy + row * width, x + row * width, weight, scale[row], dx ? dx + row * width : nullptr,
                      sums ? sums + part * width : nullptr, width);
}
}
