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

#define LORA_COLUMNS 512    /* columns of one task */
#define UP_ROWS 64          /* rows of a task whose sums stay in the L1 cache */
#define MAX_COLUMN_RANK 128 /* beyond, b is read as it lies */
#define LEAST_COLUMN_ROWS 8 /* rows of a task for which it pays to turn b round */

/* Products of one vector with WIDE rows of a matrix, in a fixed order; rows beyond `count` give 0. */
INLINE vec dot_rows(const void *x, const void *w, int64_t stride, int64_t n, int count, int x_half, int w_half) {
    vec acc[WIDE];
#pragma GCC unroll 16
    for (int k = 0; k < WIDE; k++) acc[k] = spread(0.0f);
    int64_t i = 0;
    for (; i + WIDE <= n; i += WIDE) {
        vec value = get(x, i, x_half);
#pragma GCC unroll 16
        for (int k = 0; k < WIDE; k++)
            if (k < count) acc[k] += value * get(w, k * stride + i, w_half);
    }
    vec sums = sum_each(acc);
    for (; i < n; i++)
        for (int k = 0; k < count; k++) sums[k] = fmaf(load1(x, i, x_half), load1(w, k * stride + i, w_half), sums[k]);
    return sums;
}

INLINE vec dot(const void *x, const void *w, int64_t stride, int64_t n, int count, int x_half, int w_half) {
    if (count == WIDE) return dot_rows(x, w, stride, n, WIDE, x_half, w_half);
    if (count == WIDE / 2) return dot_rows(x, w, stride, n, WIDE / 2, x_half, w_half);
    return dot_rows(x, w, stride, n, count, x_half, w_half);
}

/* The same products of two vectors with WIDE / 2 rows each, x_stride and w_stride apart: the upper lanes are the second one's. */
INLINE vec dot_pair(const void *x, int64_t x_stride, const void *w, int64_t stride, int64_t n, int x_half, int w_half) {
    vec acc[WIDE];
#pragma GCC unroll 16
    for (int k = 0; k < WIDE; k++) acc[k] = spread(0.0f);
    int64_t i = 0;
    for (; i + WIDE <= n; i += WIDE) {
        vec first = get(x, i, x_half), second = get(x, x_stride + i, x_half);
#pragma GCC unroll 8
        for (int k = 0; k < WIDE / 2; k++) {
            vec held = get(w, k * stride + i, w_half);
            acc[k] += first * held;
            acc[WIDE / 2 + k] += second * held;
        }
    }
    vec sums = sum_each(acc);
    for (; i < n; i++)
        for (int k = 0; k < WIDE; k++)
            sums[k] = fmaf(load1(x, k / (WIDE / 2) * x_stride + i, x_half), load1(w, k % (WIDE / 2) * stride + i, w_half), sums[k]);
    return sums;
}

INLINE void lora_down(const lora_t *s, const void *x, int64_t x_stride, int64_t num_in, int64_t first, int64_t last, float *low, int x_half,
                      int w_half) {
    int64_t width = padded(s->rank), pairs = (last - first) / 2 * 2;
    low += s->low - s->start * width;
    for (int64_t k = 0; k < width; k += WIDE) {
        int count = (int)(s->rank - k < WIDE ? s->rank - k : WIDE);
        int64_t r = first;
        for (int half_k = 0; count % (WIDE / 2) == 0 && half_k < count; half_k += WIDE / 2)
            for (r = first; r < first + pairs; r += 2) {
                vec both = dot_pair(at(x, r * x_stride, x_half), x_stride, at(s->a, (k + half_k) * num_in, w_half), num_in, num_in, x_half, w_half);
                for (int one = 0; one < 2; one++) {
                    float *to = low + (r + one) * width + k + half_k;
                    memcpy(to, (const float *)&both + one * (WIDE / 2), sizeof(both) / 2);
                    if (count < WIDE) memset(to + WIDE / 2, 0, sizeof(both) / 2);
                }
            }
        for (; r < last; r++)
            *(vec_mem *)(low + r * width + k) =
                dot(at(x, r * x_stride, x_half), at(s->a, k * num_in, w_half), num_in, num_in, count, x_half, w_half);
    }
}

#if WIDE == 16
#define UP_COLUMNS 64 /* outputs of whole tiles */
#define UP_RANK 64    /* of as many products at a time are the columns turned round */

/* y += scale low b^T: product after product of the rank, whatever the number of rows. */
INLINE void lora_up(const lora_t *s, void *y, int64_t y_stride, int64_t first, int64_t last, int64_t o0, int64_t o1, const float *low,
                    int y_half, int w_half) {
    int64_t width = padded(s->rank);
    float columns[UP_RANK * UP_COLUMNS] __attribute__((aligned(64))), sums[UP_ROWS * UP_COLUMNS] __attribute__((aligned(64)));
    for (int64_t o = o0; o < o1; o += UP_COLUMNS) {
        int64_t end = o + UP_COLUMNS < o1 ? o + UP_COLUMNS : o1;
        for (int64_t row = first; row < last; row += UP_ROWS) {
            int64_t rows = last - row < UP_ROWS ? last - row : UP_ROWS;
            for (int64_t i = 0; i < s->rank; i += UP_RANK) {
                int64_t count = s->rank - i < UP_RANK ? s->rank - i : UP_RANK;
                for (int64_t c = 0; c < end - o && (row == first || s->rank > UP_RANK); c += WIDE)
                    turn_round(s->b, (o + c) * s->rank + i, s->rank, end - o - c, count, columns + c, UP_COLUMNS, w_half);
                multiply_rows(low + s->low + (row - s->start) * width + i, width, 0, columns, UP_COLUMNS, count, rows, end - o, sums, UP_COLUMNS,
                              i ? GO_ON : SET);
            }
            for (int64_t r = 0; r < rows; r++)
                for (int64_t c = 0; c < end - o; c += WIDE) {
                    int64_t at_row = (row + r) * y_stride + s->column + o, to = at_row + c, stop = at_row + end - o;
                    vec sum = *(vec *)(sums + r * UP_COLUMNS + c);
                    put_some(y, to, stop, fma_wide(spread((float)s->scale), sum, get_some(y, to, stop, y_half)), y_half);
                }
        }
    }
}
#else
INLINE void add_update(const lora_t *s, void *y, int64_t to, vec sums, int count, int y_half) {
    float scale = (float)s->scale;
    if (count == WIDE) put(y, to, fma_wide(spread(scale), sums, get(y, to, y_half)), y_half);
    else for (int k = 0; k < count; k++) store1(y, to + k, fmaf(scale, sums[k], load1(y, to + k, y_half)), y_half);
}

/* Products of lane `lane` of low's vectors with the columns of b, as dot adds them in that lane. */
#define LANE(lane, SUMS)                                                                                                             \
    vec SUMS[ROWS_UP][2];                                                                                                             \
    _Pragma("GCC unroll 2") for (int r = 0; r < ROWS_UP; r++)                                                                        \
        _Pragma("GCC unroll 2") for (int c = 0; c < 2; c++) SUMS[r][c] = spread(0.0f);                                                \
    for (int64_t i = lane; i < vectors; i += WIDE)                                                                                  \
        _Pragma("GCC unroll 2") for (int r = 0; r < ROWS_UP; r++) {                                                                  \
            vec held = spread(low[r * width + i]);                                                                                     \
            _Pragma("GCC unroll 2") for (int c = 0; c < 2; c++) SUMS[r][c] += held * *(const vec *)(b + i * PANEL + c * WIDE);       \
        }
#define PAIR_OF_WIDE(lane, SUMS)                                                                                                    \
    vec SUMS[ROWS_UP][2];                                                                                                             \
    {                                                                                                                                \
        LANE(lane, one) LANE(lane + 1, two)                                                                                          \
        ADD_TILES(SUMS, one, two)                                                                                                    \
    }
#define FOUR_WIDE(lane, SUMS)                                                                                                       \
    vec SUMS[ROWS_UP][2];                                                                                                             \
    {                                                                                                                                \
        PAIR_OF_WIDE(lane, left) PAIR_OF_WIDE(lane + 2, right)                                                                     \
        ADD_TILES(SUMS, left, right)                                                                                                 \
    }
#define ADD_TILES(SUMS, ONE, TWO)                                                                                                    \
    _Pragma("GCC unroll 2") for (int r = 0; r < ROWS_UP; r++)                                                                        \
        _Pragma("GCC unroll 2") for (int c = 0; c < 2; c++) SUMS[r][c] = ONE[r][c] + TWO[r][c];
#define ROWS_UP 2

/* dot of ROWS_UP rows of low with 16 rows of b that lie as columns, [rank][16]: its lanes are summed in its order. */
INLINE void columns_up(const float *low, int64_t width, const float *b, int64_t rank, vec sums[ROWS_UP][2]) {
    int64_t vectors = rank / WIDE * WIDE;
    FOUR_WIDE(0, first) FOUR_WIDE(4, second)
    ADD_TILES(sums, first, second)
    for (int64_t i = vectors; i < rank; i++)
        for (int r = 0; r < ROWS_UP; r++)
            for (int c = 0; c < 2; c++) sums[r][c] = fma_wide(spread(low[r * width + i]), *(const vec *)(b + i * PANEL + c * WIDE), sums[r][c]);
}

INLINE void lora_up(const lora_t *s, void *y, int64_t y_stride, int64_t first, int64_t last, int64_t o0, int64_t o1, const float *low,
                    int y_half, int w_half) {
    int64_t width = padded(s->rank), rank = s->rank, o = o0, r;
    float columns[MAX_COLUMN_RANK * PANEL] __attribute__((aligned(32)));
    low += s->low - s->start * width;
    for (; last - first >= LEAST_COLUMN_ROWS && rank <= MAX_COLUMN_RANK && o + PANEL <= o1; o += PANEL) {
        for (int64_t j = 0; j < PANEL; j++)
            for (int64_t i = 0; i < rank; i++) columns[i * PANEL + j] = load1(s->b, (o + j) * rank + i, w_half);
        for (r = first; r + ROWS_UP <= last; r += ROWS_UP) {
            vec sums[ROWS_UP][2];
            columns_up(low + r * width, width, columns, rank, sums);
            for (int k = 0; k < ROWS_UP; k++)
                for (int c = 0; c < 2; c++) add_update(s, y, (r + k) * y_stride + s->column + o + c * WIDE, sums[k][c], WIDE, y_half);
        }
        for (; r < last; r++)
            for (int c = 0; c < 2; c++)
                add_update(s, y, r * y_stride + s->column + o + c * WIDE,
                           dot(low + r * width, at(s->b, (o + c * WIDE) * rank, w_half), rank, rank, WIDE, 0, w_half), WIDE, y_half);
    }
    for (; o < o1; o += WIDE)
        for (r = first; r < last; r++) {
            int count = (int)(o1 - o < WIDE ? o1 - o : WIDE);
            add_update(s, y, r * y_stride + s->column + o, dot(low + r * width, at(s->b, o * rank, w_half), rank, rank, count, 0, w_half),
                       count, y_half);
        }
}
#endif

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
