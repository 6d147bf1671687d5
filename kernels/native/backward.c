/* The way back through the decoder, as the other files are the way forward. Knows pointers, no torch.
 *
 * A row's gradient is a fixed sequence of operations on this row alone, as there. What is summed over rows (gradients of
 * adapters, of keys and values) is added to what is there already, row after row in the order that the caller gives: so it does not
 * depend on how the rows are divided among calls, only on their order.
 */
#define TILE_ROWS 240 /* rows that share a gathered panel */
#define DEPTH 2048   /* inputs of a tile of rows that stay in the L2 cache while panels stream by */

enum { PANEL_BUFFER, SUM_BUFFER, LOW_BUFFER, ORDERED_BUFFER, MATRIX_BUFFER, NUM_BUFFERS };

static float *buffer_of(int which, int64_t num_floats) { /* this thread's own; NULL if there is no memory */
    static __thread buffer_t buffers[NUM_BUFFERS];
    return grown(&buffers[which], (size_t)num_floats);
}

/* --- products with a matrix as it lies in memory ----------------------------------------------------------------------- */

typedef struct {
    const float *x; /* [num_rows][num_in], x_stride apart */
    int64_t x_stride;
    const void *w; /* rows of num_out, w_stride apart; row order[i] belongs to input i, row i without an order */
    int64_t w_stride;
    const int64_t *order;
    float *sums; /* [panels][num_rows][PANEL] */
    int64_t num_rows, num_in, num_out;
    int half;     /* of w */
    int in_order; /* products are added to `sums` one after another, not blocks of them */
} product_t;

INLINE void gather_panel(const product_t *p, int64_t column, float *wide, int64_t i0, int64_t i1, int half) {
    int64_t left = p->num_out - column;
    for (int64_t i = i0; i < i1; i++) {
        int64_t from = (p->order ? p->order[i] : i) * p->w_stride + column;
        float *to = wide + (i - i0) * PANEL;
        if (left >= PANEL)
            for (int c = 0; c < PANEL; c += LANES) *(v8 *)(to + c) = load(p->w, from + c, half);
        else
            for (int c = 0; c < PANEL; c++) to[c] = c < left ? load1(p->w, from + c, half) : 0.0f;
    }
}

INLINE void add_rows(const float *x, int64_t x_stride, const float *w, int64_t num_in, int rows, float *sums) {
    v8 acc[MAX_ROWS][2];
#pragma GCC unroll 6
    for (int r = 0; r < rows; r++)
        for (int c = 0; c < 2; c++) acc[r][c] = *(v8 *)(sums + r * PANEL + c * LANES);
    for (int64_t i = 0; i < num_in; i++) {
        v8 low = *(const v8 *)(w + i * PANEL), high = *(const v8 *)(w + i * PANEL + LANES);
#pragma GCC unroll 6
        for (int r = 0; r < rows; r++) {
            v8 xr = splat(x[r * x_stride + i]);
            acc[r][0] += xr * low;
            acc[r][1] += xr * high;
        }
    }
#pragma GCC unroll 6
    for (int r = 0; r < rows; r++)
        for (int c = 0; c < 2; c++) *(v8 *)(sums + r * PANEL + c * LANES) = acc[r][c];
}

/* sums[r][16] += x[r] w, input after input. */
static void add_in_order(const float *x, int64_t x_stride, const float *w, int64_t num_in, int rows, float *sums) {
    switch (rows) {
    case 1: add_rows(x, x_stride, w, num_in, 1, sums); break;
    case 2: add_rows(x, x_stride, w, num_in, 2, sums); break;
    case 3: add_rows(x, x_stride, w, num_in, 3, sums); break;
    case 4: add_rows(x, x_stride, w, num_in, 4, sums); break;
    case 5: add_rows(x, x_stride, w, num_in, 5, sums); break;
    case 6: add_rows(x, x_stride, w, num_in, 6, sums); break;
    }
}

INLINE int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

/* sums += x w. Returns 0, or -1 if there was no memory. */
static int add_product(const product_t *p) {
    int64_t panels = num_panels(p->num_out), tiles = (p->num_rows + TILE_ROWS - 1) / TILE_ROWS;
    int failed = 0;
#pragma omp parallel if (p->num_rows * p->num_in * panels >= MIN_PARALLEL)
    {
        float *wide = buffer_of(PANEL_BUFFER, SLICE * PANEL);
        if (!wide) {
#pragma omp atomic write
            failed = 1;
        }
        for (int64_t depth = 0; depth < p->num_in; depth += DEPTH) {
            int64_t end = least(depth + DEPTH, p->num_in);
#pragma omp for schedule(dynamic, 1)
            for (int64_t task = 0; task < tiles * panels; task++) {
                int64_t panel = task % panels, first = task / panels * TILE_ROWS, last = least(first + TILE_ROWS, p->num_rows);
                for (int64_t i0 = depth; i0 < end && wide; i0 += SLICE) {
                    int64_t i1 = least(i0 + SLICE, end);
                    if (p->half) gather_panel(p, panel * PANEL, wide, i0, i1, 1);
                    else gather_panel(p, panel * PANEL, wide, i0, i1, 0);
                    for (int64_t row = first; row < last; row += MAX_ROWS) {
                        int rows = (int)least(MAX_ROWS, last - row);
                        const float *x = p->x + row * p->x_stride + i0;
                        float *sums = p->sums + (panel * p->num_rows + row) * PANEL;
                        if (p->in_order) add_in_order(x, p->x_stride, wide, i1 - i0, rows, sums);
                        else block(x, p->x_stride, wide, SLICE * PANEL, i1 - i0, rows, 1, sums, 0);
                    }
                }
            }
        }
    }
    return failed ? -1 : 0;
}

/* Element (row, column) of sums, which may be the place of element (column, row) of `y`. */
INLINE float *place(float *y, int64_t y_stride, int64_t row, int64_t column, int transposed) {
    return transposed ? y + column * y_stride + row : y + row * y_stride + column;
}

typedef enum { READ, WRITE, ADD } move_t;

/* Between sums [panels][num_rows][PANEL] and a matrix [num_rows][num_out], or its transpose; `factor` is for what is written. */
static void move_sums(float *sums, int64_t num_rows, int64_t num_out, float *y, int64_t y_stride, int transposed, move_t how, float factor) {
#pragma omp parallel for schedule(static) if (num_rows * num_out >= MIN_PARALLEL)
    for (int64_t panel = 0; panel < num_panels(num_out); panel++)
        for (int64_t r = 0; r < num_rows; r++) {
            float *from = sums + (panel * num_rows + r) * PANEL;
            int64_t count = least(PANEL, num_out - panel * PANEL);
            for (int64_t c = 0; c < count; c++) {
                float *to = place(y, y_stride, r, panel * PANEL + c, transposed);
                if (how == READ) from[c] = *to;
                else *to = how == ADD ? *to + from[c] * factor : from[c] * factor;
            }
            for (int64_t c = count; c < PANEL && how == READ; c++) from[c] = 0.0f;
        }
}

static float *zero_sums(int64_t num_rows, int64_t num_out) {
    int64_t size = num_panels(num_out) * PANEL * num_rows;
    float *sums = buffer_of(SUM_BUFFER, size);
    if (sums) memset(sums, 0, (size_t)size * sizeof(float));
    return sums;
}

/* dx[T, I] = dy[T, O] weight[O, I]. Returns 0, or -1 if there was no memory. */
int heddle_linear_backward(const float *dy, int64_t dy_stride, const void *weight, float *dx, int64_t num_rows, int64_t num_out, int64_t num_in,
                           int half) {
    float *sums = zero_sums(num_rows, num_in);
    product_t p = {dy, dy_stride, weight, num_in, NULL, sums, num_rows, num_out, num_in, half, 0};
    if (!sums || add_product(&p)) return -1;
    move_sums(sums, num_rows, num_in, dx, num_in, 0, WRITE, 1.0f);
    return 0;
}

/* --- adapters ----------------------------------------------------------------------------------------------------------- */

typedef struct {
    int64_t start, end, column, num_out, rank;
    float *a, *b, *da, *db; /* [rank][I] and [num_out][rank] */
    double scale;
} lora_gradient_t;

/* gradient += low^T w over a segment's rows in `order`, which w has at their places in the batch and low counted from `start`. */
static int add_gradient(float *gradient, int64_t stride, int transposed, const float *low, int64_t rank, int64_t start, int64_t num_rows,
                        const float *w, int64_t w_stride, int64_t num_out, const int64_t *order) {
    float *ordered = buffer_of(ORDERED_BUFFER, rank * num_rows), *sums = zero_sums(rank, num_out);
    if (!ordered || !sums) return -1;
    for (int64_t i = 0; i < num_rows; i++)
        for (int64_t r = 0; r < rank; r++) ordered[r * num_rows + i] = low[(order[i] - start) * rank + r];
    move_sums(sums, rank, num_out, gradient, stride, transposed, READ, 1.0f);
    product_t p = {ordered, num_rows, w, w_stride, order, sums, rank, num_rows, num_out, 0, 1};
    if (add_product(&p)) return -1;
    move_sums(sums, rank, num_out, gradient, stride, transposed, WRITE, 1.0f);
    return 0;
}

/* One segment: dx += scale (dy b) a, and in order da += scale (dy b)^T x, db += scale dy^T (x a^T). */
static int lora_segment(const float *dy, int64_t dy_stride, const float *x, int64_t x_stride, float *dx, int64_t dx_stride, int64_t num_in,
                        const lora_gradient_t *s, const int64_t *order) {
    int64_t n = s->end - s->start, rank = s->rank;
    float *low = buffer_of(LOW_BUFFER, n * rank), *sums = zero_sums(n, rank);
    product_t down = {dy + s->start * dy_stride + s->column, dy_stride, s->b, rank, NULL, sums, n, s->num_out, rank, 0, 0};
    if (!low || !sums || add_product(&down)) return -1;
    move_sums(sums, n, rank, low, rank, 0, WRITE, (float)s->scale);
    if (dx) {
        sums = zero_sums(n, num_in);
        product_t up = {low, rank, s->a, num_in, NULL, sums, n, rank, num_in, 0, 0};
        if (!sums || add_product(&up)) return -1;
        move_sums(sums, n, num_in, dx + s->start * dx_stride, dx_stride, 0, ADD, 1.0f);
    }
    if (!x) return 0;
    order += s->start;
    if (add_gradient(s->da, num_in, 0, low, rank, s->start, n, x, x_stride, num_in, order)) return -1;
    float *transposed = buffer_of(MATRIX_BUFFER, num_in * rank);
    sums = zero_sums(n, rank);
    if (!transposed || !sums) return -1;
    for (int64_t r = 0; r < rank; r++)
        for (int64_t i = 0; i < num_in; i++) transposed[i * rank + r] = s->a[r * num_in + i];
    product_t again = {x + s->start * x_stride, x_stride, transposed, rank, NULL, sums, n, num_in, rank, 0, 0};
    if (add_product(&again)) return -1;
    move_sums(sums, n, rank, low, rank, 0, WRITE, (float)s->scale);
    return add_gradient(s->db, rank, 1, low, rank, s->start, n, dy + s->column, dy_stride, s->num_out, order);
}

/* Gradients through and of the adapters of a linear; without dx, or without x, that part is left out. `order` are the rows of the
 * batch in the order in which sums over rows take them, each segment's at the places of its rows. Returns 0, or -1 without memory. */
int heddle_lora_backward(const float *dy, int64_t dy_stride, const float *x, int64_t x_stride, float *dx, int64_t dx_stride, int64_t num_in,
                         const lora_gradient_t *segments, int64_t num_segments, const int64_t *order) {
    int status = 0;
    for (int64_t i = 0; i < num_segments && !status; i++)
        status = lora_segment(dy, dy_stride, x, x_stride, dx, dx_stride, num_in, segments + i, order);
    return status;
}

/* --- rows: norm, activation, loss ---------------------------------------------------------------------------------------- */

INLINE void norm_row_backward(const void *dy, const void *x, const void *weight, void *dx, int64_t num_hidden, float eps, int half) {
    v8 squares = splat(0.0f), products = splat(0.0f);
    for (int64_t i = 0; i < num_hidden; i += LANES) {
        v8 value = load(x, i, half);
        squares += value * value;
        products += load(dy, i, half) * load(weight, i, half) * value;
    }
    float inverse = 1.0f / sqrtf(total(squares) / (float)num_hidden + eps);
    float shared = inverse * inverse * inverse * (total(products) / (float)num_hidden);
    for (int64_t i = 0; i < num_hidden; i += LANES)
        store(dx, i, load(dy, i, half) * load(weight, i, half) * splat(inverse) - load(x, i, half) * splat(shared), half);
}

/* dx of y = weight * x / rms(x). H is a multiple of 8. */
void heddle_rms_norm_backward(const void *dy, const void *x, const void *weight, void *dx, int64_t num_rows, int64_t num_hidden, float eps,
                              int half) {
#pragma omp parallel for schedule(static) if (num_rows * num_hidden >= MIN_PARALLEL)
    for (int64_t r = 0; r < num_rows; r++) {
        int64_t row = r * num_hidden;
        if (half) norm_row_backward(at(dy, row, 1), at(x, row, 1), weight, at(dx, row, 1), num_hidden, eps, 1);
        else norm_row_backward(at(dy, row, 0), at(x, row, 0), weight, at(dx, row, 0), num_hidden, eps, 0);
    }
}

INLINE void silu_row_backward(const void *dy, const void *gate, const void *up, void *dgate, void *dup, int64_t num_inner, int half) {
    for (int64_t i = 0; i < num_inner; i += LANES) {
        v8 g = load(gate, i, half), d = load(dy, i, half), sigmoid = splat(1.0f) / (splat(1.0f) + exp8(-g));
        store(dgate, i, d * load(up, i, half) * (sigmoid * (splat(1.0f) + g * (splat(1.0f) - sigmoid))), half);
        store(dup, i, d * (g * sigmoid), half);
    }
}

/* The gradients of gate and up, side by side as they came, of y = silu(gate) * up. F is a multiple of 8. */
void heddle_silu_mul_backward(const void *dy, const void *gate_up, void *dgate_up, int64_t num_rows, int64_t num_inner, int half) {
#pragma omp parallel for schedule(static) if (num_rows * num_inner >= MIN_PARALLEL)
    for (int64_t r = 0; r < num_rows; r++) {
        int64_t gate = 2 * r * num_inner, up = gate + num_inner, row = r * num_inner;
        if (half) silu_row_backward(at(dy, row, 1), at(gate_up, gate, 1), at(gate_up, up, 1), at(dgate_up, gate, 1), at(dgate_up, up, 1), num_inner, 1);
        else silu_row_backward(at(dy, row, 0), at(gate_up, gate, 0), at(gate_up, up, 0), at(dgate_up, gate, 0), at(dgate_up, up, 0), num_inner, 0);
    }
}

/* loss = -log softmax(logits)[label] and whether the label is the first of the largest; with `makes_gradient` the logits of a row
 * become softmax - one-hot. */
static void loss_row(float *logits, int64_t num_words, int64_t label, float *loss, uint8_t *hit, int makes_gradient) {
    float highest = -INFINITY;
    int64_t first = -1, i;
    int is_number = 1;
    for (i = 0; i < num_words; i++) {
        is_number &= logits[i] == logits[i];
        if (logits[i] > highest) highest = logits[i], first = i;
    }
    float at_label = logits[label] - highest;
    double sum = 0.0;
    for (int64_t start = 0; start < num_words; start += SUM_BLOCK * LANES) {
        int64_t end = least(start + SUM_BLOCK * LANES, num_words);
        v8 part = splat(0.0f);
        for (i = start; i + LANES <= end; i += LANES) {
            v8 e = exp8(*(v8_mem *)(logits + i) - splat(highest));
            part += e;
            if (makes_gradient) *(v8_mem *)(logits + i) = e;
        }
        sum += total(part);
        for (; i < end; i++) {
            float e = exp8(splat(logits[i] - highest))[0];
            sum += e;
            if (makes_gradient) logits[i] = e;
        }
    }
    *loss = is_number ? (float)(log(sum) - at_label) : NAN;
    *hit = is_number && first == label;
    if (!makes_gradient) return;
    float inverse = is_number ? (float)(1.0 / sum) : NAN;
    for (i = 0; i < num_words; i++) logits[i] *= inverse;
    logits[label] -= 1.0f;
}

/* Per row of logits [n, V] its loss and hit; the logits become the gradient of the loss, if that is asked for. */
void heddle_losses(float *logits, const int64_t *labels, float *losses, uint8_t *hits, int64_t num_rows, int64_t num_words, int makes_gradient) {
#pragma omp parallel for schedule(dynamic, 1) if (num_rows * num_words >= MIN_PARALLEL)
    for (int64_t r = 0; r < num_rows; r++)
        loss_row(logits + r * num_words, num_words, labels[r], losses + r, hits + r, makes_gradient);
}
