/* The decoder's operations for x86-64-v3 CPUs (AVX2, FMA): what torch does slowly or in many calls there. Knows pointers, no torch.
 *
 * Every row's result is a fixed sequence of operations that depends on this row's own inputs alone: not on how many rows share
 * the call, on the number of threads, or on masked keys between the visible ones. So a token's logits are bit for bit the same
 * alone, in a batch, in a chunk of a prompt or as a node of a draft tree.
 *
 * Types: `half` arguments are 1 for bfloat16 storage, 0 for float32; arithmetic is float32. Shape letters as in kernels/segments.py.
 */
#include <immintrin.h>
#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include <omp.h>

#define INLINE static inline __attribute__((always_inline))
#define LANES 8
#define PANEL 16      /* outputs of a packed weight that lie side by side */
#define MAX_ROWS 6    /* rows of one microkernel: 6 x 16 sums fill the 16 registers of AVX2 */
#define PAIR_ROWS 4   /* rows of one microkernel that widens pairs itself: that takes registers too */
#define FEW_ROWS 32   /* up to so many rows that is faster than to widen a panel first */
#define TILE_FLOATS 98304 /* inputs that stay in the L2 cache while weights stream by */
#define SUM_BLOCK 128 /* products that are summed before their sum is added to the rest */
#define SLICE 256     /* inputs whose widened weights of a panel stay in the L1 cache; a multiple of SUM_BLOCK */
#define KEY_BLOCK 64  /* keys that are widened at a time */
#define MIN_PARALLEL 16384 /* elements below which waking threads costs more than it brings */

typedef float v8 __attribute__((vector_size(32)));
typedef uint32_t u8x __attribute__((vector_size(32)));
typedef int32_t i8x __attribute__((vector_size(32)));
typedef v8 v8_mem __attribute__((aligned(4), may_alias));

/* --- loads, stores, rounding ---------------------------------------------------------------------------------------- */

INLINE v8 splat(float x) { return (v8){x, x, x, x, x, x, x, x}; }

INLINE v8 load(const void *p, int64_t i, int half) {
    if (!half) return *(const v8_mem *)((const float *)p + i);
    return (v8)_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i *)((const uint16_t *)p + i))), 16);
}

INLINE u8x to_half(v8 x) { /* in the upper 16 bits, rounded to nearest even; NaN stays NaN. The lower ones are to be dropped */
    u8x bits = (u8x)x, rounded = bits + (0x7fff + ((bits >> 16) & 1));
    return (u8x)_mm256_blendv_epi8((__m256i)rounded, _mm256_set1_epi32(0x7fc00000), (__m256i)(x != x));
}

INLINE __m128i narrow(v8 x) {
    __m256i bits = (__m256i)(to_half(x) >> 16);
    return _mm_packus_epi32(_mm256_castsi256_si128(bits), _mm256_extracti128_si256(bits, 1));
}

INLINE void store(void *p, int64_t i, v8 x, int half) {
    if (half) _mm_storeu_si128((__m128i *)((uint16_t *)p + i), narrow(x));
    else *(v8_mem *)((float *)p + i) = x;
}

INLINE float load1(const void *p, int64_t i, int half) {
    if (!half) return ((const float *)p)[i];
    union { uint32_t u; float f; } x = {(uint32_t)((const uint16_t *)p)[i] << 16};
    return x.f;
}

INLINE void store1(void *p, int64_t i, float value, int half) {
    if (!half) { ((float *)p)[i] = value; return; }
    union { float f; uint32_t u; } x = {value};
    ((uint16_t *)p)[i] = value != value ? 0x7fc0 : (uint16_t)((x.u + 0x7fff + ((x.u >> 16) & 1)) >> 16);
}

INLINE v8 rounded(v8 x, int half) { /* as if stored and loaded again */
    return half ? (v8)(to_half(x) & 0xffff0000u) : x;
}

INLINE void *at(const void *p, int64_t i, int half) { return (char *)p + i * (half ? 2 : 4); }

INLINE v8 where(i8x condition, v8 a, v8 b) { return (v8)((condition & (i8x)a) | (~condition & (i8x)b)); }

INLINE int64_t padded8(int64_t n) { return (n + LANES - 1) / LANES * LANES; }

typedef struct {
    float *floats;
    size_t capacity;
} buffer_t;

static float *grown(buffer_t *buffer, size_t num_floats) { /* kept between calls; NULL if there is no memory */
    if (!buffer->floats || num_floats > buffer->capacity) {
        free(buffer->floats);
        buffer->capacity = 0;
        if (posix_memalign((void **)&buffer->floats, 64, (num_floats + 64) * sizeof(float))) return buffer->floats = NULL;
        buffer->capacity = num_floats;
    }
    return buffer->floats;
}

static float *scratch(size_t num_floats) { /* this thread's own */
    static __thread buffer_t buffer;
    return grown(&buffer, num_floats);
}

/* --- y[T, O] = x[T, I] weight[O, I]^T + bias ------------------------------------------------------------------------- */

INLINE int64_t num_panels(int64_t num_out) { return (num_out + PANEL - 1) / PANEL; }

/* Elements of one packed panel: [I][16] floats, or [I / 2][16] pairs of bfloat16, the earlier input in the low half. */
INLINE int64_t panel_size(int64_t num_in, int half) { return (half ? (num_in + 1) / 2 * 2 : num_in) * PANEL; }

/* `transposed`: the source is [I, O]. Outputs beyond O, and the input that makes a pair of the last one, are zero. */
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
                ADD_INPUT(low_half(PAIRS(i)), i);
                __asm__("" : "+r"(packed)); /* else the pairs are kept, and sums are moved to memory for them */
                ADD_INPUT(high_half(PAIRS(i)), i + 1);
            }
            if (i < i1) ADD_INPUT(low_half(PAIRS(i)), i);
        } else {
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
    int64_t row0 = block_start(b0, num_blocks, num_rows), widest = num_rows / num_blocks + (num_rows % num_blocks != 0);
    int step = widest == 1 ? 4 : widest == 2 ? 2 : 1;
    int is_wide = half && widest > PAIR_ROWS;
    int64_t slice = b1 - b0 > 1 || is_wide ? SLICE : num_in;
    for (int64_t panel = first; panel < last; panel += step) {
        int panels = (int)(last - panel < step ? last - panel : step);
        const void *w = at(packed, panel * panel_size(num_in, half), half);
        int64_t num_sums = (block_start(b1, num_blocks, num_rows) - row0) * panels * PANEL;
        memset(sums, 0, (size_t)num_sums * sizeof(float));
        for (int64_t i0 = 0; i0 < num_in; i0 += slice) {
            int64_t i1 = i0 + slice < num_in ? i0 + slice : num_in;
            const void *part = at(w, i0 * PANEL, half);
            if (is_wide) {
                widen_panel(w, wide_panel, i0, i1);
                part = wide_panel;
            }
            for (int64_t b = b0; b < b1; b++) {
                int64_t start = block_start(b, num_blocks, num_rows), rows = block_start(b + 1, num_blocks, num_rows) - start;
                block(x + (start - row0) * x_stride + i0, x_stride, part, panel_size(num_in, half), i1 - i0, (int)rows, panels,
                      sums + (start - row0) * panels * PANEL, half && !is_wide);
            }
        }
        for (int64_t b = b0; b < b1; b++) {
            int64_t start = block_start(b, num_blocks, num_rows), rows = block_start(b + 1, num_blocks, num_rows) - start;
            emit(sums + (start - row0) * panels * PANEL, (int)rows, panels, panel, start, num_out, bias, y, y_stride, half);
        }
    }
}

/* Returns 0, or -1 if there was no memory. Rows of x and y are x_stride and y_stride elements apart. */
int heddle_linear(const void *x, int64_t x_stride, const void *packed, const void *bias, void *y, int64_t y_stride, int64_t num_rows,
                  int64_t num_in, int64_t num_out, int half) {
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

/* --- rows: norm, RoPE, activation ------------------------------------------------------------------------------------ */

INLINE float total(v8 x) { return ((x[0] + x[4]) + (x[2] + x[6])) + ((x[1] + x[5]) + (x[3] + x[7])); }

INLINE void norm_row(const void *x, const void *residual, const void *weight, void *sum, void *y, int64_t num_hidden, float eps, int half) {
    v8 squares = splat(0.0f);
    for (int64_t i = 0; i < num_hidden; i += LANES) {
        v8 value = load(x, i, half);
        if (residual) {
            value = rounded(value + load(residual, i, half), half);
            store(sum, i, value, half);
        }
        squares += value * value;
    }
    v8 inverse = splat(1.0f / sqrtf(total(squares) / (float)num_hidden + eps));
    const void *from = residual ? sum : x;
    for (int64_t i = 0; i < num_hidden; i += LANES)
        store(y, i, load(weight, i, half) * rounded(load(from, i, half) * inverse, half), half);
}

/* m = x + residual (if any), y = weight * m / rms(m); `sum` takes m and may be x or residual, y may be x. H is a multiple of 8. */
void heddle_rms_norm(const void *x, const void *residual, const void *weight, void *sum, void *y, int64_t num_rows, int64_t num_hidden,
                     float eps, int half) {
#pragma omp parallel for schedule(static) if (num_rows * num_hidden >= MIN_PARALLEL)
    for (int64_t r = 0; r < num_rows; r++) {
        int64_t row = r * num_hidden;
        const void *added = residual ? at(residual, row, half) : NULL;
        void *to = residual ? at(sum, row, half) : NULL;
        if (half) norm_row(at(x, row, 1), added, weight, to, at(y, row, 1), num_hidden, eps, 1);
        else norm_row(at(x, row, 0), added, weight, to, at(y, row, 0), num_hidden, eps, 0);
    }
}

INLINE void rotate(const void *x, void *y, const void *cos, const void *sin, int64_t head_dim, int half) {
    int64_t middle = head_dim / 2;
    for (int64_t i = 0; i < middle; i += LANES) {
        v8 low = load(x, i, half), high = load(x, middle + i, half);
        store(y, i, low * load(cos, i, half) - high * load(sin, i, half), half);
        store(y, middle + i, high * load(cos, middle + i, half) + low * load(sin, middle + i, half), half);
    }
}

INLINE void rotate_heads(const void *x, void *y, const void *cos, const void *sin, int64_t num_heads, int64_t head_dim, int half) {
    for (int64_t h = 0; h < num_heads; h++) rotate(at(x, h * head_dim, half), at(y, h * head_dim, half), cos, sin, head_dim, half);
}

/* q_out = rope(q); k_cache[slots] = rope(k); v_cache[slots] = v. D is a multiple of 16; strides are those of rows, in elements. */
void heddle_rope_and_cache(const void *q, int64_t q_stride, const void *k, int64_t k_stride, const void *v, int64_t v_stride,
                           const void *cos, const void *sin, void *q_out, void *k_cache, void *v_cache, const int64_t *slots,
                           int64_t num_rows, int64_t num_heads, int64_t num_kv_heads, int64_t head_dim, int half) {
    int64_t kv_row = num_kv_heads * head_dim;
#pragma omp parallel for schedule(static) if (num_rows * num_heads * head_dim >= MIN_PARALLEL)
    for (int64_t r = 0; r < num_rows; r++) {
        const void *c = at(cos, r * head_dim, half), *s = at(sin, r * head_dim, half);
        void *to = at(q_out, r * num_heads * head_dim, half), *key = at(k_cache, slots[r] * kv_row, half);
        int64_t num_keys = slots[r] < 0 ? 0 : num_kv_heads; /* a row without a slot is written nowhere */
        if (half) {
            rotate_heads(at(q, r * q_stride, 1), to, c, s, num_heads, head_dim, 1);
            rotate_heads(at(k, r * k_stride, 1), key, c, s, num_keys, head_dim, 1);
        } else {
            rotate_heads(at(q, r * q_stride, 0), to, c, s, num_heads, head_dim, 0);
            rotate_heads(at(k, r * k_stride, 0), key, c, s, num_keys, head_dim, 0);
        }
        if (num_keys) memcpy(at(v_cache, slots[r] * kv_row, half), at(v, r * v_stride, half), (size_t)(kv_row * (half ? 2 : 4)));
    }
}

INLINE v8 exp8(v8 x) { /* relative error below 2e-7; 0 below -87, infinite above 88 */
    i8x is_low = x < splat(-87.0f);
    i8x is_high = x > splat(88.0f);
    x = where(is_low, splat(-87.0f), where(is_high, splat(88.0f), x));
    v8 scaled = x * splat(1.44269504f);
    v8 shifted = scaled + splat(12582912.0f); /* 1.5 * 2^23: rounds to an integer in the low bits */
    i8x n = (i8x)shifted - (i8x)splat(12582912.0f);
    v8 whole = shifted - splat(12582912.0f);
    v8 r = x - whole * splat(0.693359375f) + whole * splat(2.12194440e-4f);
    v8 p = splat(1.9875691500e-4f);
    p = p * r + splat(1.3981999507e-3f);
    p = p * r + splat(8.3334519073e-3f);
    p = p * r + splat(4.1665795894e-2f);
    p = p * r + splat(1.6666665459e-1f);
    p = p * r + splat(5.0000001201e-1f);
    p = p * r * r + r + splat(1.0f);
    return where(is_low, splat(0.0f), where(is_high, splat(INFINITY), p * (v8)((n + 127) << 23)));
}

INLINE void silu_row(const void *gate, const void *up, void *y, int64_t num_inner, int half) {
    for (int64_t i = 0; i < num_inner; i += LANES) {
        v8 g = load(gate, i, half), silu = g / (splat(1.0f) + exp8(-g));
        store(y, i, rounded(silu, half) * load(up, i, half), half);
    }
}

/* y = silu(gate) * up; gate and up are the halves of a row. F is a multiple of 8. */
void heddle_silu_mul(const void *gate_up, void *y, int64_t num_rows, int64_t num_inner, int half) {
#pragma omp parallel for schedule(static) if (num_rows * num_inner >= MIN_PARALLEL)
    for (int64_t r = 0; r < num_rows; r++) {
        const void *gate = at(gate_up, 2 * r * num_inner, half), *up = at(gate_up, (2 * r + 1) * num_inner, half);
        if (half) silu_row(gate, up, at(y, r * num_inner, 1), num_inner, 1);
        else silu_row(gate, up, at(y, r * num_inner, 0), num_inner, 0);
    }
}

/* --- ragged attention ------------------------------------------------------------------------------------------------ */

typedef struct {
    int64_t start, end;   /* rows of the batch */
    int64_t first_key;    /* into `slots`: context, then the segment's own rows */
    int64_t num_keys;
    int64_t mask;         /* into `masks`, words of the first row; -1: causal */
    int64_t mask_words;   /* 64-bit words per row */
} segment_t;

INLINE v8 sum_each(const v8 a[8]) { /* lane j: the sum of a[j]'s lanes, in one fixed order */
    v8 b[4], c[2];
    for (int i = 0; i < 4; i++)
        b[i] = __builtin_shuffle(a[2 * i], a[2 * i + 1], (i8x){0, 8, 2, 10, 4, 12, 6, 14}) +
               __builtin_shuffle(a[2 * i], a[2 * i + 1], (i8x){1, 9, 3, 11, 5, 13, 7, 15});
    for (int i = 0; i < 2; i++)
        c[i] = __builtin_shuffle(b[2 * i], b[2 * i + 1], (i8x){0, 1, 8, 9, 4, 5, 12, 13}) +
               __builtin_shuffle(b[2 * i], b[2 * i + 1], (i8x){2, 3, 10, 11, 6, 7, 14, 15});
    return __builtin_shuffle(c[0], c[1], (i8x){0, 1, 2, 3, 8, 9, 10, 11}) +
           __builtin_shuffle(c[0], c[1], (i8x){4, 5, 6, 7, 12, 13, 14, 15});
}

INLINE void scores_of(const float *q, const float *keys, float *scores, int64_t num_keys, int dim, float scale) {
    for (int64_t j = 0; j < num_keys; j += LANES) {
        v8 acc[8];
#pragma GCC unroll 8
        for (int k = 0; k < 8; k++) acc[k] = splat(0.0f);
        for (int d = 0; d < dim; d += LANES) {
            v8 qd = *(const v8 *)(q + d);
#pragma GCC unroll 8
            for (int k = 0; k < 8; k++) acc[k] += qd * *(const v8 *)(keys + (j + k) * dim + d);
        }
        *(v8_mem *)(scores + j) = sum_each(acc) * splat(scale);
    }
}

/* out[D] += p[j] values[j][D] and weights += p[j], key after key: a weight of 0 changes nothing, wherever it stands. */
INLINE void add_values(float *out, float *weights, const float *p, const float *values, int64_t num_keys, int dim, int width) {
    for (int d0 = 0; d0 < dim; d0 += width) {
        v8 acc[8], total_weight = *(v8 *)weights;
#pragma GCC unroll 8
        for (int c = 0; c < width / LANES; c++) acc[c] = *(v8 *)(out + d0 + c * LANES);
        for (int64_t j = 0; j < num_keys; j++) {
            v8 pj = splat(p[j]);
            total_weight += pj;
#pragma GCC unroll 8
            for (int c = 0; c < width / LANES; c++) acc[c] += pj * *(const v8 *)(values + j * dim + d0 + c * LANES);
        }
#pragma GCC unroll 8
        for (int c = 0; c < width / LANES; c++) *(v8 *)(out + d0 + c * LANES) = acc[c];
        if (d0 + width == dim) *(v8 *)weights = total_weight;
    }
}

INLINE void widen(const void *row, float *to, int dim, int half) {
#pragma GCC unroll 16
    for (int d = 0; d < dim; d += LANES) *(v8 *)(to + d) = load(row, d, half);
}

#define PREFETCH_KEYS 16

/* Scores of one row for the keys [first, num_keys): `heads` queries share each key, 8 products at a time. */
INLINE void few_scores(const float *q, const char *cache, int64_t key_bytes, const int64_t *slots, int64_t first, int64_t num_keys, int dim,
                       float scale, float *scores, int64_t padded, int heads, int half) {
    int at_once = 8 / heads;
    for (int64_t j = first; j < num_keys; j += at_once) {
        const char *keys[8];
        v8 acc[8];
#pragma GCC unroll 8
        for (int k = 0; k < at_once; k++) {
            int64_t ahead = j + k + PREFETCH_KEYS;
            const char *next = cache + slots[ahead < num_keys ? ahead : num_keys - 1] * key_bytes;
            __builtin_prefetch(next);
            __builtin_prefetch(next + 64);
            keys[k] = cache + slots[j + k < num_keys ? j + k : num_keys - 1] * key_bytes;
        }
#pragma GCC unroll 8
        for (int k = 0; k < 8; k++) acc[k] = splat(0.0f);
#pragma GCC unroll 4
        for (int d = 0; d < dim; d += LANES) {
            v8 key[8];
#pragma GCC unroll 8
            for (int k = 0; k < at_once; k++) key[k] = load(keys[k], d, half);
#pragma GCC unroll 4
            for (int h = 0; h < heads; h++) {
                v8 qd = *(const v8 *)(q + h * dim + d);
#pragma GCC unroll 8
                for (int k = 0; k < at_once; k++) acc[h * at_once + k] += qd * key[k];
            }
        }
        v8 sums = sum_each(acc) * splat(scale);
        for (int h = 0; h < heads; h++)
            for (int k = 0; k < at_once && j + k < num_keys; k++) scores[h * padded + j + k] = sums[h * at_once + k];
    }
}

INLINE void few_values(const char *cache, int64_t key_bytes, const int64_t *slots, int64_t first, int64_t num_keys, int dim,
                       const float *scores, int64_t padded, float *out, float *weights, int heads, int width, int half) {
    for (int d0 = 0; d0 < dim; d0 += width * LANES) {
        v8 acc[4][8], total_weight[4];
#pragma GCC unroll 4
        for (int h = 0; h < heads; h++) {
            total_weight[h] = splat(0.0f);
#pragma GCC unroll 8
            for (int c = 0; c < width; c++) acc[h][c] = splat(0.0f);
        }
        for (int64_t j = first; j < num_keys; j++) {
            int64_t ahead = j + PREFETCH_KEYS < num_keys ? j + PREFETCH_KEYS : num_keys - 1;
            const char *value = cache + slots[j] * key_bytes, *next = cache + slots[ahead] * key_bytes;
            __builtin_prefetch(next);
            __builtin_prefetch(next + 64);
            v8 p[4];
#pragma GCC unroll 4
            for (int h = 0; h < heads; h++) p[h] = splat(scores[h * padded + j]);
#pragma GCC unroll 8
            for (int c = 0; c < width; c++) {
                v8 v = load(value, d0 + c * LANES, half);
#pragma GCC unroll 4
                for (int h = 0; h < heads; h++) acc[h][c] += p[h] * v;
            }
            if (d0 == 0)
                for (int h = 0; h < heads; h++) total_weight[h] += p[h];
        }
#pragma GCC unroll 4
        for (int h = 0; h < heads; h++) {
            if (d0 == 0) *(v8 *)(weights + h * LANES) = total_weight[h];
#pragma GCC unroll 8
            for (int c = 0; c < width; c++) *(v8 *)(out + h * dim + d0 + c * LANES) = acc[h][c];
        }
    }
}

#define FEW_OF(HEADS, WIDTH, HALF)                                                                                                   \
    do {                                                                                                                             \
        if (!pass) few_scores(q, cache, key_bytes, slots, first, num_keys, dim, scale, scores, padded, HEADS, HALF);                 \
        else few_values(cache, key_bytes, slots, first, num_keys, dim, scores, padded, out, weights, HEADS, WIDTH, HALF);            \
    } while (0)

/* Scores (pass 0) or values (pass 1) of one row and up to 4 heads, straight from the cache: its keys are used once. */
static void few(int pass, const float *q, const char *cache, int64_t key_bytes, const int64_t *slots, int64_t first, int64_t num_keys,
                int dim, float scale, float *scores, int64_t padded, float *out, float *weights, int heads, int half) {
    switch (heads * 2 + half) {
    case 2: FEW_OF(1, 4, 0); break;
    case 3: FEW_OF(1, 4, 1); break;
    case 4: FEW_OF(2, 4, 0); break;
    case 5: FEW_OF(2, 4, 1); break;
    case 6: FEW_OF(3, 4, 0); break;
    case 7: FEW_OF(3, 4, 1); break;
    case 8: FEW_OF(4, 2, 0); break;
    case 9: FEW_OF(4, 2, 1); break;
    }
}

INLINE int is_visible(const segment_t *s, const uint64_t *masks, int64_t own_row, int64_t own_key) {
    return (int)(masks[s->mask + own_row * s->mask_words + own_key / 64] >> (own_key % 64) & 1);
}

static int64_t depth_of(const segment_t *s, const uint64_t *masks, int64_t own_row) { /* own keys it sees besides itself */
    int64_t count = 0;
    for (int64_t w = 0; w < s->mask_words; w++) count += __builtin_popcountll(masks[s->mask + own_row * s->mask_words + w]);
    return count - 1;
}

static void hide(const segment_t *s, const uint64_t *masks, int64_t own_row, int64_t window, float *scores) {
    int64_t rows = s->end - s->start, context = s->num_keys - rows;
    for (int64_t j = 0; j < rows; j++)
        if (!is_visible(s, masks, own_row, j)) scores[context + j] = -INFINITY;
    if (window <= 0) return;
    int64_t position = context + depth_of(s, masks, own_row), first = position - window + 1;
    for (int64_t j = 0; j < context && j < first; j++) scores[j] = -INFINITY;
    for (int64_t j = 0; j < rows; j++)
        if (scores[context + j] != -INFINITY && context + depth_of(s, masks, j) < first) scores[context + j] = -INFINITY;
}

INLINE void softmax_weights(float *scores, int64_t num_padded) { /* exp(score - highest); the sum is taken with the values */
    v8 highest = splat(-INFINITY);
    for (int64_t j = 0; j < num_padded; j += LANES) {
        v8 s = *(v8_mem *)(scores + j);
        highest = where((s > highest) | (s != s), s, highest);
    }
    float top = highest[0];
    for (int i = 1; i < LANES; i++) top = highest[i] > top || highest[i] != highest[i] ? highest[i] : top;
    for (int64_t j = 0; j < num_padded; j += LANES) *(v8_mem *)(scores + j) = exp8(*(v8_mem *)(scores + j) - splat(top));
}

/* Scores (pass 0) or values (pass 1) of several rows for the keys [first, num_keys), which are widened block by block. */
static void many(int pass, const float *queries, const char *cache, int64_t key_bytes, const int64_t *slots, int64_t first, int64_t num_keys,
                 int dim, float scale, float *scores, int64_t padded, float *outs, float *weights, int64_t pairs, float *wide, int half) {
    for (int64_t j0 = first; j0 < num_keys; j0 += KEY_BLOCK) {
        int64_t count = num_keys - j0 < KEY_BLOCK ? num_keys - j0 : KEY_BLOCK, filled = padded8(count);
        for (int64_t j = 0; j < count; j++) {
            const char *row = cache + slots[j0 + j] * key_bytes;
            if (dim == 64 && half) widen(row, wide + j * 64, 64, 1);
            else if (half) widen(row, wide + j * dim, dim, 1);
            else widen(row, wide + j * dim, dim, 0);
        }
        if (!pass) memset(wide + count * dim, 0, (size_t)((filled - count) * dim) * sizeof(float));
        for (int64_t i = 0; i < pairs; i++) {
            const float *q = queries + i * dim;
            float *row = scores + i * padded + j0, *out = outs + i * dim, *weight = weights + i * LANES;
            if (!pass) {
                if (dim == 64) scores_of(q, wide, row, filled, 64, scale);
                else if (dim == 128) scores_of(q, wide, row, filled, 128, scale);
                else scores_of(q, wide, row, filled, dim, scale);
            } else {
                if (dim == 64) add_values(out, weight, row, wide, count, 64, 64);
                else if (dim == 128) add_values(out, weight, row, wide, count, 128, 64);
                else add_values(out, weight, row, wide, count, dim, LANES);
            }
        }
    }
}

/* Floats of scratch space for a task of so many (row, head) pairs. */
INLINE int64_t attend_floats(int64_t pairs, int64_t num_keys, int64_t dim) {
    return KEY_BLOCK * dim + pairs * (2 * dim + LANES + padded8(num_keys) + LANES);
}

/* Rows [row0, row1) of a segment and query heads [head0, head1) of one key/value head. */
static void attend(const segment_t *s, const int64_t *slots, const uint64_t *masks, int64_t row0, int64_t row1, int64_t kv_head, int64_t head0,
                   int64_t head1, const void *q, const void *k_cache, const void *v_cache, void *out, int64_t num_heads,
                   int64_t num_kv_heads, int dim, float scale, int64_t window, int half, float *work) {
    int64_t rows = s->end - s->start, context = s->num_keys - rows, heads = head1 - head0, pairs = (row1 - row0) * heads;
    int64_t num_keys = s->mask < 0 ? context + row1 : s->num_keys; /* causal: later own rows are seen by none of these */
    int64_t padded = padded8(num_keys), key_bytes = num_kv_heads * dim * (half ? 2 : 4), head_bytes = kv_head * dim * (half ? 2 : 4);
    int64_t first = window > 0 && context + row0 - window + 1 > 0 && s->mask < 0 ? (context + row0 - window + 1) / LANES * LANES : 0;
    const int64_t *own = slots + s->first_key;
    float *wide = work, *queries = wide + KEY_BLOCK * dim, *outs = queries + pairs * dim, *weights = outs + pairs * dim;
    float *scores = weights + pairs * LANES;
    int is_few = row1 - row0 == 1 && dim % 32 == 0;
    for (int64_t i = 0; i < pairs; i++) {
        int64_t from = ((s->start + row0 + i / heads) * num_heads + head0 + i % heads) * dim;
        for (int d = 0; d < dim; d += LANES) {
            *(v8 *)(queries + i * dim + d) = load(q, from + d, half);
            *(v8 *)(outs + i * dim + d) = splat(0.0f);
        }
        *(v8 *)(weights + i * LANES) = splat(0.0f);
    }
    for (int pass = 0; pass < 2; pass++) {
        const char *cache = (const char *)(pass ? v_cache : k_cache) + head_bytes;
        if (is_few)
            for (int64_t h = 0; h < heads; h += 4)
                few(pass, queries + h * dim, cache, key_bytes, own, first, num_keys, dim, scale, scores + h * padded, padded, outs + h * dim,
                    weights + h * LANES, (int)(heads - h < 4 ? heads - h : 4), half);
        else
            many(pass, queries, cache, key_bytes, own, first, num_keys, dim, scale, scores, padded, outs, weights, pairs, wide, half);
        if (pass) break;
        for (int64_t i = 0; i < pairs; i++) {
            float *row = scores + i * padded;
            int64_t own_row = row0 + i / heads;
            for (int64_t j = num_keys; j < padded; j++) row[j] = -INFINITY;
            if (s->mask >= 0) {
                hide(s, masks, own_row, window, row);
            } else {
                for (int64_t j = context + own_row + 1; j < num_keys; j++) row[j] = -INFINITY;
                for (int64_t j = first; window > 0 && j < context + own_row - window + 1; j++) row[j] = -INFINITY;
            }
            softmax_weights(row + first, padded - first);
        }
    }
    for (int64_t i = 0; i < pairs; i++) {
        int64_t to = ((s->start + row0 + i / heads) * num_heads + head0 + i % heads) * dim;
        v8 weight = *(v8 *)(weights + i * LANES);
        for (int d = 0; d < dim; d += LANES) store(out, to + d, *(v8 *)(outs + i * dim + d) / weight, half);
    }
}

/* `tasks` [num_tasks][4]: segment, first row, last row, first query head; each has `task_heads` query heads of one kv head.
 * Returns 0, or -1 if there was no memory. D is a multiple of 8. */
int heddle_attention(const void *q, const void *k_cache, const void *v_cache, void *out, const segment_t *segments, const int64_t *slots,
                     const uint64_t *masks, const int64_t *tasks, int64_t num_tasks, int64_t task_heads,
                     int64_t num_heads, int64_t num_kv_heads, int64_t dim, float scale, int64_t window, int half) {
    int failed = 0;
    int64_t group = num_heads / num_kv_heads;
#pragma omp parallel
    {
        int64_t most = 0;
        for (int64_t t = 0; t < num_tasks; t++) {
            int64_t need = attend_floats((tasks[4 * t + 2] - tasks[4 * t + 1]) * task_heads, segments[tasks[4 * t]].num_keys, dim);
            if (need > most) most = need;
        }
        float *work = scratch((size_t)most);
        if (!work) {
#pragma omp atomic write
            failed = 1;
        } else {
#pragma omp for schedule(dynamic, 1)
            for (int64_t t = 0; t < num_tasks; t++) {
                const int64_t *task = tasks + 4 * t;
                attend(segments + task[0], slots, masks, task[1], task[2], task[3] / group, task[3], task[3] + task_heads, q, k_cache,
                       v_cache, out, num_heads, num_kv_heads, (int)dim, scale, window, half, work);
            }
        }
    }
    return failed ? -1 : 0;
}

/* --- low-rank updates of many adapters -------------------------------------------------------------------------------- */

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

/* --- all layers of a decoder in one call -------------------------------------------------------------------------------- */

typedef struct { /* packed weights; NULL: no bias, no norm of heads */
    const void *input_norm, *qkv, *qkv_bias, *q_norm, *k_norm, *o, *o_bias, *post_norm, *gate_up, *down;
    int64_t window;
} layer_t;

typedef struct {
    int64_t num_layers, num_hidden, num_inner, num_heads, num_kv_heads, head_dim, half;
    double eps, scale;
} shape_t;

typedef struct {
    const segment_t *segments;
    const int64_t *slots;
    const uint64_t *masks;
    const int64_t *tasks;
    int64_t num_tasks, task_heads;
} attention_t;

typedef struct {
    const lora_t *segments;
    const int64_t *tasks;
    int64_t num_down, num_tasks, num_low;
} lora_work_t;

/* Elements of a row in the scratch space: y (or z), qkv, q (or the attention's input), attention's output, o (or down), gate_up, h. */
int64_t heddle_layers_width(const shape_t *p) {
    int64_t q = p->num_heads * p->head_dim, kv = p->num_kv_heads * p->head_dim;
    return 2 * p->num_hidden + 3 * q + 2 * kv + 3 * p->num_inner;
}

static int adapt(const lora_work_t *work, void *y, int64_t num_out, const void *x, int64_t num_in, int half) {
    return work->num_tasks ? heddle_lora(y, num_out, x, num_in, num_in, work->segments, work->tasks, work->num_down, work->num_tasks, work->num_low, half) : 0;
}

static void norm_heads(void *x, int64_t x_stride, const void *weight, int64_t num_rows, int64_t num_heads, int64_t head_dim, float eps, int half) {
#pragma omp parallel for schedule(static) if (num_rows * num_heads * head_dim >= MIN_PARALLEL)
    for (int64_t r = 0; r < num_rows; r++)
        for (int64_t h = 0; h < num_heads; h++) {
            void *head = at(x, r * x_stride + h * head_dim, half);
            if (half) norm_row(head, NULL, weight, NULL, head, head_dim, eps, 1);
            else norm_row(head, NULL, weight, NULL, head, head_dim, eps, 0);
        }
}

/* x [T, H]: embeddings, and then the hidden states behind the last layer. `work`: heddle_layers_width elements for each row. `lora`:
 * four for each layer (qkv, o, gate_up, down), or NULL. `kept`: where a copy of the states behind each layer but the last goes, NULL for
 * nowhere. Returns 0, or -1 if there was no memory. Every operation is the one above. */
int heddle_layers(const shape_t *p, const layer_t *layers, void *const *k_caches, void *const *v_caches, const attention_t *attention,
                  const lora_work_t *lora, const void *cos, const void *sin, const int64_t *slots, int64_t num_rows, void *x, void *work,
                  void *const *kept) {
    int half = (int)p->half, status = 0;
    int64_t hidden = p->num_hidden, inner = p->num_inner, q_width = p->num_heads * p->head_dim, kv_width = p->num_kv_heads * p->head_dim;
    int64_t qkv_width = q_width + 2 * kv_width;
    float eps = (float)p->eps;
    void *y = work, *out = at(y, num_rows * hidden, half), *qkv = at(out, num_rows * hidden, half), *q = at(qkv, num_rows * qkv_width, half);
    void *attended = at(q, num_rows * q_width, half), *gate_up = at(attended, num_rows * q_width, half);
    void *h = at(gate_up, 2 * num_rows * inner, half);
    heddle_rms_norm(x, NULL, layers[0].input_norm, NULL, y, num_rows, hidden, eps, half);
    for (int64_t l = 0; l < p->num_layers && !status; l++) {
        const layer_t *w = layers + l;
        const lora_work_t *updates = lora + 4 * l;
        void *k = at(qkv, q_width, half), *v = at(qkv, q_width + kv_width, half);
        status |= heddle_linear(y, hidden, w->qkv, w->qkv_bias, qkv, qkv_width, num_rows, hidden, qkv_width, half);
        if (lora) status |= adapt(updates, qkv, qkv_width, y, hidden, half);
        if (w->q_norm) norm_heads(qkv, qkv_width, w->q_norm, num_rows, p->num_heads, p->head_dim, eps, half);
        if (w->k_norm) norm_heads(k, qkv_width, w->k_norm, num_rows, p->num_kv_heads, p->head_dim, eps, half);
        heddle_rope_and_cache(qkv, qkv_width, k, qkv_width, v, qkv_width, cos, sin, q, k_caches[l], v_caches[l], slots, num_rows,
                              p->num_heads, p->num_kv_heads, p->head_dim, half);
        status |= heddle_attention(q, k_caches[l], v_caches[l], attended, attention->segments, attention->slots, attention->masks,
                                   attention->tasks, attention->num_tasks, attention->task_heads, p->num_heads, p->num_kv_heads, p->head_dim,
                                   (float)p->scale, w->window, half);
        status |= heddle_linear(attended, q_width, w->o, w->o_bias, out, hidden, num_rows, q_width, hidden, half);
        if (lora) status |= adapt(updates + 1, out, hidden, attended, q_width, half);
        heddle_rms_norm(x, out, w->post_norm, x, y, num_rows, hidden, eps, half);
        status |= heddle_linear(y, hidden, w->gate_up, NULL, gate_up, 2 * inner, num_rows, hidden, 2 * inner, half);
        if (lora) status |= adapt(updates + 2, gate_up, 2 * inner, y, hidden, half);
        heddle_silu_mul(gate_up, h, num_rows, inner, half);
        status |= heddle_linear(h, inner, w->down, NULL, out, hidden, num_rows, inner, hidden, half);
        if (lora) status |= adapt(updates + 3, out, hidden, h, inner, half);
        if (l + 1 < p->num_layers) heddle_rms_norm(x, out, layers[l + 1].input_norm, x, y, num_rows, hidden, eps, half);
        if (kept[l]) memcpy(kept[l], x, num_rows * hidden * (half ? 2 : 4));
    }
    for (int64_t i = 0; i < num_rows * hidden; i += LANES) store(x, i, load(x, i, half) + load(out, i, half), half);
    return status;
}

/* --- moving cache rows ------------------------------------------------------------------------------------------------ */

/* cache[dst] = cache[src] for rows of `row_bytes` in every cache; all reads come before all writes. Returns 0, or -1 without memory. */
int heddle_commit_kv(void *const *caches, int64_t num_caches, const int64_t *src, const int64_t *dst, int64_t num_rows, int64_t row_bytes) {
    char *held = (char *)scratch((size_t)(num_rows * row_bytes) / sizeof(float) + 1);
    if (!held) return -1;
    for (int64_t c = 0; c < num_caches; c++) {
        char *cache = caches[c];
        for (int64_t i = 0; i < num_rows; i++) memcpy(held + i * row_bytes, cache + src[i] * row_bytes, (size_t)row_bytes);
        for (int64_t i = 0; i < num_rows; i++) memcpy(cache + dst[i] * row_bytes, held + i * row_bytes, (size_t)row_bytes);
    }
    return 0;
}

/* --- drawing tokens ---------------------------------------------------------------------------------------------------- */

#define DRAW_BLOCK 128 /* weights whose sum is kept while the right one is looked for */
#define BUCKETS 1024   /* of weights in [0, 1] by exponent and 3 bits of mantissa: more probable ones have higher buckets */

typedef struct {
    double temperature, top_p, min_p, uniform;
    int64_t top_k; /* 0: all */
    int64_t row;
} draw_t;

typedef struct {
    float weight;
    int32_t token;
} candidate_t;

static int by_weight(const void *a, const void *b) { /* descending; of equal ones the lower token first */
    const candidate_t *x = a, *y = b;
    if (x->weight != y->weight) return x->weight < y->weight ? 1 : -1;
    return x->token < y->token ? -1 : 1;
}

INLINE int bucket_of(float weight) {
    union { float f; uint32_t u; } x = {weight};
    return (int)(x.u >> 20);
}

/* The least probable token that top_k and top_p keep: its weight, and of equally probable ones the last token. */
static candidate_t last_kept(const float *weights, int64_t num_tokens, const draw_t *draw, candidate_t *candidates) {
    double mass[BUCKETS] = {0}, total = 0.0;
    int64_t counts[BUCKETS] = {0}, top_k = draw->top_k > 0 && draw->top_k < num_tokens ? draw->top_k : 0;
    for (int64_t i = 0; i < num_tokens; i++) {
        int bucket = bucket_of(weights[i]);
        counts[bucket]++;
        mass[bucket] += weights[i];
        total += weights[i];
    }
    int lowest = BUCKETS - 1;
    int64_t count = counts[lowest], num_candidates = 0;
    double sum = mass[lowest];
    while (lowest > 0 && (top_k ? count < top_k : sum < draw->top_p * total)) lowest--, count += counts[lowest], sum += mass[lowest];
    for (int64_t i = 0; i < num_tokens; i++)
        if (bucket_of(weights[i]) >= lowest) candidates[num_candidates++] = (candidate_t){weights[i], (int32_t)i};
    qsort(candidates, (size_t)num_candidates, sizeof(candidate_t), by_weight);
    if (top_k && top_k < num_candidates) num_candidates = top_k;
    if (top_k) {
        total = 0.0;
        for (int64_t i = 0; i < num_candidates; i++) total += candidates[i].weight;
    }
    int64_t kept = 0;
    for (double before = 0.0; kept < num_candidates && (kept == 0 || before < draw->top_p * total); kept++) before += candidates[kept].weight;
    return candidates[kept - 1];
}

static int64_t draw_row(const void *logits, int64_t num_tokens, const draw_t *draw, float *weights, candidate_t *candidates, int half) {
    float highest = -INFINITY;
    for (int64_t i = 0; i < num_tokens; i++) {
        float value = load1(logits, i, half);
        highest = value > highest ? value : highest;
    }
    double inverse = 1.0 / draw->temperature;
    float scale = inverse < 3e38 ? (float)inverse : 3e38f;
    int64_t i = 0;
    for (; i + LANES <= num_tokens; i += LANES) {
        v8 value = load(logits, i, half);
        *(v8 *)(weights + i) = where(value == splat(-INFINITY), splat(0.0f), exp8((value - splat(highest)) * splat(scale)));
    }
    for (; i < num_tokens; i++) {
        float value = load1(logits, i, half);
        weights[i] = value == -INFINITY ? 0.0f : exp8(splat((value - highest) * scale))[0];
    }
    for (i = 0; draw->min_p > 0.0 && i < num_tokens; i++)
        if (weights[i] < draw->min_p) weights[i] = 0.0f;
    if ((draw->top_k > 0 && draw->top_k < num_tokens) || draw->top_p < 1.0) {
        candidate_t last = last_kept(weights, num_tokens, draw, candidates);
        for (i = 0; i < num_tokens; i++)
            if (weights[i] < last.weight || (weights[i] == last.weight && i > last.token)) weights[i] = 0.0f;
    }
    double total = 0.0;
    for (int64_t block = 0; block < num_tokens; block += DRAW_BLOCK) {
        double sum = 0.0;
        for (i = block; i < block + DRAW_BLOCK && i < num_tokens; i++) sum += weights[i];
        total += sum;
    }
    double wanted = draw->uniform * total, before = 0.0;
    int64_t found = -1;
    for (int64_t block = 0; block < num_tokens; block += DRAW_BLOCK) {
        double sum = 0.0, inside = before;
        for (i = block; i < block + DRAW_BLOCK && i < num_tokens; i++) sum += weights[i];
        if (sum > 0.0 && before + sum > wanted) {
            for (i = block; i < block + DRAW_BLOCK && i < num_tokens; i++) {
                if (weights[i] > 0.0f) found = i;
                inside += weights[i];
                if (weights[i] > 0.0f && inside > wanted) return i;
            }
            return found;
        }
        before += sum;
    }
    for (i = num_tokens - 1; i > 0 && weights[i] <= 0.0f; i--) {}
    return i;
}

/* tokens[i] is drawn from logits[draws[i].row], a row of V. Returns 0, or -1 if there was no memory. */
int heddle_draw(const void *logits, int64_t num_tokens, const draw_t *draws, int64_t num_draws, int64_t *tokens, int half) {
    int failed = 0;
#pragma omp parallel if (num_draws > 1)
    {
        float *weights = scratch((size_t)padded8(num_tokens) + (size_t)num_tokens * 2);
        if (!weights) {
#pragma omp atomic write
            failed = 1;
        } else {
#pragma omp for schedule(dynamic, 1)
            for (int64_t i = 0; i < num_draws; i++)
                tokens[i] = draw_row(at(logits, draws[i].row * num_tokens, half), num_tokens, draws + i, weights,
                                     (candidate_t *)(weights + padded8(num_tokens)), half);
        }
    }
    return failed ? -1 : 0;
}
