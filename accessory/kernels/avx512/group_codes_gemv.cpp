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
constexpr size_t FIRST_CACHE = 24 << 10;  // bytes that x may take there

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
[[gnu::always_inline]] inline void each_field(Use use, std::integer_sequence<int, J...>) {
    (use(std::integral_constant<int, J>()), ...);
}
template <int BITS, class Use>
[[gnu::always_inline]] inline void each_field(Use use) {
    each_field<BITS>(use, std::make_integer_sequence<int, Fields<BITS>::COUNT>());
}

constexpr int SHARE = 4;  // rows of a matrix whose last columns make one vector of words, where these are so few

// x [rows, k] as matrices of one width and group need it, each group of rows for itself (see `for_each_group`).
struct Planes {
    static constexpr int MOST = 4;  // with 8, sums do not fit into registers
    int64_t bits, group, blocks, groups;
    // Whether SHARE rows share a vector: the last block of x is there for each of them.
    bool shared;
    // Of a group of rows: [blocks, 1 + fields, rows]; the first is what sums start from, minus those of base * x.
    std::vector<Lanes> x;
    // Of a group of rows: [groups / LANES, rows, LANES]: sums of x, zeros behind the last.
    std::vector<float> sums;

    Planes(const GroupCodes& w, const bf16* from, int64_t rows) : bits(w.bits), group(w.group) {
        if (bits == 4)
            lay<4>(w, from, rows);
        else
            lay<2>(w, from, rows);  // of 3 bits two are laid out so, and the third is added
    }

    bool suit(const GroupCodes& w) const { return (bits == 4) == (w.bits == 4) && group == w.group; }

    template <int BITS>
    void lay(const GroupCodes& w, const bf16* from, int64_t rows) {
        constexpr int64_t columns = Words<BITS>::COLUMNS, lane = Words<BITS>::PER_LANE;
        shared = w.k % columns != 0 && w.k % columns <= columns / SHARE;
        blocks = (w.k + columns - 1) / columns;
        groups = (w.groups() + LANES - 1) / LANES * LANES;
        x.resize(rows * blocks * (1 + Fields<BITS>::COUNT));
        sums.resize(rows * groups);
        for_each_group<MOST>(rows, [&](auto height, int64_t begin) {
            for (int64_t r = 0; r < height; r++)
                for (int64_t b = 0; b < blocks; b++) {
                    alignas(64) float of_lanes[LANES];
                    const int64_t column = b * columns;
                    Lanes* to = x.data() + (begin * blocks + b * height) * (1 + Fields<BITS>::COUNT) + r;
                    block<BITS>(from + (begin + r) * w.k + column, std::min(columns, w.k - column), to, height,
                                of_lanes);
                    if (b == blocks - 1 && shared) repeat<1 + Fields<BITS>::COUNT>(to, height);
                    for (int l = 0; l < LANES && column + l * lane < w.k; l++) {
                        const int64_t g = (column + l * lane) / group;
                        sums[begin * groups + (g / LANES * height + r) * LANES + g % LANES] += of_lanes[l];
                    }
                }
        });
    }

    template <int BITS>
    static void block(const bf16* from, int64_t there, Lanes* to, int64_t step, float* of_lanes) {
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
            to[(1 + j) * step].value = v[j];
            const auto base = (__m512bh)_mm512_xor_si512(Words<BITS>::template base<j>(), (__m512i)minus);
            begin = _mm512_dpbf16_ps(begin, base, plane);
            sum = _mm512_dpbf16_ps(sum, one, plane);
        });
        to->value = (__m512i)begin;
        _mm512_store_ps(of_lanes, sum);
    }

    // The first quarter's numbers in the others, too.
    template <int COUNT>
    static void repeat(Lanes* planes, int64_t step) {
        for (int j = 0; j < COUNT; j++) {
            auto& of = planes[j * step].value;
            of = _mm512_shuffle_i32x4(of, of, 0);
        }
    }
};

// W times ROWS rows of x from `row` on.
template <int BITS, int ROWS>
struct Product {
    using F = Fields<BITS>;
    static constexpr int64_t COLUMNS = Words<BITS>::COLUMNS, BLOCK = (1 + F::COUNT) * ROWS;

    const GroupCodes& w;
    const Planes& x;
    int64_t row;
    int64_t groups = w.groups(), code_bytes = w.code_bytes(), high_bytes = w.high_bytes();
    int64_t own = x.shared ? w.k / COLUMNS * COLUMNS : w.k;  // columns in vectors that rows do not share
    const Lanes* planes = x.x.data() + row * x.blocks * (1 + F::COUNT);
    __m128i shift = _mm_cvtsi64_si128(__builtin_ctzll(w.group));

    // See `multiply_few_rows`. Not inlined: the compiler does best with few registers in use around it.
    [[gnu::noinline]] void multiply(int64_t n, int64_t there, __m512 (*sums)[16]) const {
        // For four rows of W, four rows' sums do not fit into registers, but what is read of x serves twice as many.
        if (ROWS == 4 && x.blocks * BLOCK * sizeof(Lanes) <= FIRST_CACHE)
            for (int64_t at = 0; at < there; at += 2) multiply_own<2>(n + at, sums, at);
        else
            for (int64_t at = 0; at < there; at += 4) multiply_own<4>(n + at, sums, at);
        for (int64_t at = 0; at < there && x.shared; at += SHARE) add_shared(n + at, sums, at);
    }

    template <int N>
    [[gnu::always_inline]] void multiply_own(int64_t n, __m512 (*sums)[16], int64_t place) const {
        int64_t rows[N];
        for (int j = 0; j < N; j++) rows[j] = std::min(n + j, w.n - 1);
        const float* sums_of_x = x.sums.data() + row * x.groups;
        const Lanes* block = planes;
        __m512 sum[ROWS][N] = {};
        for (int64_t g = 0, column = 0; g < groups; g += LANES, sums_of_x += ROWS * LANES) {
            __m512 scales[N], zeros[N];
            read_statistics(rows, g, scales, zeros);
#pragma GCC unroll 4
            for (int r = 0; r < ROWS; r++)
#pragma GCC unroll 4
                for (int j = 0; j < N; j++)
                    sum[r][j] = _mm512_fnmadd_ps(zeros[j], _mm512_loadu_ps(sums_of_x + r * LANES), sum[r][j]);
            auto columns = columns_of_lanes();
            for (const int64_t end = std::min((g + LANES) * w.group, own); column < end; column += COLUMNS) {
                __m512i words[N], high[N] = {};
                read_words(rows, column, words, high);
                __m512 here[ROWS][N];
                multiply_words(words, high, block, here);
                block += BLOCK;
                const auto group = _mm512_srl_epi32(columns, shift);
                columns = _mm512_add_epi32(columns, _mm512_set1_epi32(COLUMNS));
#pragma GCC unroll 4
                for (int j = 0; j < N; j++) {
                    const auto scale = _mm512_permutexvar_ps(group, scales[j]);
#pragma GCC unroll 4
                    for (int r = 0; r < ROWS; r++) sum[r][j] = _mm512_fmadd_ps(here[r][j], scale, sum[r][j]);
                }
            }
        }
#pragma GCC unroll 4
        for (int r = 0; r < ROWS; r++)
#pragma GCC unroll 4
            for (int j = 0; j < N; j++) sums[r][place + j] = sum[r][j];
    }

    // Adds the products of the last columns of SHARE rows.
    [[gnu::always_inline]] void add_shared(int64_t n, __m512 (*sums)[16], int64_t place) const {
        const int64_t g = own >> _mm_cvtsi128_si64(shift);
        const auto mask = first(groups - g);
        const auto group = _mm512_srl_epi32(
            _mm512_add_epi32(columns_of_lanes(), _mm512_set1_epi32(own & (w.group - 1))), shift);
        __m512i words[1] = {}, high[1] = {};
        __m512 scales[SHARE];
#pragma GCC unroll 4
        for (int j = 0; j < SHARE; j++) {
            const int64_t at = std::min(n + j, w.n - 1);
            words[0] = with_codes(words[0], j, at);
            if constexpr (BITS == 3) high[0] = with_third_bits(high[0], j, at);
            scales[j] = _mm512_permutexvar_ps(group, w.statistics(w.scales, at * groups + g, mask));
        }
        __m512 here[ROWS][1];
        multiply_words(words, high, planes + (x.blocks - 1) * BLOCK, here);
        constexpr int64_t lanes = LANES / SHARE;
#pragma GCC unroll 4
        for (int j = 0; j < SHARE; j++) {
            const auto from = _mm512_add_epi32(lane_numbers(), _mm512_set1_epi32(j * lanes));
#pragma GCC unroll 4
            for (int r = 0; r < ROWS; r++) {
                const auto mine = _mm512_maskz_permutexvar_ps(first(lanes), from, here[r][0]);
                sums[r][place + j] = _mm512_fmadd_ps(mine, scales[j], sums[r][place + j]);
            }
        }
    }

    // Lanes' sums of N rows' words times a block of x.
    template <int N>
    [[gnu::always_inline]] static void multiply_words(const __m512i (&words)[N], const __m512i (&high)[N],
                                                      const Lanes* block, __m512 (&sums)[ROWS][N]) {
#pragma GCC unroll 4
        for (int r = 0; r < ROWS; r++)
#pragma GCC unroll 4
            for (int j = 0; j < N; j++) sums[r][j] = (__m512)block[r].value;
        each_field<BITS>([&](auto field) __attribute__((always_inline)) {
            __m512bh weights[N];
#pragma GCC unroll 4
            for (int j = 0; j < N; j++) weights[j] = Words<BITS>::template plane<field>(words[j], high[j]);
#pragma GCC unroll 4
            for (int r = 0; r < ROWS; r++) {
                const auto numbers = (__m512bh)block[(1 + field) * ROWS + r].value;
#pragma GCC unroll 4
                for (int j = 0; j < N; j++) sums[r][j] = _mm512_dpbf16_ps(sums[r][j], weights[j], numbers);
            }
        });
    }

    static __m512i lane_numbers() { return _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15); }

    // The first of each lane's columns in a block.
    static __m512i columns_of_lanes() {
        return _mm512_mullo_epi32(lane_numbers(), _mm512_set1_epi32(Words<BITS>::PER_LANE));
    }

    // Scales and zeros of N rows from group g on, zero behind the last.
    template <int N>
    [[gnu::always_inline]] void read_statistics(const int64_t (&rows)[N], int64_t g, __m512 (&scales)[N],
                                                __m512 (&zeros)[N]) const {
        const auto mask = first(groups - g);
        if (!w.wide && !w.points) {
            const auto *of_scales = static_cast<const uint16_t*>(w.scales) + g,
                       *of_zeros = static_cast<const uint16_t*>(w.zeros) + g;
#pragma GCC unroll 4
            for (int j = 0; j < N; j++) {
                const int64_t at = rows[j] * groups;
                ask(of_scales + at, STATISTICS_AHEAD);
                ask(of_zeros + at, STATISTICS_AHEAD);
                scales[j] = _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(mask, of_scales + at));
                zeros[j] = _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(mask, of_zeros + at));
            }
            return;
        }
        for (int j = 0; j < N; j++) {
            const int64_t at = rows[j] * groups + g;
            scales[j] = w.statistics(w.scales, at, mask);
            ask(static_cast<const char*>(w.scales) + at * (w.wide ? 4 : 2), STATISTICS_AHEAD);
            if (w.points) {
                zeros[j] = _mm512_mul_ps(w.point(at, mask), scales[j]);
                ask(w.points + at, STATISTICS_AHEAD / 2);
            } else {
                zeros[j] = w.statistics(w.zeros, at, mask);
                ask(static_cast<const char*>(w.zeros) + at * (w.wide ? 4 : 2), STATISTICS_AHEAD);
            }
        }
    }

    // N rows' words from a column on, and a byte of third bits for each; zeros behind the rows' bytes.
    template <int N>
    [[gnu::always_inline]] void read_words(const int64_t (&rows)[N], int64_t column, __m512i (&words)[N],
                                           __m512i (&high)[N]) const {
        const int64_t at = column * F::WIDTH >> 3, rest = code_bytes - at;
#pragma GCC unroll 4
        for (int j = 0; j < N; j++) {
            const uint8_t* from = w.codes + rows[j] * code_bytes + at;
            ask(from, CODES_AHEAD);
            words[j] = rest >= 64 ? _mm512_loadu_si512(from) : _mm512_maskz_loadu_epi8((1ull << rest) - 1, from);
        }
        if constexpr (BITS == 3) {
            const int64_t at = column >> 3, rest = high_bytes - at;
            const __mmask32 mask = rest >= 32 ? ~0u : (1u << rest) - 1;
#pragma GCC unroll 4
            for (int j = 0; j < N; j++) {
                const uint8_t* from = w.high + rows[j] * high_bytes + at;
                ask(from, CODES_AHEAD);
                high[j] = _mm512_cvtepu8_epi16(_mm256_maskz_loadu_epi8(mask, from));
            }
        }
    }

    // Inlined early: otherwise the compiler finds that it changes nothing, and drops it.
    [[gnu::always_inline]] static void ask(const void* from, int64_t ahead) {
        _mm_prefetch(static_cast<const char*>(from) + ahead, _MM_HINT_T0);
    }

    // `words` with the last codes of a row as part j of SHARE.
    [[gnu::always_inline]] __m512i with_codes(__m512i words, int j, int64_t of) const {
        const int64_t at = own * F::WIDTH >> 3;
        const uint8_t* from = w.codes + of * code_bytes + at;
        ask(from, CODES_AHEAD);
        return with_part(words, j, _mm_maskz_loadu_epi8((1u << (code_bytes - at)) - 1, from));
    }

    [[gnu::always_inline]] __m512i with_third_bits(__m512i high, int j, int64_t of) const {
        const uint8_t* from = w.high + of * high_bytes + (own >> 3);
        ask(from, CODES_AHEAD);
        const auto bytes = _mm_maskz_loadu_epi8((1u << (high_bytes - (own >> 3))) - 1, from);
        return with_part(high, j, _mm_cvtepu8_epi16(bytes));
    }

    static __m512i with_part(__m512i whole, int j, __m128i part) {
        return _mm512_mask_broadcast_i32x4(whole, 0xF << 4 * j, part);
    }
};

struct GroupOperands {
    static constexpr int MOST = Planes::MOST;

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

    template <int ROWS>
    void multiply(int64_t i, int64_t n, int64_t there, int64_t row, __m512 (*sums)[16]) const {
        const GroupCodes w = matrices[i];  // a copy, which no store can change
        if (w.bits == 2)
            Product<2, ROWS>{w, *of[i], row}.multiply(n, there, sums);
        else if (w.bits == 3)
            Product<3, ROWS>{w, *of[i], row}.multiply(n, there, sums);
        else
            Product<4, ROWS>{w, *of[i], row}.multiply(n, there, sums);
    }
};

}  // namespace

extern "C" {

void group_codes_gemv(const GroupCodes* matrices, const BiasAndLora* added, int64_t count, const bf16* x, bf16* out,
                      int64_t rows, int64_t threads) {
    multiply_few_rows<GroupOperands>(matrices, added, count, x, out, rows, threads);
}
}
