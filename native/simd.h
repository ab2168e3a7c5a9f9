// Vectors of the instruction set this file is compiled for. Everything is in the namespace QB_ISA, and nothing in it
// uses inline code of the standard library: the linker would keep one copy of that for all instruction sets.
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>

#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

#include "pool.h"
#include "quamba_cpu.h"

#ifndef QB_ISA
#error "QB_ISA names the instruction set that these files are compiled for."
#endif

#define QB_INLINE static inline __attribute__((always_inline))

// Before a loop over registers, whose count the compiler knows.
#if defined(__clang__)
#define QB_UNROLL _Pragma("unroll")
#else
#define QB_UNROLL _Pragma("GCC unroll 16")
#endif

namespace QB_ISA {

#if defined(__AVX512F__)
constexpr int kFloats = 16;
#elif defined(__AVX2__)
constexpr int kFloats = 8;
#else
constexpr int kFloats = 4;
#endif
constexpr int kBytes = 4 * kFloats;

typedef float vf __attribute__((vector_size(kBytes)));
typedef int32_t vi __attribute__((vector_size(kBytes)));
typedef int8_t vb __attribute__((vector_size(kBytes)));
typedef uint8_t vu __attribute__((vector_size(kBytes)));
typedef int8_t vb_quarter __attribute__((vector_size(kFloats)));
typedef uint16_t vh_half __attribute__((vector_size(kBytes / 2)));

template <class A, class B>
QB_INLINE constexpr auto least(A a, B b) -> decltype(a + b) {
    return a < b ? a : b;
}
template <class A, class B>
QB_INLINE constexpr auto most(A a, B b) -> decltype(a + b) {
    return a > b ? a : b;
}

template <class V>
QB_INLINE V load(const void *p) {
    V v;
    __builtin_memcpy(&v, p, sizeof v);
    return v;
}
template <class V>
QB_INLINE void store(void *p, V v) {
    __builtin_memcpy(p, &v, sizeof v);
}
QB_INLINE vf loadf(const float *p) { return load<vf>(p); }
QB_INLINE vf splat(float x) { return x - vf{}; }
QB_INLINE vi spliti(int32_t x) { return x - vi{}; }
// The second if either is NaN. (Compilers make two instructions of such a choice.)
QB_INLINE vf vmin(vf a, vf b) {
#if defined(__AVX512F__)
    return (vf)_mm512_min_ps((__m512)a, (__m512)b);
#elif defined(__AVX2__)
    return (vf)_mm256_min_ps((__m256)a, (__m256)b);
#else
    return a < b ? a : b;
#endif
}
QB_INLINE vf vmax(vf a, vf b) {
#if defined(__AVX512F__)
    return (vf)_mm512_max_ps((__m512)a, (__m512)b);
#elif defined(__AVX2__)
    return (vf)_mm256_max_ps((__m256)a, (__m256)b);
#else
    return a > b ? a : b;
#endif
}
QB_INLINE vf vabs(vf v) { return (vf)((vi)v & 0x7fffffff); }

/// The first count values, then zeros; as many as a vector has if count is larger.
QB_INLINE vf load_upto(const float *p, int64_t count) {
    if (count >= kFloats) return loadf(p);
    float values[kFloats] = {};
    __builtin_memcpy(values, p, 4 * count);
    return loadf(values);
}
QB_INLINE void store_upto(float *p, vf v, int64_t count) {
    __builtin_memcpy(p, &v, 4 * least(count, (int64_t)kFloats));
}
/// count rounded up to whole vectors.
QB_INLINE int64_t padded(int64_t count) { return (count + kFloats - 1) / kFloats * kFloats; }

QB_INLINE vi lanes() {
    vi v;
    for (int i = 0; i < kFloats; ++i) v[i] = i;
    return v;
}

/// v[i ^ kStep] in lane i.
template <int kStep>
QB_INLINE vf swap_lanes(vf v) {
#if defined(__clang__)
    vf r;
    for (int i = 0; i < kFloats; ++i) r[i] = v[i ^ kStep];
    return r;
#else
    return __builtin_shuffle(v, lanes() ^ kStep);
#endif
}

QB_INLINE float sum(vf v) {
#if defined(__AVX512F__)
    return _mm512_reduce_add_ps((__m512)v);
#else
    for (int width = kFloats / 2; width; width /= 2)
        for (int i = 0; i < width; ++i) v[i] += v[i + width];
    return v[0];
#endif
}

QB_INLINE int32_t sum(vi v) {
#if defined(__AVX512F__)
    return _mm512_reduce_add_epi32((__m512i)v);
#else
    for (int width = kFloats / 2; width; width /= 2)
        for (int i = 0; i < width; ++i) v[i] += v[i + width];
    return v[0];
#endif
}

/// The sum of v[i] in lane i, of kFloats vectors, which are overwritten.
template <int kStep = 1>
QB_INLINE vf sums_of(vf *v) {
    if constexpr (kStep < kFloats) {
        const vi odd = (lanes() & kStep) != 0;
        QB_UNROLL
        for (int i = 0; i < kFloats; i += 2 * kStep)
            v[i] = (odd ? v[i + kStep] : v[i]) + swap_lanes<kStep>(odd ? v[i] : v[i + kStep]);
        return sums_of<2 * kStep>(v);
    } else {
        return v[0];
    }
}

template <int kStep = 1>
QB_INLINE vi sums_of(vi *v) {
    if constexpr (kStep < kFloats) {
        const vi odd = (lanes() & kStep) != 0;
        QB_UNROLL
        for (int i = 0; i < kFloats; i += 2 * kStep)
            v[i] = (odd ? v[i + kStep] : v[i]) + (vi)swap_lanes<kStep>((vf)(odd ? v[i] : v[i + kStep]));
        return sums_of<2 * kStep>(v);
    } else {
        return v[0];
    }
}

// Integers of floats in the range of int32, to nearest, ties to even.
QB_INLINE vi round_even(vf v) {
#if defined(__AVX512F__)
    return (vi)_mm512_cvtps_epi32((__m512)v);
#elif defined(__AVX2__)
    return (vi)_mm256_cvtps_epi32((__m256)v);
#elif defined(__aarch64__)
    return (vi)vcvtnq_s32_f32((float32x4_t)v);
#else
    vi r;
    for (int i = 0; i < kFloats; ++i) r[i] = (int32_t)__builtin_nearbyintf(v[i]);
    return r;
#endif
}

QB_INLINE vf to_float(vi v) { return __builtin_convertvector(v, vf); }

// 2^-12 of the last digit beyond what float32 holds, in |x| < 87; 0 below, large above.
QB_INLINE vf vexp(vf x) {
    const vf clamped = vmin(vmax(x, splat(-87.3f)), splat(88.7f));
    const vi n = round_even(clamped * 1.442695041f);
    const vf k = to_float(n);
    vf r = clamped - k * 0.693359375f;
    r = r + k * 2.12194440e-4f;
    vf p = splat(1.9875691500e-4f);
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    // In two halves: 2^n alone would overflow where the product does not.
    const vi half = n >> 1;
    const vf result = p * (vf)((half + 127) << 23) * (vf)((n - half + 127) << 23);
    return x < -87.3f ? vf{} : result;
}

// The natural logarithm of normal floats > 0.
QB_INLINE vf vlog(vf x) {
    const vi bits = (vi)x;
    // The exponent for a mantissa in [sqrt(1/2), sqrt(2)).
    const vi e = (bits - 0x3f3504f3) >> 23;
    const vf m = (vf)(bits - (e << 23)) - 1.0f;
    vf p = splat(7.0376836292e-2f);
    p = p * m + -1.1514610310e-1f;
    p = p * m + 1.1676998740e-1f;
    p = p * m + -1.2420140846e-1f;
    p = p * m + 1.4249322787e-1f;
    p = p * m + -1.6668057665e-1f;
    p = p * m + 2.0000714765e-1f;
    p = p * m + -2.4999993993e-1f;
    p = p * m + 3.3333331174e-1f;
    const vf k = to_float(e);
    vf y = p * m * m * m;
    y = y + k * -2.12194440e-4f;
    y = y - 0.5f * m * m;
    return m + y + k * 0.693359375f;
}

// 2^(time * rate) for products below 127. What is below 2^-126 may be 0 or 2^-126.
QB_INLINE vf vdecay(vf time, vf rate) {
#if defined(__AVX512F__)
    const __m512 whole = _mm512_roundscale_ps((__m512)(time * rate), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    const vf part = (vf)_mm512_fmsub_ps((__m512)time, (__m512)rate, whole);
#else
    const vf product = vmax(time * rate, splat(-126.0f));
    // In the lowest bits of a float of this size is an integer.
    const vf shifted = product + 12582912.0f;
    const vf part = product - (shifted - 12582912.0f);
#endif
    vf p = splat(1.326472731e-3f);
    p = p * part + 9.671512991e-3f;
    p = p * part + 5.550733581e-2f;
    p = p * part + 2.402224243e-1f;
    p = p * part + 6.931470037e-1f;
    p = p * part + 1.0f;
#if defined(__AVX512F__)
    return (vf)_mm512_scalef_ps((__m512)p, whole);
#else
    return (vf)((vi)p + ((vi)shifted << 23));
#endif
}
constexpr float kLog2E = 1.442695041f;

// 1 / v to the last digit or two, of normal numbers.
QB_INLINE vf vreciprocal(vf v) {
#if defined(__AVX512F__)
    const vf r = (vf)_mm512_rcp14_ps((__m512)v);
    return r + r * (1.0f - v * r);
#else
    return 1.0f / v;
#endif
}

// exp(-|v|)
QB_INLINE vf vexp_below(vf v) { return vdecay(vmin(vabs(v), splat(100.0f)), splat(-kLog2E)); }

// log(1 + exp(v)); above 20 that is v.
QB_INLINE vf vsoftplus(vf v) {
    const vf e = vexp_below(v);
    // log(1 + e) = 2 artanh(e / (2 + e))
    const vf s = e * vreciprocal(2.0f + e), q = s * s;
    vf p = splat(1.400599734e-1f);
    p = p * q + 1.400090228e-1f;
    p = p * q + 2.001076445e-1f;
    p = p * q + 3.333320783e-1f;
    return vmax(v, vf{}) + (2.0f * s + 2.0f * s * q * p);
}

QB_INLINE vf vsilu(vf v) {
    const vf e = vexp_below(v);
    return (v < 0.0f ? v * e : v) * vreciprocal(1.0f + e);
}

QB_INLINE vf rsqrt_exact(vf v) {
    vf r;
#if defined(__AVX512F__)
    r = (vf)_mm512_sqrt_ps((__m512)v);
#elif defined(__AVX2__)
    r = (vf)_mm256_sqrt_ps((__m256)v);
#elif defined(__aarch64__)
    r = (vf)vsqrtq_f32((float32x4_t)v);
#else
    for (int i = 0; i < kFloats; ++i) r[i] = __builtin_sqrtf(v[i]);
#endif
    return 1.0f / r;
}

// 16-bit floats and codes, a vector of floats at a time.

QB_INLINE vf from_bf16(const uint16_t *p) {
#if defined(__AVX512F__)
    return (vf)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)p)), 16);
#elif defined(__AVX2__)
    return (vf)_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i *)p)), 16);
#else
    typedef uint32_t vw __attribute__((vector_size(kBytes)));
    return (vf)(__builtin_convertvector(load<vh_half>(p), vw) << 16);
#endif
}

QB_INLINE void to_bf16(uint16_t *p, vf v) {
    typedef uint32_t vw __attribute__((vector_size(kBytes)));
    const vw bits = (vw)v;
    const vw rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    const vw nan = (bits >> 16) | 64;
    const vw r = (v != v) ? nan : rounded;
#if defined(__AVX512F__)
    _mm256_storeu_si256((__m256i *)p, _mm512_cvtepi32_epi16((__m512i)r));
#elif defined(__AVX2__)
    _mm_storeu_si128((__m128i *)p, _mm_packus_epi32(_mm256_castsi256_si128((__m256i)r),
                                                    _mm256_extracti128_si256((__m256i)r, 1)));
#else
    store(p, __builtin_convertvector(r, vh_half));
#endif
}

QB_INLINE vf from_f16(const uint16_t *p) {
#if defined(__AVX512F__)
    return (vf)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)p));
#elif defined(__AVX2__)
    return (vf)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)p));
#elif defined(__aarch64__)
    return (vf)vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(p)));
#endif
}

QB_INLINE void to_f16(uint16_t *p, vf v) {
#if defined(__AVX512F__)
    _mm256_storeu_si256((__m256i *)p, _mm512_cvtps_ph((__m512)v, _MM_FROUND_TO_NEAREST_INT));
#elif defined(__AVX2__)
    _mm_storeu_si128((__m128i *)p, _mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT));
#elif defined(__aarch64__)
    vst1_u16(p, vreinterpret_u16_f16(vcvt_f16_f32((float32x4_t)v)));
#endif
}

// GCC takes such conversions apart into those of single numbers, so the instructions are named.
QB_INLINE vi widen(const int8_t *p) {
#if defined(__AVX512F__)
    return (vi)_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i *)p));
#elif defined(__AVX2__)
    return (vi)_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i *)p));
#else
    return __builtin_convertvector(load<vb_quarter>(p), vi);
#endif
}

// Integers as bytes: the low eight bits.
QB_INLINE void narrow(int8_t *p, vi v) {
#if defined(__AVX512F__)
    _mm_storeu_si128((__m128i *)p, _mm512_cvtepi32_epi8((__m512i)v));
#elif defined(__AVX2__)
    const __m256i low = _mm256_setr_epi8(0, 4, 8, 12, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1,
                                         0, 4, 8, 12, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1);
    const __m256i four = _mm256_shuffle_epi8((__m256i)v, low);
    _mm_storel_epi64((__m128i *)p,
                     _mm_unpacklo_epi32(_mm256_castsi256_si128(four), _mm256_extracti128_si256(four, 1)));
#else
    store(p, __builtin_convertvector(v, vb_quarter));
#endif
}

/// The nearest integers, ties to even, as far as bytes hold them.
QB_INLINE void narrow_saturated(int8_t *p, vf v) {
#if defined(__AVX512F__)
    // Integers of what is too negative are the smallest ones, those of what is too large would be, too.
    const __m512i whole = _mm512_cvtps_epi32((__m512)vmin(v, splat(2e9f)));
    _mm_storeu_si128((__m128i *)p, _mm512_cvtsepi32_epi8(whole));
#else
    narrow(p, round_even(vmin(vmax(v, splat(-128.0f)), splat(127.0f))));
#endif
}

QB_INLINE float f16_value(uint16_t h) {
#if defined(__x86_64__)
    return _cvtsh_ss(h);
#elif defined(__aarch64__)
    uint16_t four[4] = {h, 0, 0, 0};
    return vgetq_lane_f32(vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(four))), 0);
#endif
}

// acc + sums of four products of unsigned and signed bytes, exact.
QB_INLINE vi dot(vi acc, vu a, vb b) {
#if defined(__AVX512VNNI__)
    return (vi)_mm512_dpbusd_epi32((__m512i)acc, (__m512i)a, (__m512i)b);
#elif defined(__AVXVNNI__)
    return (vi)_mm256_dpbusd_avx_epi32((__m256i)acc, (__m256i)a, (__m256i)b);
#elif defined(__AVX2__)
    // Products of neighbours would not fit 16 bits, so even and odd bytes go apart.
    const __m256i low = _mm256_set1_epi16(0xff), ones = _mm256_set1_epi16(1);
    const __m256i ua = (__m256i)a, sb = (__m256i)b;
    const __m256i even = _mm256_madd_epi16(_mm256_and_si256(ua, low), _mm256_srai_epi16(_mm256_slli_epi16(sb, 8), 8));
    const __m256i odd = _mm256_madd_epi16(_mm256_srli_epi16(ua, 8), _mm256_srai_epi16(sb, 8));
    (void)ones;
    return (vi)_mm256_add_epi32((__m256i)acc, _mm256_add_epi32(even, odd));
#elif defined(__ARM_FEATURE_MATMUL_INT8)
    return (vi)vusdotq_s32((int32x4_t)acc, (uint8x16_t)a, (int8x16_t)b);
#elif defined(__ARM_FEATURE_DOTPROD)
    // a = (a - 128) + 128: the signed product, and 128 times the sum of b.
    const int8x16_t shifted = (int8x16_t)(a ^ (uint8_t)0x80);
    const int32x4_t sums = vdotq_s32(vdupq_n_s32(0), vdupq_n_s8(1), (int8x16_t)b);
    return (vi)vaddq_s32(vdotq_s32((int32x4_t)acc, shifted, (int8x16_t)b), vshlq_n_s32(sums, 7));
#else
#error "No products of bytes for this instruction set."
#endif
}

// The same for a below 16.
QB_INLINE vi dot_small(vi acc, vu a, vb b) {
#if defined(__AVX2__) && !defined(__AVX512VNNI__) && !defined(__AVXVNNI__)
    const __m256i pairs = _mm256_maddubs_epi16((__m256i)a, (__m256i)b);
    return (vi)_mm256_add_epi32((__m256i)acc, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
#elif !defined(__x86_64__) && !defined(__ARM_FEATURE_MATMUL_INT8) && defined(__ARM_FEATURE_DOTPROD)
    return (vi)vdotq_s32((int32x4_t)acc, (int8x16_t)a, (int8x16_t)b);
#else
    return dot(acc, a, b);
#endif
}

// Four bytes, again and again.
QB_INLINE vb splat4(const int8_t *p) {
    int32_t four;
    __builtin_memcpy(&four, p, 4);
    return (vb)spliti(four);
}

// Tensors of any dtype, a row of floats at a time. first: a channel. Ends are masked by going one by one.

QB_INLINE const char *at(const QbTensor &t, int64_t batch, int64_t token) {
    const int64_t bytes = t.dtype == QB_F32 ? 4 : t.dtype == QB_I8 ? 1 : 2;
    return (const char *)t.data + bytes * (batch * t.batch_stride + token * t.token_stride);
}

/// Asks for channels of a row before they are needed: where rows are pages apart, no processor looks ahead.
template <int WRITE>
QB_INLINE void prefetch(const QbTensor &t, int64_t batch, int64_t token, int64_t first, int64_t count) {
    const int64_t bytes = t.dtype == QB_F32 ? 4 : t.dtype == QB_I8 ? 1 : 2;
    const char *p = at(t, batch, token) + bytes * first, *end = p + bytes * count;
    for (; p < end; p += 64) __builtin_prefetch(p, WRITE);
    __builtin_prefetch(end - 1, WRITE);
    asm volatile("");  // GCC leaves out calls of functions that do nothing but prefetch
}

QB_INLINE float bf16_value(uint16_t h) {
    const uint32_t bits = (uint32_t)h << 16;
    float x;
    __builtin_memcpy(&x, &bits, 4);
    return x;
}

/// Real values of channels [first, first + count) of one token.
static inline void read_row(float *out, const QbTensor &t, int64_t batch, int64_t token, int64_t first,
                            int64_t count) {
    const char *row = at(t, batch, token);
    int64_t i = 0;
    if (t.dtype == QB_F32) {
        __builtin_memcpy(out, (const float *)row + first, 4 * count);
    } else if (t.dtype == QB_BF16) {
        const uint16_t *p = (const uint16_t *)row + first;
        for (; i + kFloats <= count; i += kFloats) store(out + i, from_bf16(p + i));
        for (; i < count; ++i) out[i] = bf16_value(p[i]);
    } else if (t.dtype == QB_F16) {
        const uint16_t *p = (const uint16_t *)row + first;
        for (; i + kFloats <= count; i += kFloats) store(out + i, from_f16(p + i));
        for (; i < count; ++i) out[i] = f16_value(p[i]);
    } else {
        const int8_t *p = (const int8_t *)row + first;
        if (t.scale_step) {
            const float *scale = t.scale + first;
            for (; i + kFloats <= count; i += kFloats) store(out + i, to_float(widen(p + i)) * loadf(scale + i));
            for (; i < count; ++i) out[i] = (float)p[i] * scale[i];
        } else {
            const float scale = *t.scale;
            for (; i + kFloats <= count; i += kFloats) store(out + i, to_float(widen(p + i)) * scale);
            for (; i < count; ++i) out[i] = (float)p[i] * scale;
        }
    }
}

/// Codes of x / scale; both full vectors.
QB_INLINE vi codes_of(vf x, vf scale, int rounding, int overflow) {
    const vf exact = x / scale;
    // To wrap is to keep the low eight bits. Beyond int32, numbers count as its largest and smallest.
    const bool saturate = overflow == QB_SATURATE;
    const vf low = splat(saturate ? -128.0f : -2147483648.0f), high = splat(saturate ? 127.0f : 2147483520.0f);
    const vf q = vmin(vmax(exact, low), high);
    vi code;
    if (rounding == QB_HALF_EVEN) {
        code = round_even(q);
    } else {
        const vf whole = to_float(__builtin_convertvector(q, vi));
        const vf rest = q - whole;
        const vf up = whole + (q < 0.0f ? splat(-1.0f) : splat(1.0f));
        const vf away = ((rest >= 0.5f) | (rest <= -0.5f)) ? up : whole;
        code = __builtin_convertvector(vmin(vmax(away, low), high), vi);
    }
    return saturate ? code : exact >= 2147483648.0f ? spliti(-1) : code;
}

/// Values, whole vectors of them, as a tensor of this dtype would keep them; int8 is not meant.
static inline void round_to(int32_t dtype, float *values, int64_t count) {
    uint16_t half[kFloats];
    for (int64_t i = 0; i < count && dtype != QB_F32; i += kFloats) {
        if (dtype == QB_BF16) {
            to_bf16(half, loadf(values + i));
            store(values + i, from_bf16(half));
        } else {
            to_f16(half, loadf(values + i));
            store(values + i, from_f16(half));
        }
    }
}

/// x / scale of inverse = 1 / scale, rounded as a division does it: what a product leaves of x corrects it. Beyond
/// codes only the sign counts.
QB_INLINE vf quotient(vf x, vf scale, vf inverse) {
    const vf q = vmin(vmax(x * inverse, splat(-1000.0f)), splat(1000.0f));
    return q + inverse * (x - q * scale);
}

/// Writes count values to channels from first on of one token, in the format of t.
static inline void write_row(const QbTensor &t, int64_t batch, int64_t token, int64_t first, int64_t count,
                             const float *values, int rounding = QB_HALF_EVEN, int overflow = QB_SATURATE) {
    char *row = const_cast<char *>(at(t, batch, token));
    int64_t i = 0;
    if (t.dtype == QB_F32) {
        __builtin_memcpy((float *)row + first, values, 4 * count);
    } else if (t.dtype == QB_BF16) {
        uint16_t *p = (uint16_t *)row + first;
        for (; i + kFloats <= count; i += kFloats) to_bf16(p + i, loadf(values + i));
        if (i < count) {
            float in[kFloats] = {};
            uint16_t end[kFloats];
            __builtin_memcpy(in, values + i, 4 * (count - i));
            to_bf16(end, loadf(in));
            __builtin_memcpy(p + i, end, 2 * (count - i));
        }
    } else if (t.dtype == QB_F16) {
        uint16_t *p = (uint16_t *)row + first;
        for (; i + kFloats <= count; i += kFloats) to_f16(p + i, loadf(values + i));
        if (i < count) {
            float in[kFloats] = {};
            uint16_t end[kFloats];
            __builtin_memcpy(in, values + i, 4 * (count - i));
            to_f16(end, loadf(in));
            __builtin_memcpy(p + i, end, 2 * (count - i));
        }
    } else {
        int8_t *p = (int8_t *)row + first;
        const float *scale = t.scale + (t.scale_step ? first : 0);
        if (rounding == QB_HALF_EVEN && overflow == QB_SATURATE && !t.scale_step) {
            const vf one = splat(*scale), inverse = splat(1.0f / *scale);
            for (; i + kFloats <= count; i += kFloats)
                narrow_saturated(p + i, quotient(loadf(values + i), one, inverse));
        }
        for (; i + kFloats <= count; i += kFloats)
            narrow(p + i, codes_of(loadf(values + i), t.scale_step ? loadf(scale + i) : splat(*scale), rounding,
                                   overflow));
        if (i < count) {
            float in[kFloats] = {}, by[kFloats];
            int8_t end[kFloats];
            for (int j = 0; j < kFloats; ++j) by[j] = t.scale_step && i + j < count ? scale[i + j] : *scale;
            __builtin_memcpy(in, values + i, 4 * (count - i));
            narrow(end, codes_of(loadf(in), loadf(by), rounding, overflow));
            __builtin_memcpy(p + i, end, count - i);
        }
    }
}

/// Runs part(i) for i below count on all threads.
template <class Part>
static inline void each(int64_t count, const Part &part) {
    quamba::parallel(
        count, [](void *context, int64_t i) { (*(const Part *)context)(i); }, (void *)&part);
}

/// Parts of `total` things, at least `least_size` each: enough that a thread that is held up is waited for briefly.
QB_INLINE int64_t part_size(int64_t total, int64_t least_size, int64_t multiple) {
    const int64_t parts = quamba::threads() == 1 ? 1 : 8 * quamba::threads();
    int64_t size = most((total + parts - 1) / parts, least_size);
    return (size + multiple - 1) / multiple * multiple;
}

}  // namespace QB_ISA
