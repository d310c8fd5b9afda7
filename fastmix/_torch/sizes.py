"""Sizes, found by timing, at which the CPU changes from one way to another, or cuts its blocks. Tests set them."""

MIX_BLOCK_BYTES = 1 << 20  # a block of rows and its temporaries stay in the cache
LARGE_ROW_BYTES = 1 << 16  # from here rows are mixed one by one, without temporaries
LOSS_BLOCK_BYTES = 1 << 21
JS_BLOCK_BYTES = 1 << 19  # of all sets
BINARY_BLOCK_BYTES = 1 << 19  # beside the block, its gradient and two buffers
SMALL_BATCH = 1 << 14  # elements: up to here a few operations on the whole batch are faster than blocks
SMALL_ROW_BYTES = 1 << 15  # boxes of smaller rows are filled by a mask, of larger ones row by row
