/* Linears in bfloat16 on AMX tiles: the way forward and back on the same packed weights. Knows tiles, no layer.
 *
 * A tile of a packed panel is 32 inputs of 16 outputs, 1 KiB in one piece, as the unit takes it. Products of a row are summed in
 * float32 in the order of the inputs, whatever else is in the tile: a row's bits depend on this row alone.
 */
#ifdef __AMX_BF16__
#define MEMORY_IS_READ() __asm__ volatile("" ::: "memory") /* gcc does not know that tile instructions read it */
#define TILE_ROWS 16
#define TILE_FLOATS_AMX 256 /* sums of a tile */
#define TILE_STEP 64        /* bytes of a row of a tile: 32 inputs, or 16 sums */
#define TILE_BYTES 1024
#define MAX_STEPS 20        /* tiles of each of two panels that stay in the L1 cache while rows stream by */
#define ROW_GROUP 512       /* rows that stay in the L2 cache while panels stream by */
#define MAX_PAIRS 9         /* pairs of panels whose sums stay in the L2 cache */
#define TURNED_AHEAD 3      /* panels that are fetched before they are turned round */

typedef struct {
    uint8_t palette, start_row, reserved[14];
    uint16_t row_bytes[16];
    uint8_t rows[16];
} tile_config_t;

/* Tiles 0 to 3 are sums, 4 and 5 rows of inputs, 6 and 7 weights. */
INLINE void configure_tiles(int64_t num_rows) {
    tile_config_t config __attribute__((aligned(64))) = {.palette = 1};
    for (int t = 0; t < 8; t++) {
        config.row_bytes[t] = TILE_STEP;
        config.rows[t] = (uint8_t)(t < 6 ? num_rows : TILE_ROWS);
    }
    MEMORY_IS_READ();
    _tile_loadconfig(&config);
}

typedef struct { /* rows [row0, row0 + num_rows) of the result, whose inputs are at `a` */
    const char *a;
    int64_t a_bytes, row0, num_rows; /* bytes between two rows */
    void *y;
    int64_t y_stride, num_out;
    const void *bias;
} amx_rows_t;

/* Blocks of 16 rows; the last one begins earlier if it would not be full: rows that are in two have the same sums in both. */
INLINE int64_t row_of_block(const amx_rows_t *p, int64_t block) {
    return p->num_rows <= TILE_ROWS ? 0 : least(block * TILE_ROWS, p->num_rows - TILE_ROWS);
}

/* Adds the products of `steps` tiles to sums[blocks][panels][16][16], which begin at 0 if `is_first`. Both are 1 or 2, or 1 and 4.
 * `next`: weights that will be needed then, as far apart as these, or NULL. */
INLINE void add_tiles(const char *a0, const char *a1, int64_t a_bytes, const char *b, int64_t panel_bytes, int64_t steps, float *sums,
                      int is_first, int blocks, int panels, const char *next) {
    MEMORY_IS_READ();
    if (is_first) {
        _tile_zero(0);
        if (blocks * panels > 1) _tile_zero(1);
        if (blocks * panels > 2) _tile_zero(2);
        if (blocks * panels > 2) _tile_zero(3);
    } else {
        _tile_loadd(0, sums, TILE_STEP);
        if (blocks * panels > 1) _tile_loadd(1, sums + TILE_FLOATS_AMX, TILE_STEP);
        if (blocks * panels > 2) _tile_loadd(2, sums + 2 * TILE_FLOATS_AMX, TILE_STEP);
        if (blocks * panels > 2) _tile_loadd(3, sums + 3 * TILE_FLOATS_AMX, TILE_STEP);
    }
    for (int64_t k = 0; k < steps; k++) {
        if (next)
            for (int j = 0; j < panels; j++)
#pragma GCC unroll 16
                for (int line = 0; line < 16; line++) __builtin_prefetch(next + j * panel_bytes + k * TILE_BYTES + line * 64, 0, 2);
        _tile_loadd(4, a0 + k * TILE_STEP, a_bytes);
        _tile_loadd(6, b + k * TILE_BYTES, TILE_STEP);
        _tile_dpbf16ps(0, 4, 6);
        if (blocks == 2) {
            _tile_loadd(5, a1 + k * TILE_STEP, a_bytes);
            if (panels == 1) _tile_dpbf16ps(1, 5, 6);
            else _tile_dpbf16ps(2, 5, 6);
        }
        if (panels > 1) {
            _tile_loadd(7, b + panel_bytes + k * TILE_BYTES, TILE_STEP);
            _tile_dpbf16ps(1, 4, 7);
            if (blocks == 2) _tile_dpbf16ps(3, 5, 7);
        }
        if (panels > 2) {
            _tile_loadd(6, b + 2 * panel_bytes + k * TILE_BYTES, TILE_STEP);
            _tile_dpbf16ps(2, 4, 6);
            _tile_loadd(7, b + 3 * panel_bytes + k * TILE_BYTES, TILE_STEP);
            _tile_dpbf16ps(3, 4, 7);
        }
    }
    _tile_stored(0, sums, TILE_STEP);
    if (blocks * panels > 1) _tile_stored(1, sums + TILE_FLOATS_AMX, TILE_STEP);
    if (blocks * panels > 2) _tile_stored(2, sums + 2 * TILE_FLOATS_AMX, TILE_STEP);
    if (blocks * panels > 2) _tile_stored(3, sums + 3 * TILE_FLOATS_AMX, TILE_STEP);
}

INLINE __m512 widen16(__m256i half) { return (__m512)_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16); }

/* Sums of one block and panel, with the bias, as bfloat16. */
static void store_tile(const amx_rows_t *p, int64_t block, int64_t panel, const float *sums) {
    int64_t row = p->row0 + row_of_block(p, block), column = panel * PANEL, count = least(p->num_out - column, PANEL);
    __mmask16 there = (__mmask16)((1u << count) - 1);
    __m512 bias = p->bias ? widen16(_mm256_maskz_loadu_epi16(there, (const uint16_t *)p->bias + column)) : _mm512_setzero_ps();
    for (int64_t r = 0; r < least(p->num_rows, TILE_ROWS); r++) {
        __m512 value = _mm512_load_ps(sums + r * PANEL);
        if (p->bias) value = _mm512_add_ps(value, bias);
        _mm256_mask_storeu_epi16((uint16_t *)p->y + (row + r) * p->y_stride + column, there, (__m256i)_mm512_cvtneps_pbh(value));
    }
}

/* All rows with `steps` tiles of `panels` neighbouring panels; behind the last of them the results are stored. `sums`: of all blocks. */
static void add_panels(const amx_rows_t *p, int64_t first_step, const char *b, int64_t panel_bytes, int64_t steps, int64_t panel, int panels,
                       int is_first, int is_last, const char *next, float *sums) {
    int64_t num_blocks = (p->num_rows + TILE_ROWS - 1) / TILE_ROWS;
    for (int64_t block = 0; block < num_blocks; block += 2) {
        int blocks = block + 1 < num_blocks ? 2 : 1;
        const char *a0 = p->a + row_of_block(p, block) * p->a_bytes + first_step * TILE_STEP;
        const char *a1 = p->a + row_of_block(p, block + blocks - 1) * p->a_bytes + first_step * TILE_STEP;
        float *to = is_first && is_last ? sums : sums + block * panels * TILE_FLOATS_AMX;
        switch (blocks * 8 + panels) {
        case 9: add_tiles(a0, a1, p->a_bytes, b, panel_bytes, steps, to, is_first, 1, 1, next); break;
        case 10: add_tiles(a0, a1, p->a_bytes, b, panel_bytes, steps, to, is_first, 1, 2, next); break;
        case 12: add_tiles(a0, a1, p->a_bytes, b, panel_bytes, steps, to, is_first, 1, 4, next); break;
        case 17: add_tiles(a0, a1, p->a_bytes, b, panel_bytes, steps, to, is_first, 2, 1, next); break;
        case 18: add_tiles(a0, a1, p->a_bytes, b, panel_bytes, steps, to, is_first, 2, 2, next); break;
        }
        next = NULL; /* once is enough */
        if (is_last)
            for (int i = 0; i < blocks * panels; i++) store_tile(p, block + i / panels, panel + i % panels, to + i * TILE_FLOATS_AMX);
    }
}

/* Whether rows must be copied: a tile reads whole steps, and rows a power of two apart share few lines of the L1 cache. */
INLINE int needs_copy(int64_t num_in, int64_t x_stride) { return num_in * 2 % TILE_STEP != 0 || x_stride * 2 % 2048 == 0; }
INLINE int64_t copied_bytes(int64_t num_in) { return (num_in * 2 + TILE_STEP - 1) / TILE_STEP * TILE_STEP + TILE_STEP; }

static amx_rows_t amx_rows(const void *x, int64_t x_stride, int64_t num_in, int64_t row0, int64_t num_rows, char *room) {
    amx_rows_t p = {.a = (const char *)x + row0 * x_stride * 2, .a_bytes = x_stride * 2, .row0 = row0, .num_rows = num_rows};
    if (!needs_copy(num_in, x_stride)) return p;
    int64_t width = copied_bytes(num_in);
    for (int64_t r = 0; r < num_rows; r++) {
        memcpy(room + r * width, p.a + r * p.a_bytes, (size_t)num_in * 2);
        memset(room + r * width + num_in * 2, 0, (size_t)(width - num_in * 2));
    }
    p.a = room, p.a_bytes = width;
    return p;
}

/* Floats of scratch space: sums of two panels and a group of rows, and copies of these rows, of up to `most_in` inputs at once. */
INLINE int64_t amx_sums(int64_t num_rows) {
    int64_t blocks = (least(num_rows, ROW_GROUP) + TILE_ROWS - 1) / TILE_ROWS;
    return (blocks * 2 > 4 ? blocks * 2 : 4) * TILE_FLOATS_AMX;
}
INLINE int64_t amx_copies(int64_t num_rows, int64_t num_in, int64_t most_in, int64_t x_stride) {
    return needs_copy(num_in, x_stride) ? least(num_rows, ROW_GROUP) * copied_bytes(least(num_in, most_in)) / 4 : 0;
}

INLINE int64_t num_slices(int64_t steps, int64_t num_rows) { return num_rows <= 2 * TILE_ROWS ? 1 : (steps + MAX_STEPS - 1) / MAX_STEPS; }

static int linear_amx(const void *x, int64_t x_stride, const void *packed, const void *bias, void *y, int64_t y_stride, int64_t num_rows,
                      int64_t num_in, int64_t num_out) {
    int64_t panels_total = num_panels(num_out), panel_bytes = panel_size(num_in, 1) * 2, steps = panel_bytes / TILE_BYTES;
    int64_t slices = num_slices(steps, num_rows), at_once = num_rows <= TILE_ROWS ? 4 : 2;
    int64_t groups = (num_rows + ROW_GROUP - 1) / ROW_GROUP;
    int failed = 0;
#pragma omp parallel
    {
        float *sums = scratch((size_t)(amx_sums(num_rows) + amx_copies(num_rows, num_in, num_in, x_stride)));
        int64_t chunk = panels_total / (omp_get_num_threads() * 8) / 4 * 4;
        if (chunk < 4) chunk = 4;
        if (!sums) {
#pragma omp atomic write
            failed = 1;
        }
        configure_tiles(least(num_rows, TILE_ROWS));
        for (int64_t group = 0; group < groups; group++) {
            int64_t row0 = block_start(group, groups, num_rows), row1 = block_start(group + 1, groups, num_rows);
            amx_rows_t rows = {0};
            if (sums) rows = amx_rows(x, x_stride, num_in, row0, row1 - row0, (char *)(sums + amx_sums(num_rows)));
            rows.y = y, rows.y_stride = y_stride, rows.num_out = num_out, rows.bias = bias;
#pragma omp for schedule(dynamic, 1) nowait /* a thread that shares its core gets less to do */
            for (int64_t first = 0; first < panels_total; first += chunk)
                for (int64_t panel = first, panels; sums && panel < least(first + chunk, panels_total); panel += panels) {
                    int64_t left = least(first + chunk, panels_total) - panel;
                    panels = left >= at_once ? at_once : left >= 2 ? 2 : 1;
                    const char *b = (const char *)packed + panel * panel_bytes;
                    for (int64_t s = 0; s < slices; s++) {
                        int64_t from = block_start(s, slices, steps), to = block_start(s + 1, slices, steps);
                        int is_last = s + 1 == slices, has_next = !is_last || panel + 2 * panels <= panels_total;
                        const char *next = is_last ? b + panels * panel_bytes : b + to * TILE_BYTES;
                        add_panels(&rows, from, b + from * TILE_BYTES, panel_bytes, to - from, panel, (int)panels, s == 0, is_last,
                                   has_next ? next : NULL, sums);
                    }
                }
        }
        _tile_release();
    }
    return failed ? -1 : 0;
}

/* 16 outputs of 32 inputs as a packed weight has them, turned round: 8 rows each of the tiles of 16 inputs at `low` and `high`. */
INLINE void turn_tile(const char *tile, char *low, char *high) {
    const __m512i pairs = _mm512_set4_epi32(0x0f0e0b0a, 0x0d0c0908, 0x07060302, 0x05040100);
    for (int part = 0; part < 2; part++) {
        __m512i r[8], t[8], u[8];
        char *to = part ? high : low;
#pragma GCC unroll 8
        for (int i = 0; i < 8; i++) r[i] = _mm512_shuffle_epi8(_mm512_load_si512(tile + (part * 8 + i) * 64), pairs);
#pragma GCC unroll 4
        for (int i = 0; i < 8; i += 2) {
            t[i] = _mm512_unpacklo_epi64(r[i], r[i + 1]);
            t[i + 1] = _mm512_unpackhi_epi64(r[i], r[i + 1]);
        }
#pragma GCC unroll 2
        for (int odd = 0; odd < 2; odd++) {
            u[4 * odd] = _mm512_shuffle_i64x2(t[odd], t[2 + odd], 0x44), u[4 * odd + 1] = _mm512_shuffle_i64x2(t[4 + odd], t[6 + odd], 0x44);
            u[4 * odd + 2] = _mm512_shuffle_i64x2(t[odd], t[2 + odd], 0xee), u[4 * odd + 3] = _mm512_shuffle_i64x2(t[4 + odd], t[6 + odd], 0xee);
            for (int far = 0; far < 2; far++) {
                __m512i a = u[4 * odd + 2 * far], b = u[4 * odd + 2 * far + 1];
                _mm512_store_si512(to + (4 * far + odd) * 64, _mm512_shuffle_i64x2(a, b, 0x88));
                _mm512_store_si512(to + (4 * far + 2 + odd) * 64, _mm512_shuffle_i64x2(a, b, 0xdd));
            }
        }
    }
}

/* Outputs [32 from, 32 to) of 32 inputs, tile `input_step` of each panel, turned round: [2 panels of inputs][to - from][1 KiB]. */
static void turn_tiles(const char *packed, int64_t panel_bytes, int64_t panels_total, int64_t input_step, int64_t from, int64_t to, char *turned) {
    for (int64_t k = from; k < to; k++)
        for (int half = 0; half < 2; half++) {
            int64_t panel = 2 * k + half;
            char *low = turned + (k - from) * TILE_BYTES + half * 512, *high = low + (to - from) * TILE_BYTES;
            const char *tile = packed + panel * panel_bytes + input_step * TILE_BYTES;
            if (panel + TURNED_AHEAD < panels_total)
                for (int line = 0; line < 16; line++) __builtin_prefetch(tile + TURNED_AHEAD * panel_bytes + line * 64, 0, 3);
            if (panel < panels_total) turn_tile(tile, low, high);
            else memset(low, 0, 512), memset(high, 0, 512);
        }
}

/* A task has all rows of a group and some pairs of panels; it takes a slice of the outputs at a time, so that the L2 cache holds this
 * slice of its rows and the sums of its panels. */
static int linear_backward_amx(const void *dy, int64_t dy_stride, const void *packed, void *dx, int64_t num_rows, int64_t num_out, int64_t num_in) {
    int64_t panel_bytes = panel_size(num_in, 1) * 2, steps = (num_out + 31) / 32, slices = (steps + MAX_STEPS - 1) / MAX_STEPS;
    int64_t groups = (num_rows + ROW_GROUP - 1) / ROW_GROUP, pairs = panel_bytes / TILE_BYTES, parts = (pairs + MAX_PAIRS - 1) / MAX_PAIRS;
    int64_t sums_of_pair = amx_sums(num_rows), turned = 2 * MAX_STEPS * TILE_BYTES / 4, fewest = least(pairs, (omp_get_max_threads() + groups - 1) / groups);
    int failed = 0;
    if (parts < fewest) parts = fewest;
#pragma omp parallel
    {
        float *sums = scratch((size_t)(MAX_PAIRS * sums_of_pair + turned + amx_copies(num_rows, num_out, MAX_STEPS * 32, dy_stride)));
        char *tiles = (char *)(sums + MAX_PAIRS * sums_of_pair), *room = tiles + turned * 4;
        if (!sums) {
#pragma omp atomic write
            failed = 1;
        }
        configure_tiles(least(num_rows, TILE_ROWS));
#pragma omp for schedule(dynamic, 1)
        for (int64_t task = 0; task < groups * parts; task++) {
            int64_t group = task / parts, first = block_start(task % parts, parts, pairs), last = block_start(task % parts + 1, parts, pairs);
            int64_t row0 = block_start(group, groups, num_rows), count = block_start(group + 1, groups, num_rows) - row0;
            for (int64_t s = 0; s < slices && sums; s++) {
                int64_t from = block_start(s, slices, steps), to = block_start(s + 1, slices, steps);
                amx_rows_t rows = amx_rows((const uint16_t *)dy + from * 32, dy_stride, least(to * 32, num_out) - from * 32, row0, count, room);
                rows.y = dx, rows.y_stride = num_in, rows.num_out = num_in;
                for (int64_t pair = first; pair < last; pair++) {
                    int panels = pair * 32 + PANEL < num_in ? 2 : 1;
                    turn_tiles(packed, panel_bytes, num_panels(num_out), pair, from, to, tiles);
                    add_panels(&rows, 0, tiles, (to - from) * TILE_BYTES, to - from, pair * 2, panels, s == 0, s + 1 == slices, NULL,
                               sums + (pair - first) * sums_of_pair);
                }
            }
        }
        _tile_release();
    }
    return failed ? -1 : 0;
}
#endif
