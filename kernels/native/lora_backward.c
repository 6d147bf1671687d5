/* Gradients through and of many adapters in one call.
 *
 * What is summed over rows (an adapter's own gradients) is added to what is there already, row after row in the order that the caller
 * gives: it does not depend on how the rows are divided among calls, only on their order.
 */
#define PIECE_ROWS 24 /* rows of a task: they share the matrices that it reads */

typedef struct {
    int64_t start, end, column, num_out, rank;
    int64_t low; /* first of its 2 x (end - start) x padded rank floats in the scratch space */
    float *a, *b, *da, *db; /* [rank][I] and [num_out][rank] */
    double scale;
} lora_gradient_t;

typedef struct {
    const void *dy, *x;
    void *dx;
    int64_t dy_stride, x_stride, dx_stride, num_in;
    const lora_gradient_t *segments;
    int64_t num_segments;
    int dy_half, x_half, dx_half;
} lora_backward_t;

/* Element (row, column) of sums, which may be the place of element (column, row) of `y`. */
INLINE float *place(float *y, int64_t y_stride, int64_t row, int64_t column, int transposed) {
    return transposed ? y + column * y_stride + row : y + row * y_stride + column;
}

INLINE int64_t padded16(int64_t n) { return num_panels(n) * PANEL; }

/* Columns [column, column + 16) of rows [i0, i1) of a matrix; those that it does not have are 0. */
INLINE void gather_panel(const float *w, int64_t num_columns, int64_t column, int64_t i0, int64_t i1, float *panel) {
    int64_t count = least(PANEL, num_columns - column);
    for (int64_t i = i0; i < i1; i++) {
        float *to = panel + (i - i0) * PANEL;
        const float *from = w + i * num_columns + column;
        if (count == PANEL) memcpy(to, from, PANEL * sizeof(float));
        else for (int64_t c = 0; c < PANEL; c++) to[c] = c < count ? from[c] : 0.0f;
    }
}

/* low = scale dy b, for rows [first, last) of a segment. */
static void low_of_outputs(const lora_backward_t *p, const lora_gradient_t *s, int64_t first, int64_t last, float *low, float *panel, float *wide) {
    int64_t width = padded16(s->rank), n = last - first;
    for (int64_t column = 0; column < width; column += PANEL) {
        float sums[PIECE_ROWS * PANEL] __attribute__((aligned(64))) = {0};
        for (int64_t i0 = 0; i0 < s->num_out; i0 += SLICE) {
            int64_t i1 = least(i0 + SLICE, s->num_out), stride = p->dy_half ? i1 - i0 : p->dy_stride;
            const void *from = at(p->dy, first * p->dy_stride + s->column + i0, p->dy_half);
            gather_panel(s->b, s->rank, column, i0, i1, panel);
            if (p->dy_half) widen_rows(from, p->dy_stride, wide, i1 - i0, n);
            const float *rows = p->dy_half ? wide : (const float *)from;
            for (int64_t r = 0; r < n; r += MAX_ROWS)
                block(rows + r * stride, stride, panel, SLICE * PANEL, i1 - i0, (int)least(MAX_ROWS, n - r), 1, sums + r * PANEL, 0);
        }
        for (int64_t r = 0; r < n; r++)
            for (int64_t c = 0; c < PANEL; c += LANES)
                *(v8_mem *)(low + (first - s->start + r) * width + column + c) = *(v8 *)(sums + r * PANEL + c) * splat((float)s->scale);
    }
}

/* low_x = scale x a^T, as the way forward makes it. */
static void low_of_inputs(const lora_backward_t *p, const lora_gradient_t *s, int64_t first, int64_t last, float *low_x) {
    lora_t forward = {.start = s->start, .end = s->end, .rank = s->rank, .a = s->a};
    int64_t width = padded8(s->rank);
    if (p->x_half) lora_down(&forward, p->x, p->x_stride, p->num_in, first, last, low_x, 1, 0);
    else lora_down(&forward, p->x, p->x_stride, p->num_in, first, last, low_x, 0, 0);
    for (int64_t i = (first - s->start) * width; i < (last - s->start) * width; i += LANES) *(v8_mem *)(low_x + i) *= splat((float)s->scale);
}

/* dx += low a, of all segments that rows [first, last) are in: their sum is rounded before it is added. */
static void add_to_inputs(const lora_backward_t *p, int64_t first, int64_t last, const float *lows, float *panel) {
    for (int64_t column = 0; column < p->num_in; column += PANEL) {
        float sums[PIECE_ROWS * PANEL] __attribute__((aligned(64))) = {0};
        for (const lora_gradient_t *s = p->segments; s < p->segments + p->num_segments; s++) {
            int64_t from = s->start > first ? s->start : first, to = least(s->end, last), width = padded16(s->rank);
            if (from >= to) continue;
            gather_panel(s->a, p->num_in, column, 0, s->rank, panel);
            for (int64_t r = from; r < to; r += MAX_ROWS)
                block(lows + s->low + (r - s->start) * width, width, panel, s->rank * PANEL, s->rank, (int)least(MAX_ROWS, to - r), 1,
                      sums + (r - first) * PANEL, 0);
        }
        for (int64_t r = first; r < last; r++)
            for (int64_t c = 0; c < PANEL && column + c < p->num_in; c += LANES) {
                int64_t i = r * p->dx_stride + column + c, left = p->num_in - column - c;
                v8 share = rounded(*(v8 *)(sums + (r - first) * PANEL + c), p->dx_half);
                if (left >= LANES) store(p->dx, i, load(p->dx, i, p->dx_half) + share, p->dx_half);
                else for (int64_t k = 0; k < left; k++) store1(p->dx, i + k, load1(p->dx, i + k, p->dx_half) + share[k], p->dx_half);
            }
    }
}

/* sums[rows][16] += the products of `rows` columns of low with 16 columns of w, row after row. */
INLINE void add_outer(const float *low, int64_t width, const void *w, int64_t w_stride, int64_t count, const int64_t *order, int64_t start,
                      int64_t num_rows, int rows, float *sums, int half) {
    v8 acc[MAX_ROWS][2];
#pragma GCC unroll 6
    for (int r = 0; r < rows; r++)
        for (int c = 0; c < 2; c++) acc[r][c] = *(v8 *)(sums + r * PANEL + c * LANES);
    for (int64_t i = 0; i < num_rows; i++) {
        const float *by = low + (order[i] - start) * width;
        int64_t from = order[i] * w_stride;
        v8 left, right;
        if (count == PANEL) {
            left = load(w, from, half);
            right = load(w, from + LANES, half);
        } else {
            float some[PANEL] __attribute__((aligned(32))) = {0};
            for (int64_t c = 0; c < count; c++) some[c] = load1(w, from + c, half);
            left = *(v8 *)some;
            right = *(v8 *)(some + LANES);
        }
#pragma GCC unroll 6
        for (int r = 0; r < rows; r++) {
            v8 held = splat(by[r]);
            acc[r][0] += held * left;
            acc[r][1] += held * right;
        }
    }
#pragma GCC unroll 6
    for (int r = 0; r < rows; r++)
        for (int c = 0; c < 2; c++) *(v8 *)(sums + r * PANEL + c * LANES) = acc[r][c];
}

INLINE void add_outer_of(const float *low, int64_t width, const void *w, int64_t w_stride, int64_t count, const int64_t *order,
                         int64_t start, int64_t num_rows, int rows, float *sums, int half) {
    switch (rows) {
    case 1: add_outer(low, width, w, w_stride, count, order, start, num_rows, 1, sums, half); break;
    case 2: add_outer(low, width, w, w_stride, count, order, start, num_rows, 2, sums, half); break;
    case 3: add_outer(low, width, w, w_stride, count, order, start, num_rows, 3, sums, half); break;
    case 4: add_outer(low, width, w, w_stride, count, order, start, num_rows, 4, sums, half); break;
    case 5: add_outer(low, width, w, w_stride, count, order, start, num_rows, 5, sums, half); break;
    case 6: add_outer(low, width, w, w_stride, count, order, start, num_rows, 6, sums, half); break;
    }
}

/* Columns [column, column + 16) of gradient [rank][num_out], or of its transpose, += low^T w over a segment's rows in `order`. */
static void add_gradient(const lora_gradient_t *s, float *gradient, int64_t stride, int transposed, const float *low, int64_t width,
                         const void *w, int64_t w_stride, int64_t column, int64_t num_out, const int64_t *order, float *sums, int half) {
    int64_t count = least(PANEL, num_out - column), blocks = (s->rank + MAX_ROWS - 1) / MAX_ROWS, n = s->end - s->start;
    for (int64_t r = 0; r < s->rank; r++)
        for (int64_t c = 0; c < PANEL; c++) sums[r * PANEL + c] = c < count ? *place(gradient, stride, r, column + c, transposed) : 0.0f;
    for (int64_t b = 0; b < blocks; b++) {
        int64_t first = block_start(b, blocks, s->rank);
        int rows = (int)(block_start(b + 1, blocks, s->rank) - first);
        const void *from = at(w, column, half);
        if (half) add_outer_of(low + first, width, from, w_stride, count, order, s->start, n, rows, sums + first * PANEL, 1);
        else add_outer_of(low + first, width, from, w_stride, count, order, s->start, n, rows, sums + first * PANEL, 0);
    }
    for (int64_t r = 0; r < s->rank; r++)
        for (int64_t c = 0; c < count; c++) *place(gradient, stride, r, column + c, transposed) = sums[r * PANEL + c];
}

/* Of every segment dx += scale (dy b) a, and in order da += scale (dy b)^T x, db += scale dy^T (x a^T); without dx, or without x, that
 * part is left out. `order` are the rows of the batch in the order in which sums over rows take them, each segment's at the places of
 * its rows. Returns 0, or -1 if there was no memory. */
int heddle_lora_backward(const lora_backward_t *p, const int64_t *order, int64_t num_rows, int64_t num_low, int64_t max_rank) {
    static __thread buffer_t low_buffer;
    float *lows = grown(&low_buffer, (size_t)num_low);
    int failed = !lows;
#pragma omp parallel if (num_rows > PIECE_ROWS)
    {
        float *sums = lows ? scratch((size_t)(max_rank + SLICE + SLICE / PANEL * PIECE_ROWS) * PANEL) : NULL;
        float *panel = sums + max_rank * PANEL, *wide = panel + SLICE * PANEL;
        if (!sums) {
#pragma omp atomic write
            failed = 1;
        }
#pragma omp for schedule(dynamic, 1)
        for (int64_t first = 0; first < num_rows; first += PIECE_ROWS) {
            int64_t last = least(first + PIECE_ROWS, num_rows);
            for (const lora_gradient_t *s = p->segments; sums && s < p->segments + p->num_segments; s++) {
                int64_t from = s->start > first ? s->start : first, to = least(s->end, last);
                if (from >= to) continue;
                low_of_outputs(p, s, from, to, lows + s->low, panel, wide);
                if (p->x) low_of_inputs(p, s, from, to, lows + s->low + (s->end - s->start) * padded16(s->rank));
            }
            if (sums && p->dx) add_to_inputs(p, first, last, lows, sums);
        }
        for (const lora_gradient_t *s = p->segments; p->x && s < p->segments + p->num_segments; s++) {
            int64_t inputs = num_panels(p->num_in), outputs = num_panels(s->num_out), width = padded16(s->rank);
            const float *low = lows + s->low, *low_x = low + (s->end - s->start) * width;
#pragma omp for schedule(dynamic, 4) nowait
            for (int64_t task = 0; task < inputs + outputs; task++) {
                if (!sums) continue;
                if (task < inputs)
                    add_gradient(s, s->da, p->num_in, 0, low, width, p->x, p->x_stride, task * PANEL, p->num_in, order + s->start, sums, p->x_half);
                else
                    add_gradient(s, s->db, s->rank, 1, low_x, padded8(s->rank), at(p->dy, s->column, p->dy_half), p->dy_stride,
                                 (task - inputs) * PANEL, s->num_out, order + s->start, sums, p->dy_half);
            }
        }
    }
    return failed ? -1 : 0;
}
