/* Vectors of floats: loads, stores, rounding, exp; scratch memory of a thread. Knows no operation.
 *
 * v8 has 8 floats everywhere. vec has WIDE of them: 16 where there is AVX-512, else it is v8. Widths are multiples of 8: with 16 lanes
 * the last vector of a row may be half full, and then `get_some` and `put_some` leave the rest alone.
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
#define MIN_PARALLEL 16384 /* elements below which waking threads costs more than it brings */

typedef float v8 __attribute__((vector_size(32)));
typedef uint32_t u8x __attribute__((vector_size(32)));
typedef int32_t i8x __attribute__((vector_size(32)));
typedef v8 v8_mem __attribute__((aligned(4), may_alias));

INLINE v8 splat(float x) { return (v8){x, x, x, x, x, x, x, x}; }

/* a * b + c, rounded once: where the compiler must not choose, for the same bits in two places. */
INLINE v8 fma8(v8 a, v8 b, v8 c) { return (v8)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c); }

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

#ifdef __AVX512F__
#define WIDE 16
typedef float vec __attribute__((vector_size(64)));
typedef uint32_t uvec __attribute__((vector_size(64)));
typedef int32_t ivec __attribute__((vector_size(64)));
typedef __mmask16 mask_t;

INLINE vec spread(float x) { return (vec)_mm512_set1_ps(x); }
INLINE vec fma_wide(vec a, vec b, vec c) { return (vec)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c); }
INLINE mask_t is_above(vec a, vec b) { return _mm512_cmp_ps_mask((__m512)a, (__m512)b, _CMP_GT_OQ); }
INLINE mask_t is_equal(vec a, vec b) { return _mm512_cmp_ps_mask((__m512)a, (__m512)b, _CMP_EQ_OQ); }
INLINE int any(mask_t condition) { return condition != 0; }
INLINE mask_t is_above_int(ivec a, int32_t b) { return _mm512_cmpgt_epi32_mask((__m512i)a, _mm512_set1_epi32(b)); }
INLINE mask_t is_nan(vec a) { return _mm512_cmp_ps_mask((__m512)a, (__m512)a, _CMP_UNORD_Q); }
INLINE vec choose(mask_t condition, vec a, vec b) { return (vec)_mm512_mask_blend_ps(condition, (__m512)b, (__m512)a); }

/* Of the lanes from element i on, those before `end`. */
INLINE mask_t before(int64_t i, int64_t end) { return end - i >= WIDE ? 0xffff : (mask_t)((1u << (end - i)) - 1); }

INLINE vec of_half(__m256i x) { return (vec)_mm512_slli_epi32(_mm512_cvtepu16_epi32(x), 16); }

INLINE vec get(const void *p, int64_t i, int half) {
    if (!half) return (vec)_mm512_loadu_ps((const float *)p + i);
    return of_half(_mm256_loadu_si256((const __m256i *)((const uint16_t *)p + i)));
}

INLINE vec get_some(const void *p, int64_t i, int64_t end, int half) { /* lanes from element `end` on are 0 */
    mask_t some = before(i, end);
    if (!half) return (vec)_mm512_maskz_loadu_ps(some, (const float *)p + i);
    return of_half(_mm256_maskz_loadu_epi16(some, (const uint16_t *)p + i));
}

INLINE uvec to_half_wide(vec x) { /* as to_half */
    uvec bits = (uvec)x, rounded = bits + (0x7fff + ((bits >> 16) & 1));
    return (uvec)_mm512_mask_mov_epi32((__m512i)rounded, is_nan(x), _mm512_set1_epi32(0x7fc00000));
}

INLINE __m256i narrow_wide(vec x) { return _mm512_cvtepi32_epi16((__m512i)(to_half_wide(x) >> 16)); }

INLINE void put(void *p, int64_t i, vec x, int half) {
    if (half) _mm256_storeu_si256((__m256i *)((uint16_t *)p + i), narrow_wide(x));
    else _mm512_storeu_ps((float *)p + i, (__m512)x);
}

INLINE void put_some(void *p, int64_t i, int64_t end, vec x, int half) {
    mask_t some = before(i, end);
    if (half) _mm256_mask_storeu_epi16((uint16_t *)p + i, some, narrow_wide(x));
    else _mm512_mask_storeu_ps((float *)p + i, some, (__m512)x);
}

INLINE vec get_lanes(const float *p, mask_t some) { return (vec)_mm512_maskz_loadu_ps(some, p); }
INLINE void put_lanes(float *p, mask_t some, vec x) { _mm512_mask_storeu_ps(p, some, (__m512)x); }
INLINE vec rounded_wide(vec x, int half) { return half ? (vec)(to_half_wide(x) & 0xffff0000u) : x; }

INLINE float total(vec x) {
    __m512 halves = _mm512_add_ps((__m512)x, _mm512_shuffle_f32x4((__m512)x, (__m512)x, 0x4e));
    v8 y = (v8)_mm512_castps512_ps256(halves);
    return ((y[0] + y[4]) + (y[2] + y[6])) + ((y[1] + y[5]) + (y[3] + y[7]));
}

INLINE vec sum_each(const vec a[WIDE]) { /* lane j: the sum of a[j]'s lanes, in one fixed order */
    __m512 b[8], c[4], d[2];
#pragma GCC unroll 8
    for (int i = 0; i < 8; i++) {
        __m512 one = (__m512)a[2 * i], two = (__m512)a[2 * i + 1];
        b[i] = _mm512_add_ps(_mm512_unpacklo_ps(one, two), _mm512_unpackhi_ps(one, two));
    }
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++) {
        __m512d one = (__m512d)b[2 * i], two = (__m512d)b[2 * i + 1];
        c[i] = _mm512_add_ps((__m512)_mm512_unpacklo_pd(one, two), (__m512)_mm512_unpackhi_pd(one, two));
    }
#pragma GCC unroll 2
    for (int i = 0; i < 2; i++)
        d[i] = _mm512_add_ps(_mm512_shuffle_f32x4(c[2 * i], c[2 * i + 1], 0x88), _mm512_shuffle_f32x4(c[2 * i], c[2 * i + 1], 0xdd));
    return (vec)_mm512_add_ps(_mm512_shuffle_f32x4(d[0], d[1], 0x88), _mm512_shuffle_f32x4(d[0], d[1], 0xdd));
}

INLINE vec exp_wide(vec x) { /* relative error below 2e-7; 0 below -87, infinite above 88.8 */
    mask_t is_there = _mm512_cmp_ps_mask((__m512)x, _mm512_set1_ps(-87.0f), _CMP_NLT_UQ);
    x = (vec)_mm512_min_ps(_mm512_set1_ps(100.0f), (__m512)x); /* of two of which one is NaN it takes the second */
    vec shifted = fma_wide(x, spread(1.44269504f), spread(12582912.0f)); /* 1.5 * 2^23: rounds to an integer */
    vec whole = shifted - spread(12582912.0f);
    vec r = fma_wide(whole, spread(2.12194440e-4f), fma_wide(whole, spread(-0.693359375f), x));
    vec p = spread(1.9875691500e-4f);
    p = fma_wide(p, r, spread(1.3981999507e-3f));
    p = fma_wide(p, r, spread(8.3334519073e-3f));
    p = fma_wide(p, r, spread(4.1665795894e-2f));
    p = fma_wide(p, r, spread(1.6666665459e-1f));
    p = fma_wide(p, r, spread(5.0000001201e-1f));
    p = fma_wide(p * r, r, r) + spread(1.0f);
    return (vec)_mm512_maskz_scalef_ps(is_there, (__m512)p, (__m512)whole);
}
INLINE vec over_one_plus_exp(vec a, vec x) { /* a / (1 + exp(x)) */
    vec below = exp_wide((vec)_mm512_min_ps(_mm512_set1_ps(88.0f), (__m512)x)) + spread(1.0f), inverse = (vec)_mm512_rcp14_ps((__m512)below);
    inverse = fma_wide(inverse, spread(1.0f) - below * inverse, inverse);
    return a * (vec)_mm512_maskz_mov_ps(_mm512_cmp_ps_mask((__m512)x, _mm512_set1_ps(88.0f), _CMP_NGT_UQ), (__m512)inverse);
}
#else
#define WIDE LANES
typedef v8 vec;
typedef i8x ivec;
typedef i8x mask_t;

INLINE vec spread(float x) { return splat(x); }
INLINE vec fma_wide(vec a, vec b, vec c) { return fma8(a, b, c); }
INLINE mask_t is_above(vec a, vec b) { return a > b; }
INLINE mask_t is_equal(vec a, vec b) { return a == b; }
INLINE int any(mask_t condition) { return _mm256_movemask_ps((__m256)condition) != 0; }
INLINE mask_t is_above_int(ivec a, int32_t b) { return a > b; }
INLINE mask_t is_nan(vec a) { return a != a; }
INLINE vec choose(mask_t condition, vec a, vec b) { return where(condition, a, b); }
INLINE vec get(const void *p, int64_t i, int half) { return load(p, i, half); }
INLINE vec get_some(const void *p, int64_t i, int64_t end, int half) { return (void)end, load(p, i, half); }
INLINE void put(void *p, int64_t i, vec x, int half) { store(p, i, x, half); }
INLINE void put_some(void *p, int64_t i, int64_t end, vec x, int half) { (void)end, store(p, i, x, half); }
INLINE mask_t before(int64_t i, int64_t end) { return (i8x){0, 1, 2, 3, 4, 5, 6, 7} < (int32_t)(end - i); }
INLINE vec get_lanes(const float *p, mask_t some) { return (vec)_mm256_maskload_ps(p, (__m256i)some); }
INLINE void put_lanes(float *p, mask_t some, vec x) { _mm256_maskstore_ps(p, (__m256i)some, (__m256)x); }
INLINE vec rounded_wide(vec x, int half) { return rounded(x, half); }
INLINE float total(vec x) { return ((x[0] + x[4]) + (x[2] + x[6])) + ((x[1] + x[5]) + (x[3] + x[7])); }

INLINE vec sum_each(const vec a[WIDE]) { /* lane j: the sum of a[j]'s lanes, in one fixed order */
    vec b[4], c[2];
    for (int i = 0; i < 4; i++)
        b[i] = __builtin_shuffle(a[2 * i], a[2 * i + 1], (i8x){0, 8, 2, 10, 4, 12, 6, 14}) +
               __builtin_shuffle(a[2 * i], a[2 * i + 1], (i8x){1, 9, 3, 11, 5, 13, 7, 15});
    for (int i = 0; i < 2; i++)
        c[i] = __builtin_shuffle(b[2 * i], b[2 * i + 1], (i8x){0, 1, 8, 9, 4, 5, 12, 13}) +
               __builtin_shuffle(b[2 * i], b[2 * i + 1], (i8x){2, 3, 10, 11, 6, 7, 14, 15});
    return __builtin_shuffle(c[0], c[1], (i8x){0, 1, 2, 3, 8, 9, 10, 11}) +
           __builtin_shuffle(c[0], c[1], (i8x){4, 5, 6, 7, 12, 13, 14, 15});
}

INLINE vec exp_wide(vec x) { /* relative error below 2e-7; 0 below -87, infinite above 88 */
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
INLINE vec over_one_plus_exp(vec a, vec x) { return a / (spread(1.0f) + exp_wide(x)); }
#endif

typedef vec vec_mem __attribute__((aligned(4), may_alias));

/* `n` floats in whole vectors. */
INLINE int64_t padded(int64_t n) { return (n + WIDE - 1) / WIDE * WIDE; }

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
