/* Low-rank updates of many adapters in one call. */
typedef struct {
    int64_t start, end;       /* rows of the batch */
    int64_t column, num_out;  /* columns of y */
    int64_t rank;
    int64_t low;              /* first of its (end - start) x padded rank floats in the scratch space */
    const void *a, *b;        /* [R, I] and [O, R] */
    int64_t half;             /* of a and b */
    double scale;
} lora_t;

#define LORA_COLUMNS 512 /* columns of one task */

/* Products of one vector with 8 rows of a matrix, in a fixed order; rows beyond `count` give 0. */
INLINE v8 dot8(const void *x, const void *w, int64_t stride, int64_t n, int count, int x_half, int w_half) {
    v8 acc[8];
#pragma GCC unroll 8
    for (int k = 0; k < 8; k++) acc[k] = splat(0.0f);
    int64_t i = 0;
    if (count == 8) {
        for (; i + LANES <= n; i += LANES) {
            v8 value = load(x, i, x_half);
#pragma GCC unroll 8
            for (int k = 0; k < 8; k++) acc[k] += value * load(w, k * stride + i, w_half);
        }
    } else {
        for (; i + LANES <= n; i += LANES) {
            v8 value = load(x, i, x_half);
            for (int k = 0; k < count; k++) acc[k] += value * load(w, k * stride + i, w_half);
        }
    }
    v8 sums = sum_each(acc);
    for (; i < n; i++)
        for (int k = 0; k < count; k++) sums[k] += load1(x, i, x_half) * load1(w, k * stride + i, w_half);
    return sums;
}

INLINE void lora_down(const lora_t *s, const void *x, int64_t x_stride, int64_t num_in, int64_t first, int64_t last, float *low, int x_half,
                      int w_half) {
    int64_t width = padded8(s->rank);
    for (int64_t k = 0; k < width; k += LANES)
        for (int64_t r = first; r < last; r++) {
            int count = (int)(s->rank - k < LANES ? s->rank - k : LANES);
            *(v8_mem *)(low + s->low + (r - s->start) * width + k) =
                dot8(at(x, r * x_stride, x_half), at(s->a, k * num_in, w_half), num_in, num_in, count, x_half, w_half);
        }
}

INLINE void lora_up(const lora_t *s, void *y, int64_t y_stride, int64_t first, int64_t last, int64_t o0, int64_t o1, const float *low,
                    int y_half, int w_half) {
    int64_t width = padded8(s->rank);
    for (int64_t o = o0; o < o1; o += LANES)
        for (int64_t r = first; r < last; r++) {
            int count = (int)(o1 - o < LANES ? o1 - o : LANES);
            v8 update = splat((float)s->scale) *
                        dot8(low + s->low + (r - s->start) * width, at(s->b, o * s->rank, w_half), s->rank, s->rank, count, 0, w_half);
            int64_t to = r * y_stride + s->column + o;
            if (count == LANES) store(y, to, load(y, to, y_half) + update, y_half);
            else for (int k = 0; k < count; k++) store1(y, to + k, load1(y, to + k, y_half) + update[k], y_half);
        }
}

/* y[rows, columns] += scale * (x[rows] a^T) b^T for every segment. `tasks` [num_tasks][4]: segment, first row, last row, first
 * column of the update, or -1 in the tasks that multiply with a, which come first. Returns 0, or -1 if there was no memory. */
int heddle_lora(void *y, int64_t y_stride, const void *x, int64_t x_stride, int64_t num_in, const lora_t *segments, const int64_t *tasks,
                int64_t num_down, int64_t num_tasks, int64_t num_low, int half) {
    float *low = scratch((size_t)num_low);
    if (!low) return -1;
#pragma omp parallel if (num_tasks > 2)
    {
#pragma omp for schedule(dynamic, 1)
        for (int64_t t = 0; t < num_down; t++) {
            const lora_t *s = segments + tasks[4 * t];
            if (half && s->half) lora_down(s, x, x_stride, num_in, tasks[4 * t + 1], tasks[4 * t + 2], low, 1, 1);
            else if (half) lora_down(s, x, x_stride, num_in, tasks[4 * t + 1], tasks[4 * t + 2], low, 1, 0);
            else if (s->half) lora_down(s, x, x_stride, num_in, tasks[4 * t + 1], tasks[4 * t + 2], low, 0, 1);
            else lora_down(s, x, x_stride, num_in, tasks[4 * t + 1], tasks[4 * t + 2], low, 0, 0);
        }
#pragma omp for schedule(dynamic, 1)
        for (int64_t t = num_down; t < num_tasks; t++) {
            const lora_t *s = segments + tasks[4 * t];
            int64_t o0 = tasks[4 * t + 3], o1 = o0 + LORA_COLUMNS < s->num_out ? o0 + LORA_COLUMNS : s->num_out;
            if (half && s->half) lora_up(s, y, y_stride, tasks[4 * t + 1], tasks[4 * t + 2], o0, o1, low, 1, 1);
            else if (half) lora_up(s, y, y_stride, tasks[4 * t + 1], tasks[4 * t + 2], o0, o1, low, 1, 0);
            else if (s->half) lora_up(s, y, y_stride, tasks[4 * t + 1], tasks[4 * t + 2], o0, o1, low, 0, 1);
            else lora_up(s, y, y_stride, tasks[4 * t + 1], tasks[4 * t + 2], o0, o1, low, 0, 0);
        }
    }
    return 0;
}
