// Products with matrices of 2, 3 and 4-bit codes in groups.

#include "group_codes.h"
#include "packed_product.h"

extern "C" {

int64_t group_codes_product_workspace_bytes(const Term<GroupCodes>* terms, int64_t count, int64_t rows, bool transposed,
                                            int64_t threads) {
    return workspace_bytes(terms, count, rows, transposed, threads);
}

void group_codes_product(const Term<GroupCodes>* terms, int64_t count, int64_t rows, bool transposed, const float* bias,
                         bf16* out, char* memory, int64_t threads) {
    sum_of_products(terms, count, rows, transposed, bias, out, memory, threads);
}
}
