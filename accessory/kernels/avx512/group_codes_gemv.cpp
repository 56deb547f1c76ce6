// Products of a few rows with several matrices of 2, 3 and 4-bit codes in groups, and with their biases and LoRA.
//
// Codes are multiplied as the whole numbers they are, and the sum of each group is scaled; then its zero times the sum
// of its x is subtracted. A 16-bit word of codes is multiplied field by field: a field put into the mantissa of a power
// of two, `base`, is that number plus the code, without a table. The sums of base * x are subtracted beforehand. So x
// is laid out in planes: the numbers that are multiplied with first fields of words, with second ones, and so on.

#include <array>
#include <utility>

#include "group_codes.h"
#include "packed_gemv.h"

namespace {

// Bytes that are asked for before they are read.
constexpr int64_t CODES_AHEAD = 8192, STATISTICS_AHEAD = 1024;

// Fields of a word: field j is shifted right by SHIFT[j], into place j * width - SHIFT[j] of the mantissa.
template <int BITS>
struct Fields {
    static constexpr int WIDTH = 2, COUNT = 8;
    static constexpr int SHIFT[] = {0, 0, 0, 6, 6, 6, 10, 10};
};
template <>
struct Fields<4> {
    static constexpr int WIDTH = 4, COUNT = 4;
    static constexpr int SHIFT[] = {0, 1, 5, 9};
};

template <int BITS>
struct Words {
    using F = Fields<BITS>;
    static constexpr int64_t COLUMNS = 32 * F::COUNT;  // of a vector of words
    static constexpr int64_t PER_LANE = 2 * F::COUNT;  // of these

    template <int J>
    static constexpr int PLACE = J * F::WIDTH - F::SHIFT[J];

    // base of field J in bf16, all 32.
    template <int J>
    static __m512i base() {
        return _mm512_set1_epi16((127 + 7 - PLACE<J>) << 7);
    }

    // base + code of field J of each word; `high`: third bits, one of a field in each word.
    template <int J>
    static __m512bh plane(__m512i words, __m512i high) {
        constexpr int place = PLACE<J>, at = place + 2 - J;
        auto codes = F::SHIFT[J] ? _mm512_srli_epi16(words, F::SHIFT[J]) : words;
        if constexpr (BITS == 3) {
            const auto third = at > 0 ? _mm512_slli_epi16(high, at > 0 ? at : 0)
                                      : at < 0 ? _mm512_srli_epi16(high, at < 0 ? -at : 0) : high;
            codes = _mm512_ternarylogic_epi32(codes, third, _mm512_set1_epi16(3 << place), 0xE4);  // where that is
        }
        const auto mask = _mm512_set1_epi16(((1 << BITS) - 1) << place);
        return (__m512bh)_mm512_ternarylogic_epi32(codes, mask, base<J>(), 0xEA);  // (codes & mask) | base
    }
};

template <int BITS, class Use, int... J>
void each_field(Use use, std::integer_sequence<int, J...>) {
    (use(std::integral_constant<int, J>()), ...);
}
template <int BITS, class Use>
void each_field(Use use) {
    each_field<BITS>(use, std::make_integer_sequence<int, Fields<BITS>::COUNT>());
}

// x [rows, k] as matrices of one width and group need it.
struct Planes {
    int64_t bits, group, blocks, groups;
    std::vector<Lanes> x;      // [rows, blocks, fields], zeros behind k
    std::vector<Lanes> start;  // [rows, blocks]: what lanes' sums start from, minus those of base * x
    std::vector<float> sums;   // [rows, groups]: of x, zeros up to whole vectors

    Planes(const GroupCodes& w, const bf16* from, int64_t rows) : bits(w.bits), group(w.group) {
        const auto lay = [&](auto width) {
            constexpr int64_t columns = Words<width>::COLUMNS, lane = Words<width>::PER_LANE;
            blocks = (w.k + columns - 1) / columns;
            groups = (w.groups() + LANES - 1) / LANES * LANES;
            x.resize(rows * blocks * Fields<width>::COUNT);
            start.resize(rows * blocks);
            sums.resize(rows * groups);
            for (int64_t row = 0; row < rows; row++)
                for (int64_t b = 0; b < blocks; b++) {
                    alignas(64) float of_lanes[LANES];
                    const int64_t column = b * columns, at = row * blocks + b;
                    block<width>(from + row * w.k + column, std::min(columns, w.k - column),
                                 x.data() + at * Fields<width>::COUNT, start[at], of_lanes);
                    for (int l = 0; l < LANES && column + l * lane < w.k; l++)
                        sums[row * groups + (column + l * lane) / group] += of_lanes[l];
                }
        };
        if (bits == 4)
            lay(std::integral_constant<int, 4>());
        else
            lay(std::integral_constant<int, 2>());  // of 3 bits two are laid out so, and the third is added
    }

    bool suit(const GroupCodes& w) const { return (bits == 4) == (w.bits == 4) && group == w.group; }

    template <int BITS>
    static void block(const bf16* from, int64_t there, Lanes* to, Lanes& start, float* of_lanes) {
        constexpr int COUNT = Fields<BITS>::COUNT;
        __m512i v[COUNT], w[COUNT];
        for (int i = 0; i < COUNT; i++) {
            const int64_t rest = std::max<int64_t>(std::min<int64_t>(there - 32 * i, 32), 0);
            v[i] = _mm512_maskz_loadu_epi16(rest == 32 ? ~0u : (1u << rest) - 1, from + 32 * i);
        }
        // Numbers of even places come before those of odd ones: a place's lowest bit becomes its highest.
        const auto even = _mm512_set_epi16(62, 60, 58, 56, 54, 52, 50, 48, 46, 44, 42, 40, 38, 36, 34, 32, 30, 28, 26,
                                           24, 22, 20, 18, 16, 14, 12, 10, 8, 6, 4, 2, 0);
        const auto odd = _mm512_add_epi16(even, _mm512_set1_epi16(1));
        for (int stage = 1; stage < COUNT; stage *= 2) {
            for (int i = 0; i < COUNT; i += 2) {
                w[i / 2] = _mm512_permutex2var_epi16(v[i], even, v[i + 1]);
                w[COUNT / 2 + i / 2] = _mm512_permutex2var_epi16(v[i], odd, v[i + 1]);
            }
            std::copy(w, w + COUNT, v);
        }
        auto begin = _mm512_setzero_ps(), sum = _mm512_setzero_ps();
        const auto one = (__m512bh)_mm512_set1_epi16(0x3F80), minus = (__m512bh)_mm512_set1_epi16(short(0x8000));
        each_field<BITS>([&](auto j) {
            const auto plane = (__m512bh)v[j];
            to[j].value = v[j];
            const auto base = (__m512bh)_mm512_xor_si512(Words<BITS>::template base<j>(), (__m512i)minus);
            begin = _mm512_dpbf16_ps(begin, base, plane);
            sum = _mm512_dpbf16_ps(sum, one, plane);
        });
        start.value = (__m512i)begin;
        _mm512_store_ps(of_lanes, sum);
    }
};

struct GroupOperands {
    const GroupCodes* matrices;
    std::vector<Planes> planes;
    std::vector<const Planes*> of;

    GroupOperands(const GroupCodes* matrices, int64_t count, const bf16* x, int64_t rows, int64_t)
        : matrices(matrices) {
        planes.reserve(count);
        for (int64_t i = 0; i < count; i++) {
            size_t p = 0;
            while (p < planes.size() && !planes[p].suit(matrices[i])) p++;
            if (p == planes.size()) planes.emplace_back(matrices[i], x, rows);
            of.push_back(&planes[p]);
        }
    }

    static constexpr int at_once(int rows) { return rows == 1 ? 4 : 2; }  // as many as is fastest

    template <int N, int ROWS>
    void multiply(int64_t i, int64_t n, int64_t row, __m512 (*sums)[16], int64_t place) const {
        const GroupCodes w = matrices[i];  // a copy, which no store can change
        const auto with = [&](auto bits) { multiply_rows<bits, N, ROWS>(w, *of[i], n, row, sums, place); };
        if (w.bits == 2)
            with(std::integral_constant<int, 2>());
        else if (w.bits == 3)
            with(std::integral_constant<int, 3>());
        else
            with(std::integral_constant<int, 4>());
    }

    template <int BITS, int N, int ROWS>
    static void multiply_rows(const GroupCodes w, const Planes& x, int64_t n, int64_t row, __m512 (*sums)[16],
                              int64_t place) {
        constexpr int64_t columns = Words<BITS>::COLUMNS, lane = Words<BITS>::PER_LANE;
        const int64_t groups = w.groups(), code_bytes = w.code_bytes(), high_bytes = w.high_bytes();
        const auto shift = _mm_cvtsi64_si128(__builtin_ctzll(w.group));
        const auto lanes = _mm512_mullo_epi32(_mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15),
                                              _mm512_set1_epi32(lane));
        int64_t rows[N];
        for (int j = 0; j < N; j++) rows[j] = std::min(n + j, w.n - 1);
        __m512 sum[ROWS][N] = {};
        for (int64_t g = 0; g < groups; g += LANES) {
            const auto mask = first(groups - g);
            __m512 scales[N];
            for (int j = 0; j < N; j++) {
                const int64_t at = rows[j] * groups + g;
                prefetch(w, at);
                scales[j] = w.statistics(w.scales, at, mask);
                const auto zeros =
                    w.points ? _mm512_mul_ps(w.point(at, mask), scales[j]) : w.statistics(w.zeros, at, mask);
                for (int r = 0; r < ROWS; r++) {
                    const float* sums_of_x = x.sums.data() + (row + r) * x.groups + g;
                    sum[r][j] = _mm512_fnmadd_ps(zeros, _mm512_loadu_ps(sums_of_x), sum[r][j]);
                }
            }
            const int64_t begin = g * w.group, end = std::min(begin + LANES * w.group, w.k);
            for (int64_t column = begin; column < end; column += columns) {
                const auto group_of_lane =
                    _mm512_srl_epi32(_mm512_add_epi32(lanes, _mm512_set1_epi32(column - begin)), shift);
                __m512i words[N], high[N] = {};
                __m512 sum_here[ROWS][N];
                const int64_t block = column / columns;
                const Lanes* here = x.x.data() + (row * x.blocks + block) * Fields<BITS>::COUNT;
                for (int j = 0; j < N; j++) {
                    words[j] = codes<BITS>(w.codes + rows[j] * code_bytes, code_bytes, column);
                    if constexpr (BITS == 3) high[j] = third_bits(w.high + rows[j] * high_bytes, high_bytes, column);
                    for (int r = 0; r < ROWS; r++)
                        sum_here[r][j] = (__m512)x.start[(row + r) * x.blocks + block].value;
                }
                each_field<BITS>([&](auto field) {
                    __m512bh weights[N];
                    for (int j = 0; j < N; j++) weights[j] = Words<BITS>::template plane<field>(words[j], high[j]);
                    for (int r = 0; r < ROWS; r++) {
                        const auto numbers = (__m512bh)here[r * x.blocks * Fields<BITS>::COUNT + field].value;
                        for (int j = 0; j < N; j++)
                            sum_here[r][j] = _mm512_dpbf16_ps(sum_here[r][j], weights[j], numbers);
                    }
                });
                for (int j = 0; j < N; j++) {
                    const auto scale = _mm512_permutexvar_ps(group_of_lane, scales[j]);
                    for (int r = 0; r < ROWS; r++)
                        sum[r][j] = _mm512_fmadd_ps(sum_here[r][j], scale, sum[r][j]);
                }
            }
        }
        for (int r = 0; r < ROWS; r++)
            for (int j = 0; j < N; j++) sums[r][place + j] = sum[r][j];
    }

    static void prefetch(const GroupCodes& w, int64_t at) {
        const int64_t bytes = at * (w.wide ? 4 : 2) + STATISTICS_AHEAD;
        _mm_prefetch(static_cast<const char*>(w.scales) + bytes, _MM_HINT_T0);
        if (w.points)
            _mm_prefetch(reinterpret_cast<const char*>(w.points) + at + STATISTICS_AHEAD / 2, _MM_HINT_T0);
        else
            _mm_prefetch(static_cast<const char*>(w.zeros) + bytes, _MM_HINT_T0);
    }

    // The words of a vector from a column of a row on, zeros behind the row's `size` bytes.
    template <int BITS>
    static __m512i codes(const uint8_t* row, int64_t size, int64_t column) {
        const int64_t at = column / (8 / Fields<BITS>::WIDTH), rest = size - at;
        _mm_prefetch(reinterpret_cast<const char*>(row + at) + CODES_AHEAD, _MM_HINT_T0);
        return rest >= 64 ? _mm512_loadu_si512(row + at) : _mm512_maskz_loadu_epi8((1ull << rest) - 1, row + at);
    }

    // A byte of third bits in each word.
    static __m512i third_bits(const uint8_t* row, int64_t size, int64_t column) {
        const int64_t at = column / 8, rest = size - at;
        _mm_prefetch(reinterpret_cast<const char*>(row + at) + CODES_AHEAD, _MM_HINT_T0);
        const __mmask32 mask = rest >= 32 ? ~0u : (1u << rest) - 1;
        return _mm512_cvtepu8_epi16(_mm256_maskz_loadu_epi8(mask, row + at));
    }
};

}  // namespace

extern "C" {

void group_codes_gemv(const GroupCodes* matrices, const BiasAndLora* added, int64_t count, const bf16* x, bf16* out,
                      int64_t rows, int64_t threads) {
    multiply_few_rows<GroupOperands>(matrices, added, count, x, out, rows, threads);
}
}
