// A run of the context's keys beside each other, and queries against them (hot): lanes are keys, so that a score's sum over the
// dimensions goes from the first to the last, whoever takes it, and no lanes have to be added up. On processors that multiply bf16, a
// step takes two dimensions in one instruction, from keys and queries as they are. Must not know: whose keys they are.
#pragma once

#include "lanes.h"

#include <algorithm>
#include <type_traits>

namespace antiphon {

#ifdef __AVX512F__
constexpr int64_t kLanes = 16;
#else
constexpr int64_t kLanes = 8;
#endif
using f32xn = float __attribute__((vector_size(4 * kLanes)));

inline f32xn load_lanes(const float* at) {
  f32xn v;
  std::memcpy(&v, at, sizeof v);
  return v;
}

inline f32xn load_lanes(const bf16* at) {
#ifdef __AVX512F__
  return std::bit_cast<f32xn>(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(at))), 16));
#else
  return load8(at);
#endif
}

inline void store_lanes(float* at, f32xn v) { std::memcpy(at, &v, sizeof v); }

// ``v`` in all lanes, to the bit: it may be a pair of bf16.
inline f32xn spread(float v) {
#ifdef __AVX512F__
  return std::bit_cast<f32xn>(_mm512_set1_ps(v));
#elif defined(__AVX2__)
  return std::bit_cast<f32xn>(_mm256_set1_ps(v));
#else
  return f32xn{v, v, v, v, v, v, v, v};
#endif
}

#ifdef __AVX512F__
inline f32xn multiply_add(f32xn a, f32xn b, f32xn c) {
  return std::bit_cast<f32xn>(_mm512_fmadd_ps(std::bit_cast<__m512>(a), std::bit_cast<__m512>(b), std::bit_cast<__m512>(c)));
}
#endif

// Whether a step takes a pair of dimensions, which lie in four bytes as one does otherwise.
#ifdef __AVX512BF16__
template <typename T>
constexpr bool kPairs = std::is_same_v<T, bf16>;
#else
template <typename T>
constexpr bool kPairs = false;
#endif

template <typename T>
inline f32xn step(f32xn query, f32xn key, f32xn sum) {
#ifdef __AVX512BF16__
  if constexpr (kPairs<T>) {
    return std::bit_cast<f32xn>(
        _mm512_dpbf16_ps(std::bit_cast<__m512>(sum), std::bit_cast<__m512bh>(query), std::bit_cast<__m512bh>(key)));
  }
#endif
  return multiply_add(query, key, sum);
}

// Steps of a head of so many dimensions, in whole vectors.
template <typename T>
inline int64_t steps_of(int64_t width) {
  const int64_t per_vector = kPairs<T> ? 2 * kLanes : kLanes;
  return (width + per_vector - 1) / per_vector * kLanes;
}

// One vector of steps of a row: its elements from ``at`` on, zeros where ``left`` ends.
template <typename T>
inline f32xn steps_at(const T* at, int64_t left) {
  constexpr int64_t kWidth = kPairs<T> ? 2 * kLanes : kLanes;
  const auto whole = [](const T* from) {
    if constexpr (kPairs<T>) {
      f32xn v;
      std::memcpy(&v, from, sizeof v);
      return v;
    } else {
      return load_lanes(from);
    }
  };
  if (left >= kWidth) return whole(at);
  T padded[kWidth] = {};
  std::memcpy(padded, at, std::max<int64_t>(0, left) * sizeof(T));
  return whole(padded);
}

// Rows [a.., b..] exchange blocks of ``Step`` lanes; after all powers of two the matrix is turned.
template <int Step>
inline void exchange(f32xn& a, f32xn& b) {
#ifdef __AVX512F__
  alignas(64) static constexpr auto kIndices = [] {
    struct {
      int32_t low[16], high[16];
    } at{};
    for (int l = 0; l < 16; ++l) {
      at.low[l] = (l & Step) == 0 ? l : 16 + l - Step;
      at.high[l] = (l & Step) == 0 ? l + Step : 16 + l;
    }
    return at;
  }();
  const __m512 first = std::bit_cast<__m512>(a), second = std::bit_cast<__m512>(b);
  a = std::bit_cast<f32xn>(_mm512_permutex2var_ps(first, _mm512_load_si512(kIndices.low), second));
  b = std::bit_cast<f32xn>(_mm512_permutex2var_ps(first, _mm512_load_si512(kIndices.high), second));
#elif defined(__AVX2__)
  const __m256 first = std::bit_cast<__m256>(a), second = std::bit_cast<__m256>(b);
  if constexpr (Step == 1) {
    a = std::bit_cast<f32xn>(_mm256_blend_ps(first, _mm256_moveldup_ps(second), 0xaa));
    b = std::bit_cast<f32xn>(_mm256_blend_ps(_mm256_movehdup_ps(first), second, 0xaa));
  } else if constexpr (Step == 2) {
    a = std::bit_cast<f32xn>(_mm256_shuffle_ps(first, second, _MM_SHUFFLE(1, 0, 1, 0)));
    b = std::bit_cast<f32xn>(_mm256_shuffle_ps(first, second, _MM_SHUFFLE(3, 2, 3, 2)));
  } else {
    a = std::bit_cast<f32xn>(_mm256_permute2f128_ps(first, second, 0x20));
    b = std::bit_cast<f32xn>(_mm256_permute2f128_ps(first, second, 0x31));
  }
#else
  const f32xn first = a, second = b;
  for (int l = 0; l < kLanes; ++l) {
    a[l] = (l & Step) == 0 ? first[l] : second[l - Step];
    b[l] = (l & Step) == 0 ? first[l + Step] : second[l];
  }
#endif
}

template <int Step>
inline void turn(f32xn* rows) {
  for (int i = 0; i < kLanes; ++i) {
    if ((i & Step) == 0) exchange<Step>(rows[i], rows[i + Step]);
  }
  if constexpr (2 * Step < kLanes) turn<2 * Step>(rows);
}

// Keys' rows as [steps, Run], zeros beside the last key; ``row(i)`` is where the i-th of ``count`` lies, and ``fetch(i, d)`` has what
// else will be needed fetched, piece by piece between the turns: memory takes so many requests at once and no more.
template <typename T, int64_t Run, typename Row, typename Fetch>
void turn_keys(int64_t count, int64_t width, Row row, Fetch fetch, float* to) {
  constexpr int64_t kWidth = kPairs<T> ? 2 * kLanes : kLanes;
  for (int64_t k = 0; k < Run; k += kLanes) {
    const T* at[kLanes];
    for (int64_t i = 0; i < kLanes; ++i) at[i] = k + i < count ? row(k + i) : nullptr;
    if (k >= count && k % (2 * kLanes) == 0) return;  // nobody looks at it
    for (int64_t d = 0, s = 0; d < width; d += kWidth, s += kLanes) {
      f32xn rows[kLanes];
      for (int64_t i = 0; i < kLanes; ++i) {
        rows[i] = at[i] == nullptr ? f32xn{} : steps_at(at[i] + d, width - d);
        if (at[i] != nullptr) fetch(k + i, d);
      }
      turn<1>(rows);
      for (int64_t i = 0; i < kLanes; ++i) store_lanes(to + (s + i) * Run + k, rows[i]);
    }
  }
}

// scores[q][k] = scale * query q . key k, of Queries queries (``steps`` each) and 2 * kLanes keys; rows of scores are ``Span`` apart.
template <typename T, int64_t Run, int64_t Span, int Queries>
[[gnu::always_inline]] inline void score_keys(const float* queries, const float* keys, int64_t steps, float scale, float* scores) {
  f32xn acc[Queries][2] = {};
  for (int64_t s = 0; s < steps; ++s) {
    const f32xn first = load_lanes(keys + s * Run), second = load_lanes(keys + s * Run + kLanes);
    for (int q = 0; q < Queries; ++q) {
      const f32xn query = spread(queries[q * steps + s]);
      acc[q][0] = step<T>(query, first, acc[q][0]);
      acc[q][1] = step<T>(query, second, acc[q][1]);
    }
  }
  for (int q = 0; q < Queries; ++q) {
    store_lanes(scores + q * Span, acc[q][0] * scale);
    store_lanes(scores + q * Span + kLanes, acc[q][1] * scale);
  }
}

}  // namespace antiphon
