// Products with matrices of 4-bit codes.

#include "four_bit.h"
#include "packed_product.h"

struct FourBit : Packed {
    struct Unpacker {
        const Packed& w;
        int64_t n = w.n, k = w.k, block = WEIGHTS;
        __m512 codebook = _mm512_loadu_ps(w.codebook);

        __m512 common(int64_t row, int64_t column) const { return _mm512_set1_ps(w.scale(row, column)); }

        __m512i weights(__m512 scale, int64_t row, int64_t column) const {
            const auto* from = reinterpret_cast<const __m128i*>(w.codes + (row * k + column) / 2);
            const auto bytes = _mm512_cvtepu8_epi32(_mm_loadu_si128(from));
            const auto even = _mm512_permutexvar_ps(_mm512_srli_epi32(bytes, 4), codebook);
            const auto odd = _mm512_permutexvar_ps(bytes, codebook);  // an index is its lowest four bits
            return rounded_pairs(_mm512_mul_ps(even, scale), _mm512_mul_ps(odd, scale));
        }
    };

    template <class Use>
    void read(Use use) const {
        use(Unpacker{*this});
    }
};

extern "C" {

int64_t four_bit_product_workspace_bytes(const Term<FourBit>* terms, int64_t count, int64_t rows, bool transposed,
                                         int64_t threads) {
    return workspace_bytes(terms, count, rows, transposed, threads);
}

void four_bit_product(const Term<FourBit>* terms, int64_t count, int64_t rows, bool transposed, const float* bias, bf16* out,
                      char* memory, int64_t threads) {
    sum_of_products(terms, count, rows, transposed, bias, out, memory, threads);
}
}
