/* Gradients through and of many adapters in one call.
 *
 * What is summed over rows (an adapter's own gradients) is added to what is there already, row after row in the order that the caller
 * gives: it does not depend on how the rows are divided among calls, only on their order.
 */
#define PIECE_ROWS 24   /* rows of a task: they share the matrices that it reads */
#define STRIP 64        /* columns of a matrix that a task goes on with: whole tiles */
#define STRIPS_OF_ROWS 4 /* strips of sums that stay in the L1 cache */
#define SUMMED_ROWS 128 /* rows of a strip that stay in the L1 cache */

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

INLINE int64_t padded16(int64_t n) { return num_panels(n) * PANEL; }

/* c (+)= a b, where `count` products are summed SUM_BLOCK at a time. */
INLINE void multiply_blocks(const float *a, int64_t a_stride, const float *b, int64_t b_stride, int64_t count, int64_t rows, int64_t width,
                            float *c, int64_t c_stride, int goes_on) {
    for (int64_t i = 0; i < count; i += SUM_BLOCK)
        multiply_rows(a + i, a_stride, 0, b + i * b_stride, b_stride, least(SUM_BLOCK, count - i), rows, width, c, c_stride,
                      i || goes_on ? ADD_SUM : SET);
}

/* low = scale dy b, for rows [first, last) of a segment. */
static void low_of_outputs(const lora_backward_t *p, const lora_gradient_t *s, int64_t first, int64_t last, float *low, float *wide) {
    int64_t width = padded16(s->rank), n = last - first;
    low += (first - s->start) * width;
    memset(low, 0, (size_t)(n * width) * sizeof(float));
    for (int64_t i0 = 0; i0 < s->num_out; i0 += SLICE) {
        int64_t i1 = least(i0 + SLICE, s->num_out), stride = p->dy_half ? i1 - i0 : p->dy_stride;
        const void *from = at(p->dy, first * p->dy_stride + s->column + i0, p->dy_half);
        if (p->dy_half) widen_rows(from, p->dy_stride, wide, i1 - i0, n);
        multiply_blocks(p->dy_half ? wide : (const float *)from, stride, s->b + i0 * s->rank, s->rank, i1 - i0, n, s->rank, low, width, 1);
    }
    for (int64_t i = 0; i < n * width; i += WIDE) *(vec_mem *)(low + i) *= spread((float)s->scale);
}

/* low_x = scale x a^T, as the way forward makes it. */
static void low_of_inputs(const lora_backward_t *p, const lora_gradient_t *s, int64_t first, int64_t last, float *low_x) {
    lora_t forward = {.start = s->start, .end = s->end, .rank = s->rank, .a = s->a};
    int64_t width = padded(s->rank);
    if (p->x_half) lora_down(&forward, p->x, p->x_stride, p->num_in, first, last, low_x, 1, 0);
    else lora_down(&forward, p->x, p->x_stride, p->num_in, first, last, low_x, 0, 0);
    for (int64_t i = (first - s->start) * width; i < (last - s->start) * width; i += WIDE) *(vec_mem *)(low_x + i) *= spread((float)s->scale);
}

/* x += share, rounded before it is added. */
INLINE void add_share(void *x, int64_t to, const float *share, int64_t count, int half) {
    int64_t i = 0;
    for (; i + WIDE <= count; i += WIDE) put(x, to + i, get(x, to + i, half) + rounded_wide(get(share, i, 0), half), half);
    for (; i < count; i++) store1(x, to + i, load1(x, to + i, half) + rounded_wide(spread(share[i]), half)[0], half);
}

/* dx += low a, of all segments that rows [first, last) are in: their sum is rounded before it is added. `sums` has room for as many strips. */
static void add_to_inputs(const lora_backward_t *p, int64_t first, int64_t last, const float *lows, float *sums) {
    for (int64_t column = 0; column < p->num_in; column += STRIPS_OF_ROWS * STRIP) {
        int64_t count = least(STRIPS_OF_ROWS * STRIP, p->num_in - column);
        memset(sums, 0, (size_t)((last - first) * count) * sizeof(float));
        for (const lora_gradient_t *s = p->segments; s < p->segments + p->num_segments; s++) {
            int64_t from = s->start > first ? s->start : first, to = least(s->end, last), width = padded16(s->rank);
            if (from < to)
                multiply_blocks(lows + s->low + (from - s->start) * width, width, s->a + column, p->num_in, s->rank, to - from, count,
                                sums + (from - first) * count, count, 1);
        }
        for (int64_t r = first; r < last; r++) {
            if (p->dx_half) add_share(p->dx, r * p->dx_stride + column, sums + (r - first) * count, count, 1);
            else add_share(p->dx, r * p->dx_stride + column, sums + (r - first) * count, count, 0);
        }
    }
}

/* Columns [0, count) of rows of w in `order` as floats, `count` apart. */
INLINE void gather_strip(const void *w, int64_t w_stride, const int64_t *order, int64_t num_rows, int64_t count, float *strip, int half) {
    for (int64_t i = 0; i < num_rows; i++) {
        int64_t from = order[i] * w_stride, c = 0;
        for (; c + WIDE <= count; c += WIDE) *(vec_mem *)(strip + i * count + c) = get(w, from + c, half);
        for (; c < count; c++) strip[i * count + c] = load1(w, from + c, half);
    }
}

/* Columns [column, column + count) of gradient [rank][num_columns] += low^T w over a segment's rows in `order`, or of gradient
 * [num_columns][rank], if it is `transposed`. `strip` has room for SUMMED_ROWS rows of both. */
static void add_gradient(const lora_gradient_t *s, float *gradient, int64_t num_columns, int transposed, const float *low, int64_t width,
                         const void *w, int64_t w_stride, int64_t column, const int64_t *order, float *strip, int half) {
    int64_t count = least(STRIP, num_columns - column);
    float *lows = strip + SUMMED_ROWS * STRIP;
    for (int64_t i = 0; i < s->end - s->start; i += SUMMED_ROWS) {
        int64_t n = least(SUMMED_ROWS, s->end - s->start - i);
        if (half) gather_strip(at(w, column, 1), w_stride, order + i, n, count, strip, 1);
        else gather_strip(at(w, column, 0), w_stride, order + i, n, count, strip, 0);
        gather_strip(low - s->start * width, width, order + i, n, width, lows, 0);
        if (transposed) multiply_rows(strip, count, 1, lows, width, n, count, s->rank, gradient + column * s->rank, s->rank, GO_ON);
        else multiply_rows(lows, width, 1, strip, count, n, s->rank, count, gradient + column, num_columns, GO_ON);
    }
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
        int64_t of_rows = PIECE_ROWS * (SLICE > STRIPS_OF_ROWS * STRIP ? SLICE : STRIPS_OF_ROWS * STRIP);
        int64_t of_strips = SUMMED_ROWS * (STRIP + padded16(max_rank));
        float *room = lows ? scratch((size_t)(of_rows > of_strips ? of_rows : of_strips)) : NULL;
        if (!room) {
#pragma omp atomic write
            failed = 1;
        }
#pragma omp for schedule(dynamic, 1)
        for (int64_t first = 0; first < num_rows; first += PIECE_ROWS) {
            int64_t last = least(first + PIECE_ROWS, num_rows);
            for (const lora_gradient_t *s = p->segments; room && s < p->segments + p->num_segments; s++) {
                int64_t from = s->start > first ? s->start : first, to = least(s->end, last);
                if (from >= to) continue;
                low_of_outputs(p, s, from, to, lows + s->low, room);
                if (p->x) low_of_inputs(p, s, from, to, lows + s->low + (s->end - s->start) * padded16(s->rank));
            }
            if (room && p->dx) add_to_inputs(p, first, last, lows, room);
        }
        for (const lora_gradient_t *s = p->segments; p->x && s < p->segments + p->num_segments; s++) {
            int64_t inputs = (p->num_in + STRIP - 1) / STRIP, outputs = (s->num_out + STRIP - 1) / STRIP, width = padded16(s->rank);
            const float *low = lows + s->low, *low_x = low + (s->end - s->start) * width;
#pragma omp for schedule(dynamic, 1) nowait
            for (int64_t task = 0; task < inputs + outputs; task++) {
                if (!room) continue;
                if (task < inputs)
                    add_gradient(s, s->da, p->num_in, 0, low, width, p->x, p->x_stride, task * STRIP, order + s->start, room, p->x_half);
                else
                    add_gradient(s, s->db, s->num_out, 1, low_x, padded(s->rank), at(p->dy, s->column, p->dy_half), p->dy_stride,
                                 (task - inputs) * STRIP, order + s->start, room, p->dy_half);
            }
        }
    }
    return failed ? -1 : 0;
}
