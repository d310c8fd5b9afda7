/* Large pages for a large new result: the system then fills it page by page in 2 MiB, not in 4 KiB. */
#include "common.h"

#if defined(__linux__)
#include <sys/mman.h>
#endif

/* Asks for large pages for what of [start, start + bytes) they fit in. What the system does not have stays as it is. */
FASTMIX_EXPORT void fm_large_pages(void *start, int64_t bytes) {
#if defined(MADV_HUGEPAGE)
    const uintptr_t page = (uintptr_t)1 << 21;
    uintptr_t first = ((uintptr_t)start + page - 1) & -page, last = ((uintptr_t)start + (uintptr_t)bytes) & -page;
    if (first < last) madvise((void *)first, last - first, MADV_HUGEPAGE);
#else
    (void)start, (void)bytes;
#endif
}
