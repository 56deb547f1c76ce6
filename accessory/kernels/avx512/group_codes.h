// Whole numbers of 2, 3 or 4 bits in memory, of which a group of columns of a row shares a scale and a zero.
#pragma once

#include <cstring>

#include "vectors.h"

// W [n, k]: codes, lowest bits first: 4 bits, or the lower 2, of which `high` has a third. A weight is code * scale -
// zero, or (code - point) * scale where there are points; scales and zeros are fp16, or fp32 if `wide`.
struct GroupCodes {
    const uint8_t *codes, *high;
    const void *scales, *zeros;
    const uint8_t* points;
    int64_t n, k, bits, group, wide;

    int64_t groups() const { return (k + group - 1) / group; }
    int64_t code_bytes() const { return bits == 4 ? (k + 1) / 2 : (k + 3) / 4; }
    int64_t high_bytes() const { return (k + 7) / 8; }

    // Statistics from `at` on, those of `mask`; the others are zero.
    __m512 statistics(const void* of, int64_t at, __mmask16 mask) const {
        if (wide) return _mm512_maskz_loadu_ps(mask, static_cast<const float*>(of) + at);
        return _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(mask, static_cast<const uint16_t*>(of) + at));
    }
    __m512 point(int64_t at, __mmask16 mask) const {
        return _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm_maskz_loadu_epi8(mask, points + at)));
    }

    // One of them, in all lanes.
    __m512 statistic(const void* of, int64_t at) const {
        return _mm512_broadcastss_ps(_mm512_castps512_ps128(statistics(of, at, 1)));
    }

    // Calls `use` with what unpacks the weights.
    template <class Use>
    void read(Use use) const;
};

namespace {

// What products unpack by: see packed_product.h. A group's weights are looked up in a table of what its codes mean.
template <int BITS>
struct GroupUnpacker {
    const GroupCodes& w;
    int64_t n = w.n, k = w.k, block = w.group, code_bytes = w.code_bytes(), high_bytes = w.high_bytes();

    // 32 weights that repeat: an index is a code in its lowest bits, under others.
    __m512i common(int64_t row, int64_t column) const {
        const int64_t at = row * w.groups() + column / w.group;
        const auto lanes = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
        const auto code = _mm512_cvtepi32_ps(_mm512_and_si512(lanes, _mm512_set1_epi32((1 << BITS) - 1)));
        const auto scale = w.statistic(w.scales, at);
        const auto value = w.points ? _mm512_mul_ps(_mm512_sub_ps(code, _mm512_set1_ps(w.points[at])), scale)
                                    : _mm512_sub_ps(_mm512_mul_ps(code, scale), w.statistic(w.zeros, at));
        return _mm512_broadcast_i64x4(narrow(value));
    }

    __m512i weights(__m512i values, int64_t row, int64_t column) const {
        return _mm512_permutexvar_epi16(indices(row, column), values);
    }

    __m512i indices(int64_t row, int64_t column) const {
        if constexpr (BITS == 4) {
            const auto mask = first((k - column + 1) / 2);
            const auto bytes = _mm_maskz_loadu_epi8(mask, w.codes + row * code_bytes + column / 2);
            const auto pairs = _mm512_cvtepu8_epi32(bytes);
            return _mm512_or_si512(pairs, _mm512_slli_epi32(pairs, 12));
        }
        uint64_t codes = 0;
        copy(&codes, w.codes + row * code_bytes + column / 4, 8, code_bytes - column / 4);
        // Each byte in four words, shifted by 0, 2, 4 and 6.
        const auto bytes = _mm512_shuffle_epi8(
            _mm512_set1_epi64(codes),
            _mm512_set_epi32(0x07070707, 0x07070707, 0x06060606, 0x06060606, 0x05050505, 0x05050505, 0x04040404,
                             0x04040404, 0x03030303, 0x03030303, 0x02020202, 0x02020202, 0x01010101, 0x01010101, 0, 0));
        const auto low = _mm512_srlv_epi16(bytes, _mm512_set1_epi64(0x0006000400020000));
        if constexpr (BITS == 2) return low;
        uint32_t high = 0;
        copy(&high, w.high + row * high_bytes + column / 8, 4, high_bytes - column / 8);
        const auto three = _mm512_and_si512(low, _mm512_set1_epi16(3));
        return _mm512_mask_add_epi16(three, high, three, _mm512_set1_epi16(4));
    }

    // `size` bytes, or those that there are.
    static void copy(void* to, const uint8_t* from, int64_t size, int64_t there) {
        if (there >= size)
            memcpy(to, from, size);
        else
            memcpy(to, from, there);
    }
};

}  // namespace

template <class Use>
void GroupCodes::read(Use use) const {
    if (bits == 2)
        use(GroupUnpacker<2>{*this});
    else if (bits == 3)
        use(GroupUnpacker<3>{*this});
    else
        use(GroupUnpacker<4>{*this});
}
