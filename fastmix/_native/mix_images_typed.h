/* mix_images to one dtype: included by mix_images.c. */
static void F(images_chunk)(void *arg, int64_t chunk) {
    const picturing *m = arg;
    int64_t last = fm_min((chunk + 1) * m->rows_per_chunk, m->rows);
    for (int64_t row = chunk * m->rows_per_chunk; row < last; row++) {
        int64_t partner = m->index ? m->index[row * m->index_stride] : row;
        float lam = m->lam ? m->lam[row * m->lam_stride] : 1, rest = 1 - lam;
        if (partner < 0 || partner >= m->rows) partner = row, lam = rest = NAN;
        int64_t corners[4];
        for (int64_t d = 0; d < 4; d++)
            corners[d] = m->boxes ? fm_min(fm_max(m->boxes[4 * row + d], 0), d % 2 ? m->width : m->height) : 0;
        if (isnan(lam) && isnan(rest)) corners[2] = 0; /* all of the row is NaN, inside its box too */
        for (int64_t c = 0; c < m->channels; c++)
            for (int64_t y = 0; y < m->height; y++) {
                int crosses = y >= corners[0] && y < corners[2] && corners[1] < corners[3];
                int64_t step = m->out_strides[3];
                T *out = (T *)m->out + row * m->out_strides[0] + c * m->out_strides[1] + y * m->out_strides[2];
                for (int64_t x = 0; x < m->width; x += FM_BLOCK) {
                    int64_t n = fm_min(FM_BLOCK, m->width - x);
                    float wide[FM_BLOCK], other[FM_BLOCK], weights[FM_BLOCK];
                    T block[FM_BLOCK], *to = step == 1 && !m->streams ? out + x : block;
                    float *own = place(to, wide);
                    read_moved(m, m->plan[0], row, row, c, y, x, n, own);
                    if (m->index) read_moved(m, m->plan[1], row, partner, c, y, x, n, other);
                    if (m->mask) {
                        read_mask(m, row, y, x, n, weights);
                        for (int64_t i = 0; i < n; i++) {
                            float w = weights[i], sum = fm_fma32(w, own[i], (1 - w) * other[i]);
                            sum = w == 0 ? other[i] : sum; /* what has weight 0 is not read: a block may be NaN */
                            own[i] = w == 1 ? own[i] : sum;
                        }
                        for (int64_t i = 0; isnan(lam) && i < n; i++) own[i] = lam;
                    } else if (m->index) {
                        for (int64_t i = 0; i < n; i++) own[i] = fm_fma32(own[i], lam, other[i] * rest);
                        int64_t from = crosses ? fm_max(corners[1] - x, 0) : n, end = crosses ? fm_min(corners[3] - x, n) : 0;
                        for (int64_t i = from; i < end; i++) own[i] = other[i];
                    }
                    stored(to, wide, n);
                    if (m->streams) fm_stream(out + x, block, (size_t)n * sizeof(T));
                    for (int64_t i = 0; step != 1 && i < n; i++) out[(x + i) * step] = block[i];
                }
            }
    }
    if (m->streams) fm_streamed();
}
