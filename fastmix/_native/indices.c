/* Whether indices of classes, rows or blocks are such. */
#include "common.h"

/* Returns whether an index, other than one to ignore, lies outside [0, stop). */
FASTMIX_EXPORT int32_t fm_out_of_range(const int64_t *index, int64_t count, int64_t stop, int64_t ignored) {
    int64_t wrong = 0;
    for (int64_t i = 0; i < count; i++) wrong |= ((uint64_t)index[i] >= (uint64_t)stop) & (index[i] != ignored);
    return wrong != 0;
}
