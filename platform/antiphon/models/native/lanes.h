// Eight numbers at a time, on any processor (hot): loads that widen bf16, and sums of lanes in one order, so that a sum's bits do not
// depend on who takes it. Must not know: what is computed.
#pragma once

#include "elements.h"

#if defined(__AVX2__) || defined(__FMA__)
#include <immintrin.h>
#endif

#include <bit>
#include <cstdint>
#include <cstring>

namespace antiphon {

using f32x8 = float __attribute__((vector_size(32)));
constexpr int64_t kVector = 8;

inline f32x8 load8(const float* at) {
  f32x8 v;
  std::memcpy(&v, at, sizeof v);
  return v;
}

inline f32x8 load8(const bf16* at) {
#ifdef __AVX2__  // one instruction; the compiler makes four of what stands below
  return std::bit_cast<f32x8>(_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(at))), 16));
#else
  using u32x8 = uint32_t __attribute__((vector_size(32)));
  using u16x8 = uint16_t __attribute__((vector_size(16)));
  u16x8 bits;
  std::memcpy(&bits, at, sizeof bits);
  return std::bit_cast<f32x8>(__builtin_convertvector(bits, u32x8) << 16);
#endif
}

inline void store8(float* at, f32x8 v) { std::memcpy(at, &v, sizeof v); }

// a * b + c, rounded once where the processor can: spelled out, since a compiler may choose so in one place and not in another.
inline f32x8 multiply_add(f32x8 a, f32x8 b, f32x8 c) {
#ifdef __FMA__
  return std::bit_cast<f32x8>(_mm256_fmadd_ps(std::bit_cast<__m256>(a), std::bit_cast<__m256>(b), std::bit_cast<__m256>(c)));
#else
  return a * b + c;
#endif
}

inline float multiply_add(float a, float b, float c) {
#ifdef __FMA__
  return __builtin_fmaf(a, b, c);
#else
  return a * b + c;
#endif
}

inline float total(f32x8 v) { return ((v[0] + v[4]) + (v[1] + v[5])) + ((v[2] + v[6]) + (v[3] + v[7])); }

// to[k] = total(v[k]) of four.
inline void totals(const f32x8* v, float* to) {
#ifdef __AVX2__
  __m128 halves[4];
  for (int k = 0; k < 4; ++k) {
    const __m256 all = std::bit_cast<__m256>(v[k]);
    halves[k] = _mm_add_ps(_mm256_castps256_ps128(all), _mm256_extractf128_ps(all, 1));
  }
  _mm_storeu_ps(to, _mm_hadd_ps(_mm_hadd_ps(halves[0], halves[1]), _mm_hadd_ps(halves[2], halves[3])));
#else
  for (int k = 0; k < 4; ++k) to[k] = total(v[k]);
#endif
}

}  // namespace antiphon
