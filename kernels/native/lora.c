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
#define MAX_COLUMN_RANK 128  /* beyond, b is read as it lies */
#define LEAST_COLUMN_ROWS 8 /* rows of a task for which it pays to turn b round */

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
        for (int k = 0; k < count; k++) sums[k] = fmaf(load1(x, i, x_half), load1(w, k * stride + i, w_half), sums[k]);
    return sums;
}

/* The same products of two vectors with 4 rows each, x_stride and w_stride apart: lanes 4-7 are the second one's. */
INLINE v8 dot2x4(const void *x, int64_t x_stride, const void *w, int64_t stride, int64_t n, int x_half, int w_half) {
    v8 acc[8];
#pragma GCC unroll 8
    for (int k = 0; k < 8; k++) acc[k] = splat(0.0f);
    int64_t i = 0;
    for (; i + LANES <= n; i += LANES) {
        v8 first = load(x, i, x_half), second = load(x, x_stride + i, x_half);
#pragma GCC unroll 4
        for (int k = 0; k < 4; k++) {
            v8 held = load(w, k * stride + i, w_half);
            acc[k] += first * held;
            acc[4 + k] += second * held;
        }
    }
    v8 sums = sum_each(acc);
    for (; i < n; i++)
        for (int k = 0; k < 8; k++) sums[k] = fmaf(load1(x, k / 4 * x_stride + i, x_half), load1(w, k % 4 * stride + i, w_half), sums[k]);
    return sums;
}

INLINE void lora_down(const lora_t *s, const void *x, int64_t x_stride, int64_t num_in, int64_t first, int64_t last, float *low, int x_half,
                      int w_half) {
    int64_t width = padded8(s->rank), pairs = (last - first) / 2 * 2;
    low += s->low - s->start * width;
    for (int64_t k = 0; k < width; k += LANES) {
        int count = (int)(s->rank - k < LANES ? s->rank - k : LANES);
        int64_t r = first;
        for (int half_k = 0; count == LANES && half_k < LANES; half_k += 4)
            for (r = first; r < first + pairs; r += 2) {
                v8 sums = dot2x4(at(x, r * x_stride, x_half), x_stride, at(s->a, (k + half_k) * num_in, w_half), num_in, num_in, x_half, w_half);
                _mm_storeu_ps(low + r * width + k + half_k, _mm256_castps256_ps128((__m256)sums));
                _mm_storeu_ps(low + (r + 1) * width + k + half_k, _mm256_extractf128_ps((__m256)sums, 1));
            }
        for (; r < last; r++)
            *(v8_mem *)(low + r * width + k) =
                dot8(at(x, r * x_stride, x_half), at(s->a, k * num_in, w_half), num_in, num_in, count, x_half, w_half);
    }
}

INLINE void add_update(const lora_t *s, void *y, int64_t to, v8 sums, int count, int y_half) {
    float scale = (float)s->scale;
    if (count == LANES) store(y, to, fma8(splat(scale), sums, load(y, to, y_half)), y_half);
    else for (int k = 0; k < count; k++) store1(y, to + k, fmaf(scale, sums[k], load1(y, to + k, y_half)), y_half);
}

/* Products of lane `lane` of low's vectors with the columns of b, as dot8 adds them in that lane. */
#define LANE(lane, SUMS)                                                                                                             \
    v8 SUMS[ROWS_UP][2];                                                                                                             \
    _Pragma("GCC unroll 2") for (int r = 0; r < ROWS_UP; r++)                                                                        \
        _Pragma("GCC unroll 2") for (int c = 0; c < 2; c++) SUMS[r][c] = splat(0.0f);                                                \
    for (int64_t i = lane; i < vectors; i += LANES)                                                                                  \
        _Pragma("GCC unroll 2") for (int r = 0; r < ROWS_UP; r++) {                                                                  \
            v8 held = splat(low[r * width + i]);                                                                                     \
            _Pragma("GCC unroll 2") for (int c = 0; c < 2; c++) SUMS[r][c] += held * *(const v8 *)(b + i * PANEL + c * LANES);       \
        }
#define PAIR_OF_LANES(lane, SUMS)                                                                                                    \
    v8 SUMS[ROWS_UP][2];                                                                                                             \
    {                                                                                                                                \
        LANE(lane, one) LANE(lane + 1, two)                                                                                          \
        ADD_TILES(SUMS, one, two)                                                                                                    \
    }
#define FOUR_LANES(lane, SUMS)                                                                                                       \
    v8 SUMS[ROWS_UP][2];                                                                                                             \
    {                                                                                                                                \
        PAIR_OF_LANES(lane, left) PAIR_OF_LANES(lane + 2, right)                                                                     \
        ADD_TILES(SUMS, left, right)                                                                                                 \
    }
#define ADD_TILES(SUMS, ONE, TWO)                                                                                                    \
    _Pragma("GCC unroll 2") for (int r = 0; r < ROWS_UP; r++)                                                                        \
        _Pragma("GCC unroll 2") for (int c = 0; c < 2; c++) SUMS[r][c] = ONE[r][c] + TWO[r][c];
#define ROWS_UP 2

/* dot8 of ROWS_UP rows of low with 16 rows of b that lie as columns, [rank][16]: its lanes are summed in its order. */
INLINE void columns_up(const float *low, int64_t width, const float *b, int64_t rank, v8 sums[ROWS_UP][2]) {
    int64_t vectors = rank / LANES * LANES;
    FOUR_LANES(0, first) FOUR_LANES(4, second)
    ADD_TILES(sums, first, second)
    for (int64_t i = vectors; i < rank; i++)
        for (int r = 0; r < ROWS_UP; r++)
            for (int c = 0; c < 2; c++) sums[r][c] = fma8(splat(low[r * width + i]), *(const v8 *)(b + i * PANEL + c * LANES), sums[r][c]);
}

INLINE void lora_up(const lora_t *s, void *y, int64_t y_stride, int64_t first, int64_t last, int64_t o0, int64_t o1, const float *low,
                    int y_half, int w_half) {
    int64_t width = padded8(s->rank), rank = s->rank, o = o0, r;
    float columns[MAX_COLUMN_RANK * PANEL] __attribute__((aligned(32)));
    low += s->low - s->start * width;
    for (; last - first >= LEAST_COLUMN_ROWS && rank <= MAX_COLUMN_RANK && o + PANEL <= o1; o += PANEL) {
        for (int64_t j = 0; j < PANEL; j++)
            for (int64_t i = 0; i < rank; i++) columns[i * PANEL + j] = load1(s->b, (o + j) * rank + i, w_half);
        for (r = first; r + ROWS_UP <= last; r += ROWS_UP) {
            v8 sums[ROWS_UP][2];
            columns_up(low + r * width, width, columns, rank, sums);
            for (int k = 0; k < ROWS_UP; k++)
                for (int c = 0; c < 2; c++) add_update(s, y, (r + k) * y_stride + s->column + o + c * LANES, sums[k][c], LANES, y_half);
        }
        for (; r < last; r++)
            for (int c = 0; c < 2; c++)
                add_update(s, y, r * y_stride + s->column + o + c * LANES,
                           dot8(low + r * width, at(s->b, (o + c * LANES) * rank, w_half), rank, rank, LANES, 0, w_half), LANES, y_half);
    }
    for (; o < o1; o += LANES)
        for (r = first; r < last; r++) {
            int count = (int)(o1 - o < LANES ? o1 - o : LANES);
            add_update(s, y, r * y_stride + s->column + o, dot8(low + r * width, at(s->b, o * rank, w_half), rank, rank, count, 0, w_half),
                       count, y_half);
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
