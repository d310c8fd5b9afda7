"""Sizes, found by timing, at which one way of doing things on the CPU gives way to another."""

MIX_BLOCK_BYTES = 1 << 20  # a block of rows and its temporaries stay in the cache
LARGE_ROW_BYTES = 1 << 16  # such rows are mixed one by one, without temporaries
LOSS_BLOCK_BYTES = 1 << 21
JS_BLOCK_BYTES = 1 << 19  # of all sets
BINARY_BLOCK_BYTES = 1 << 19  # beside the block, its gradient and two buffers
SMALL_BATCH = 1 << 14  # elements: below it a few whole operations beat the set-up of a better one
SMALL_ROW_BYTES = 1 << 15  # boxes of smaller rows are cut by a mask, of larger ones row by row
