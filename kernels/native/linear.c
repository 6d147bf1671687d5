/* y[T, O] = x[T, I] weight[O, I]^T + bias, on packed weights. Knows panels and tiles, no layer. */
#define MAX_ROWS 6    /* rows of one microkernel: 6 x 16 sums fill the 16 registers of AVX2 */
#define PAIR_ROWS 5   /* rows of one microkernel that widens pairs itself: that takes registers too */
#define FEW_ROWS 32   /* up to so many rows that is faster than to widen a panel first */
#define TILE_FLOATS 98304 /* inputs that stay in the L2 cache while weights stream by */
#define SUM_BLOCK 128 /* products that are summed before their sum is added to the rest */
#define AHEAD 64      /* pairs of inputs, a cache line each, that are fetched before they are used */
#define SLICE 256     /* inputs whose widened weights of a panel stay in the L1 cache; a multiple of SUM_BLOCK */

INLINE int64_t num_panels(int64_t num_out) { return (num_out + PANEL - 1) / PANEL; }

#ifdef __AMX_BF16__
#define PACKED_INPUTS 32 /* a panel of bfloat16 has a multiple of so many inputs */
#else
#define PACKED_INPUTS 2
#endif

INLINE int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

/* Inputs that a panel has room for. */
int64_t heddle_packed_inputs(int64_t num_in, int half) {
    return half ? (num_in + PACKED_INPUTS - 1) / PACKED_INPUTS * PACKED_INPUTS : num_in;
}

/* Elements of one packed panel: [I][16] floats, or [I / 2][16] pairs of bfloat16, the earlier input in the low half. */
INLINE int64_t panel_size(int64_t num_in, int half) { return heddle_packed_inputs(num_in, half) * PANEL; }

/* `transposed`: the source is [I, O]. Outputs beyond O and inputs beyond I are zero. */
void heddle_pack(const void *weight, void *packed, int64_t num_out, int64_t num_in, int transposed, int half) {
#pragma omp parallel for schedule(static)
    for (int64_t panel = 0; panel < num_panels(num_out); panel++)
        for (int64_t i = 0; i < panel_size(num_in, half) / PANEL; i++)
            for (int64_t j = 0; j < PANEL; j++) {
                int64_t o = panel * PANEL + j, base = panel * panel_size(num_in, half);
                int64_t from = transposed ? i * num_out + o : o * num_in + i;
                int is_there = o < num_out && i < num_in;
                if (half) ((uint16_t *)packed)[base + (i / 2 * PANEL + j) * 2 + i % 2] = is_there ? ((const uint16_t *)weight)[from] : 0;
                else ((float *)packed)[base + i * PANEL + j] = is_there ? ((const float *)weight)[from] : 0.0f;
            }
}

INLINE v8 low_half(u8x pairs) { return (v8)(pairs << 16); }
INLINE v8 high_half(u8x pairs) { return (v8)(pairs & 0xffff0000u); }

/* Inputs [start, end) of a panel of pairs as floats [end - start][16]: worth it when several blocks of rows use it. */
static void widen_panel(const void *packed, float *wide, int64_t start, int64_t end) {
    for (int64_t i = start; i < end; i += 2) {
        __builtin_prefetch((const uint32_t *)packed + (i + SLICE) / 2 * PANEL, 0, 2); /* read when the rows are through */
        for (int c = 0; c < PANEL; c += LANES) {
            u8x pairs = *(const u8x *)((const uint32_t *)packed + i / 2 * PANEL + c);
            *(v8 *)(wide + (i - start) * PANEL + c) = low_half(pairs);
            if (i + 1 < end) *(v8 *)(wide + (i + 1 - start) * PANEL + c) = high_half(pairs);
        }
    }
}

/* acc[r][c] += x[r][input] * the weights WEIGHT of vector c. Either the inputs or the weights stay in registers. */
#define ADD_INPUT(WEIGHT, INPUT)                                                                                                     \
    do {                                                                                                                             \
        v8 held[8];                                                                                                                  \
        if (rows < vectors) {                                                                                                        \
            _Pragma("GCC unroll 6") for (int r = 0; r < rows; r++) held[r] = splat(x[r * x_stride + (INPUT)]);                       \
            _Pragma("GCC unroll 8") for (int c = 0; c < vectors; c++) {                                                              \
                v8 w = WEIGHT;                                                                                                       \
                _Pragma("GCC unroll 6") for (int r = 0; r < rows; r++) acc[r][c] += held[r] * w;                                     \
            }                                                                                                                        \
        } else {                                                                                                                     \
            _Pragma("GCC unroll 8") for (int c = 0; c < vectors; c++) held[c] = WEIGHT;                                              \
            _Pragma("GCC unroll 6") for (int r = 0; r < rows; r++) {                                                                 \
                v8 xr = splat(x[r * x_stride + (INPUT)]);                                                                            \
                _Pragma("GCC unroll 8") for (int c = 0; c < vectors; c++) acc[r][c] += xr * held[c];                                 \
            }                                                                                                                        \
        }                                                                                                                            \
    } while (0)
#define PAIRS(INPUT) (((const u8x *)packed)[(c / 2) * (panel_size / 16) + (INPUT) + c % 2])
#define FLOATS(INPUT) (*(const v8_mem *)((const float *)packed + (c / 2) * panel_size + (INPUT) * PANEL + (c % 2) * LANES))

/* Adds the products of `num_in` inputs to the sums of `rows` rows and `panels` neighbouring panels, in the order of the inputs.
 * SUM_BLOCK products are summed at a time, and then these sums: so the error does not grow with the number of inputs. */
INLINE void micro(const float *x, int64_t x_stride, const void *packed, int64_t panel_size, int64_t num_in, int rows, int panels,
                  float *sums, int half) {
    int vectors = panels * 2;
    for (int64_t i0 = 0; i0 < num_in; i0 += SUM_BLOCK) {
        int64_t i1 = i0 + SUM_BLOCK < num_in ? i0 + SUM_BLOCK : num_in;
        v8 acc[MAX_ROWS][8];
#pragma GCC unroll 6
        for (int r = 0; r < rows; r++)
#pragma GCC unroll 8
            for (int c = 0; c < vectors; c++) acc[r][c] = splat(0.0f);
        if (half) {
            int64_t i = i0;
            for (; i + 1 < i1; i += 2) {
                if (panels == 1) __builtin_prefetch((const u8x *)packed + i + 2 * AHEAD); /* of more, the processor fetches more by itself */
                ADD_INPUT(low_half(PAIRS(i)), i);
                __asm__("" : "+r"(packed)); /* else the pairs are kept, and sums are moved to memory for them */
                ADD_INPUT(high_half(PAIRS(i)), i + 1);
            }
            if (i < i1) ADD_INPUT(low_half(PAIRS(i)), i);
        } else {
#pragma GCC unroll 4
            for (int64_t i = i0; i < i1; i++) ADD_INPUT(FLOATS(i), i);
        }
#pragma GCC unroll 6
        for (int r = 0; r < rows; r++)
#pragma GCC unroll 8
            for (int c = 0; c < vectors; c++) *(v8 *)(sums + (r * vectors + c) * LANES) += acc[r][c];
    }
}

INLINE void emit(const float *sums, int rows, int panels, int64_t panel, int64_t row, int64_t num_out, const void *bias, void *y,
                 int64_t y_stride, int half) {
    for (int r = 0; r < rows; r++)
        for (int c = 0; c < 2 * panels; c++) {
            int64_t o = panel * PANEL + c * LANES;
            v8 value = *(const v8 *)(sums + (r * 2 * panels + c) * LANES);
            if (o + LANES <= num_out) {
                if (bias) value += load(bias, o, half);
                store(y, (row + r) * y_stride + o, value, half);
            } else {
                for (int j = 0; o + j < num_out; j++)
                    store1(y, (row + r) * y_stride + o + j, value[j] + (bias ? load1(bias, o + j, half) : 0.0f), half);
            }
        }
}

#define CASE(ROWS, PANELS)                                                                                                        \
    case ROWS * 8 + PANELS:                                                                                                       \
        if (half) micro(x, x_stride, w, panel_size, num_in, ROWS, PANELS, sums, 1);                                               \
        else micro(x, x_stride, w, panel_size, num_in, ROWS, PANELS, sums, 0);                                                    \
        break;

static void block(const float *x, int64_t x_stride, const void *w, int64_t panel_size, int64_t num_in, int rows, int panels, float *sums,
                  int half) {
    switch (rows * 8 + panels) {
        CASE(1, 1) CASE(1, 2) CASE(1, 3) CASE(1, 4) CASE(2, 1) CASE(2, 2) CASE(3, 1) CASE(4, 1) CASE(5, 1) CASE(6, 1)
    }
}

INLINE int64_t block_start(int64_t index, int64_t num_blocks, int64_t num_rows) { return index * num_rows / num_blocks; }

/* One block of rows after another: start == block_start(index), without its division. */
typedef struct {
    int64_t start, rows, least, over, carry, num_blocks;
} walk_t;

INLINE walk_t walk_from(int64_t index, int64_t num_blocks, int64_t num_rows) {
    int64_t over = num_rows % num_blocks, carry = index * over % num_blocks, least = num_rows / num_blocks;
    return (walk_t){block_start(index, num_blocks, num_rows), least + (carry + over >= num_blocks), least, over, carry, num_blocks};
}

INLINE void walk_on(walk_t *w) {
    w->start += w->rows;
    w->carry += w->over;
    if (w->carry >= w->num_blocks) w->carry -= w->num_blocks;
    w->rows = w->least + (w->carry + w->over >= w->num_blocks);
}

/* Rows of x as floats, `num_in` apart. */
static void widen_rows(const void *x, int64_t x_stride, float *wide, int64_t num_in, int64_t num_rows) {
    for (int64_t r = 0; r < num_rows; r++) {
        int64_t i = 0;
        for (; i + LANES <= num_in; i += LANES) *(v8_mem *)(wide + r * num_in + i) = load(x, r * x_stride + i, 1);
        for (; i < num_in; i++) wide[r * num_in + i] = load1(x, r * x_stride + i, 1);
    }
}

/* Panels [first, last) of a tile of rows, whose blocks are [b0, b1) of all. x is the tile's first row. */
static void tile(const float *x, int64_t x_stride, const void *packed, int64_t first, int64_t last, int64_t b0, int64_t b1, int64_t num_blocks,
                 int64_t num_rows, int64_t num_in, int64_t num_out, const void *bias, void *y, int64_t y_stride, float *wide_panel,
                 float *sums, int half) {
    walk_t top = walk_from(b0, num_blocks, num_rows);
    int64_t row0 = top.start, row1 = block_start(b1, num_blocks, num_rows), widest = num_rows / num_blocks + (num_rows % num_blocks != 0);
    int step = widest == 1 ? 4 : widest == 2 ? 2 : 1;
    int is_wide = half && widest > PAIR_ROWS;
    int64_t slice = b1 - b0 > 1 || is_wide ? SLICE : num_in;
    for (int64_t panel = first; panel < last; panel += step) {
        int panels = (int)(last - panel < step ? last - panel : step);
        const void *w = at(packed, panel * panel_size(num_in, half), half);
        int64_t num_sums = (row1 - row0) * panels * PANEL;
        memset(sums, 0, (size_t)num_sums * sizeof(float));
        for (int64_t i0 = 0; i0 < num_in; i0 += slice) {
            int64_t i1 = i0 + slice < num_in ? i0 + slice : num_in;
            const void *part = at(w, i0 * PANEL, half);
            if (is_wide) {
                widen_panel(w, wide_panel, i0, i1);
                part = wide_panel;
            }
            walk_t at_block = top;
            for (int64_t b = b0; b < b1; b++, walk_on(&at_block)) {
                int64_t own_row = at_block.start - row0;
                block(x + own_row * x_stride + i0, x_stride, part, panel_size(num_in, half), i1 - i0, (int)at_block.rows, panels,
                      sums + own_row * panels * PANEL, half && !is_wide);
            }
        }
        walk_t at_block = top;
        for (int64_t b = b0; b < b1; b++, walk_on(&at_block))
            emit(sums + (at_block.start - row0) * panels * PANEL, (int)at_block.rows, panels, panel, at_block.start, num_out, bias, y, y_stride,
                 half);
    }
}

#include "linear_amx.c"

/* Returns 0, or -1 if there was no memory. Rows of x and y are x_stride and y_stride elements apart. */
int heddle_linear(const void *x, int64_t x_stride, const void *packed, const void *bias, void *y, int64_t y_stride, int64_t num_rows,
                  int64_t num_in, int64_t num_out, int half) {
#ifdef __AMX_BF16__
    if (half) return linear_amx(x, x_stride, packed, bias, y, y_stride, num_rows, num_in, num_out);
#endif
    int64_t block_rows = half && num_rows <= FEW_ROWS ? PAIR_ROWS : MAX_ROWS;
    int64_t num_blocks = (num_rows + block_rows - 1) / block_rows, panels_total = num_panels(num_out);
    int64_t tile_blocks = TILE_FLOATS / (MAX_ROWS * num_in) > 4 ? TILE_FLOATS / (MAX_ROWS * num_in) : 4;
    if (tile_blocks > num_blocks) tile_blocks = num_blocks;
    int64_t tile_rows = tile_blocks * MAX_ROWS, num_sums = (tile_rows < 4 ? 4 : tile_rows) * PANEL;
    int failed = 0;
#pragma omp parallel
    {
        float *sums = scratch((size_t)(num_sums + SLICE * PANEL + (half ? tile_rows * num_in : 0)));
        float *wide_panel = sums + num_sums, *wide = wide_panel + SLICE * PANEL;
        int64_t chunk = panels_total / (omp_get_num_threads() * 8) / 4 * 4; /* a multiple of all steps */
        if (chunk < 4) chunk = 4;
        if (!sums) {
#pragma omp atomic write
            failed = 1;
        }
        for (int64_t b0 = 0; b0 < num_blocks; b0 += tile_blocks) {
            int64_t b1 = b0 + tile_blocks < num_blocks ? b0 + tile_blocks : num_blocks;
            int64_t row0 = block_start(b0, num_blocks, num_rows), row1 = block_start(b1, num_blocks, num_rows);
            const float *from = half ? wide : (const float *)x + row0 * x_stride;
            if (half && sums) widen_rows(at(x, row0 * x_stride, 1), x_stride, wide, num_in, row1 - row0);
#pragma omp for schedule(dynamic, 1) nowait /* a thread that shares its core gets less to do */
            for (int64_t first = 0; first < panels_total; first += chunk)
                if (sums)
                    tile(from, half ? num_in : x_stride, packed, first, first + chunk < panels_total ? first + chunk : panels_total, b0, b1,
                         num_blocks, num_rows, num_in, num_out, bias, y, y_stride, wide_panel, sums, half);
        }
    }
    return failed ? -1 : 0;
}
