/* Small products of float matrices: c [rows][width] (+)= a b, with b [count][width]. Knows no operation. */
#define MANY_ROWS (2 * MAX_ROWS) /* of a tile of one vector, where there are 32 registers */
#define TILE_VECTORS (WIDE / 4) /* vectors of a row of a tile: 6 x 2 sums fill the 16 registers of AVX2, 6 x 4 the 32 of AVX-512 */

typedef enum { SET, ADD_SUM, GO_ON } product_mode_t; /* c = sum, c += sum, or c goes on product after product */

/* Vector v of a row of `vectors`, of which the last has only the lanes `last` unless they are whole. */
INLINE vec get_part(const float *p, int v, int vectors, int is_whole, mask_t last) {
    return is_whole || v + 1 < vectors ? get(p, v * WIDE, 0) : get_lanes(p + v * WIDE, last);
}

/* Element (r, k) of a is at r * a_stride + k, or at r + k * a_stride if it is `transposed`. */
INLINE void multiply_tile(const float *a, int64_t a_stride, int transposed, const float *b, int64_t b_stride, int64_t count, int rows,
                          int vectors, int is_whole, mask_t last, float *c, int64_t c_stride, product_mode_t mode) {
    vec acc[MANY_ROWS][TILE_VECTORS];
#pragma GCC unroll 12
    for (int r = 0; r < rows; r++)
#pragma GCC unroll 4
        for (int v = 0; v < vectors; v++)
            acc[r][v] = mode == GO_ON ? get_part(c + r * c_stride, v, vectors, is_whole, last) : spread(0.0f);
#pragma GCC unroll 4
    for (int64_t k = 0; k < count; k++) {
        vec held[TILE_VECTORS];
#pragma GCC unroll 4
        for (int v = 0; v < vectors; v++) held[v] = get_part(b + k * b_stride, v, vectors, is_whole, last);
#pragma GCC unroll 12
        for (int r = 0; r < rows; r++) {
            vec ar = spread(transposed ? a[r + k * a_stride] : a[r * a_stride + k]);
#pragma GCC unroll 4
            for (int v = 0; v < vectors; v++) acc[r][v] += ar * held[v];
        }
    }
#pragma GCC unroll 12
    for (int r = 0; r < rows; r++)
#pragma GCC unroll 4
        for (int v = 0; v < vectors; v++) {
            float *to = c + r * c_stride + v * WIDE;
            vec sum = mode == ADD_SUM ? get_part(c + r * c_stride, v, vectors, is_whole, last) + acc[r][v] : acc[r][v];
            if (is_whole || v + 1 < vectors) put(to, 0, sum, 0);
            else put_lanes(to, last, sum);
        }
}

#define TILE(ROWS, TRANSPOSED, VECTORS, IS_WHOLE)                                                                                    \
    multiply_tile(a, a_stride, TRANSPOSED, b + column, b_stride, count, ROWS, VECTORS, IS_WHOLE, last, c + column, c_stride, mode)
#if WIDE == 16
#define LAST_TILES(ROWS, TRANSPOSED)                                                                                                 \
    if (left > 3 * WIDE) TILE(ROWS, TRANSPOSED, 4, 0);                                                                               \
    else if (left == 3 * WIDE) TILE(ROWS, TRANSPOSED, 3, 1);                                                                         \
    else if (left > 2 * WIDE) TILE(ROWS, TRANSPOSED, 3, 0);                                                                          \
    else if (left > WIDE) TILE(ROWS, TRANSPOSED, 2, 0);                                                                              \
    else if (left == WIDE) TILE(ROWS, TRANSPOSED, 1, 1);                                                                             \
    else if (left > 0) TILE(ROWS, TRANSPOSED, 1, 0);
#else
#define LAST_TILES(ROWS, TRANSPOSED)                                                                                                 \
    if (left > WIDE) TILE(ROWS, TRANSPOSED, 2, 0);                                                                                   \
    else if (left == WIDE) TILE(ROWS, TRANSPOSED, 1, 1);                                                                             \
    else if (left > 0) TILE(ROWS, TRANSPOSED, 1, 0);
#endif
#define TILES(ROWS, TRANSPOSED)                                                                                                      \
    case ROWS * 2 + TRANSPOSED:                                                                                                      \
        for (; column < whole; column += TILE_VECTORS * WIDE) TILE(ROWS, TRANSPOSED, TILE_VECTORS, 1);                               \
        LAST_TILES(ROWS, TRANSPOSED)                                                                                                 \
        break;

/* Up to MAX_ROWS rows. An element's bits depend on its row, its column and `count` alone. */
static void multiply(const float *a, int64_t a_stride, int transposed, const float *b, int64_t b_stride, int64_t count, int rows, int64_t width,
                     float *c, int64_t c_stride, product_mode_t mode) {
    int64_t column = 0, whole = width / (TILE_VECTORS * WIDE) * (TILE_VECTORS * WIDE), left = width - whole;
    mask_t last = before(left ? (left - 1) / WIDE * WIDE : 0, left);
    switch (rows * 2 + transposed) {
        TILES(1, 0) TILES(2, 0) TILES(3, 0) TILES(4, 0) TILES(5, 0) TILES(6, 0)
        TILES(1, 1) TILES(2, 1) TILES(3, 1) TILES(4, 1) TILES(5, 1) TILES(6, 1)
    }
}

/* Any number of rows. */
static void multiply_rows(const float *a, int64_t a_stride, int transposed, const float *b, int64_t b_stride, int64_t count, int64_t rows,
                          int64_t width, float *c, int64_t c_stride, product_mode_t mode) {
    int64_t r = 0, column = 0, left = width;
    mask_t last = before(0, left);
    for (; WIDE == 16 && width <= WIDE && r + MANY_ROWS <= rows; r += MANY_ROWS, c += MANY_ROWS * c_stride) {
        if (transposed) TILE(MANY_ROWS, 1, 1, 0);
        else TILE(MANY_ROWS, 0, 1, 0);
        a += MANY_ROWS * (transposed ? 1 : a_stride);
    }
    for (; r < rows; r += MAX_ROWS, c += MAX_ROWS * c_stride, a += MAX_ROWS * (transposed ? 1 : a_stride))
        multiply(a, a_stride, transposed, b, b_stride, count, (int)(rows - r < MAX_ROWS ? rows - r : MAX_ROWS), width, c, c_stride, mode);
}

/* y [num_columns][stride] = x [num_rows][num_columns] transposed; both widths of y, and num_columns, are multiples of 8. Lanes beyond
 * the rows, up to whole vectors, are 0. */
static void transpose(const float *x, int64_t num_rows, int64_t num_columns, float *y, int64_t stride) {
    for (int64_t r = 0; r < padded(num_rows); r += LANES)
        for (int64_t c = 0; c < num_columns; c += LANES) {
            __m256 a[8], b[8];
            for (int i = 0; i < 8; i++) a[i] = r + i < num_rows ? _mm256_load_ps(x + (r + i) * num_columns + c) : _mm256_setzero_ps();
            for (int i = 0; i < 8; i += 2) {
                b[i] = _mm256_unpacklo_ps(a[i], a[i + 1]);
                b[i + 1] = _mm256_unpackhi_ps(a[i], a[i + 1]);
            }
            for (int i = 0; i < 8; i += 4)
                for (int j = 0; j < 2; j++) {
                    a[i + 2 * j] = _mm256_shuffle_ps(b[i + j], b[i + j + 2], 0x44);
                    a[i + 2 * j + 1] = _mm256_shuffle_ps(b[i + j], b[i + j + 2], 0xee);
                }
            for (int i = 0; i < 4; i++) {
                _mm256_store_ps(y + (c + i) * stride + r, _mm256_permute2f128_ps(a[i], a[i + 4], 0x20));
                _mm256_store_ps(y + (c + i + 4) * stride + r, _mm256_permute2f128_ps(a[i], a[i + 4], 0x31));
            }
        }
}

#if WIDE == 16
/* y [count][stride] = 16 columns of it are rows of x, `x_stride` elements apart: `num_rows` of them are there, others count as 0. */
INLINE void turn_round(const void *x, int64_t from, int64_t x_stride, int64_t num_rows, int64_t count, float *y, int64_t stride, int half) {
    for (int64_t i = 0; i < count; i += WIDE) {
        __m512 a[16], b[16];
#pragma GCC unroll 16
        for (int r = 0; r < 16; r++)
            a[r] = r < num_rows ? (__m512)get_some(x, from + r * x_stride + i, from + r * x_stride + count, half) : _mm512_setzero_ps();
#pragma GCC unroll 8
        for (int r = 0; r < 16; r += 2) {
            b[r] = _mm512_unpacklo_ps(a[r], a[r + 1]);
            b[r + 1] = _mm512_unpackhi_ps(a[r], a[r + 1]);
        }
#pragma GCC unroll 4
        for (int r = 0; r < 16; r += 4)
#pragma GCC unroll 2
            for (int k = 0; k < 2; k++) { /* a[r + j]: element j of each group of 4, of 4 rows */
                a[r + 2 * k] = (__m512)_mm512_unpacklo_pd((__m512d)b[r + k], (__m512d)b[r + 2 + k]);
                a[r + 2 * k + 1] = (__m512)_mm512_unpackhi_pd((__m512d)b[r + k], (__m512d)b[r + 2 + k]);
            }
#pragma GCC unroll 4
        for (int j = 0; j < 4; j++) {
            __m512 low = _mm512_shuffle_f32x4(a[j], a[4 + j], 0x44), high = _mm512_shuffle_f32x4(a[j], a[4 + j], 0xee);
            __m512 low2 = _mm512_shuffle_f32x4(a[8 + j], a[12 + j], 0x44), high2 = _mm512_shuffle_f32x4(a[8 + j], a[12 + j], 0xee);
            b[j] = _mm512_shuffle_f32x4(low, low2, 0x88);
            b[4 + j] = _mm512_shuffle_f32x4(low, low2, 0xdd);
            b[8 + j] = _mm512_shuffle_f32x4(high, high2, 0x88);
            b[12 + j] = _mm512_shuffle_f32x4(high, high2, 0xdd);
        }
#pragma GCC unroll 16
        for (int k = 0; k < 16; k++)
            if (i + k < count) _mm512_store_ps(y + (i + k) * stride, b[k]);
    }
}
#endif
