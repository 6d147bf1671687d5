/* Vectors of 8 floats: loads, stores, rounding; scratch memory of a thread. Knows no operation. */
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
