// Runs of the context (hot): keys turned so that lanes are keys, and values by pairs of tokens, with queries and weights against them. A
// score's sum goes over the dimensions from the first to the last, a result's over the context, whoever takes it, and no lanes have to be
// added up. On processors that multiply bf16, a step takes two dimensions, or two tokens, in one instruction. Must not know: whose they are.
#pragma once

#include "lanes.h"

#include <algorithm>
#include <cmath>
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

// The larger of each lane; of all lanes; and their sum, in one order.
inline f32xn larger(f32xn a, f32xn b) { return a > b ? a : b; }

inline float largest(f32xn v) {
  using f32x4 = float __attribute__((vector_size(16)));
  f32x4 parts[kLanes / 4];
  std::memcpy(parts, &v, sizeof parts);
  for (int64_t half = kLanes / 8; half > 0; half /= 2) {
    for (int64_t i = 0; i < half; ++i) parts[i] = parts[i + half] > parts[i] ? parts[i + half] : parts[i];
  }
  const float first = parts[0][0] > parts[0][1] ? parts[0][0] : parts[0][1], second = parts[0][2] > parts[0][3] ? parts[0][2] : parts[0][3];
  return first > second ? first : second;
}

inline float total_lanes(f32xn v) {
  f32x8 parts[kLanes / kVector];
  std::memcpy(parts, &v, sizeof parts);
  return kLanes == kVector ? total(parts[0]) : total(parts[0] + parts[kLanes / kVector - 1]);
}

inline f32xn nearest(f32xn v) {
#ifdef __AVX512F__
  return std::bit_cast<f32xn>(_mm512_roundscale_ps(std::bit_cast<__m512>(v), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
#elif defined(__AVX2__)
  return std::bit_cast<f32xn>(_mm256_round_ps(std::bit_cast<__m256>(v), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
#else
  for (int l = 0; l < kLanes; ++l) v[l] = std::nearbyint(v[l]);
  return v;
#endif
}

// exp_negative (elements.h) of all lanes.
inline f32xn exp_negative(f32xn x) {
  using ints = int32_t __attribute__((vector_size(4 * kLanes)));
  const f32xn least = f32xn{} - 87.0f, bounded = x < least ? least : x;  // what is no number stays so
  const f32xn n = nearest(bounded * 1.44269504088896341f), p = exp_over_power(bounded, n);
  const f32xn scale = std::bit_cast<f32xn>((__builtin_convertvector(n, ints) + 127) << 23);
  return x < least ? f32xn{} : p * scale;
}

// Whether a step takes a pair of dimensions, which lie in four bytes as one does otherwise.
#ifdef __AVX512BF16__
template <typename T>
constexpr bool kPairs = std::is_same_v<T, bf16>;
#else
template <typename T>
constexpr bool kPairs = false;
#endif

// exp(scores - best), at most 1. Weights that are rounded to bf16 take 2^x with a relative error below 3e-6; what is no number stays so.
template <typename T>
inline f32xn weights_against(f32xn scores, float best) {
#ifdef __AVX512BF16__
  if constexpr (kPairs<T>) {
    const __m512 exact = std::bit_cast<__m512>((scores - best) * 1.44269504088896341f);
    const __m512 x = _mm512_max_ps(_mm512_set1_ps(-200.0f), exact);  // of two that can't be compared, the second
    const __m512 n = _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC), r = _mm512_sub_ps(x, n);
    __m512 p = _mm512_set1_ps(9.570101285e-3f);
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(5.591786249e-2f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(2.402474486e-1f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(6.931218145e-1f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(9.999992614e-1f));
    return std::bit_cast<f32xn>(_mm512_scalef_ps(p, n));
  }
#endif
  return exp_negative(scores - best);
}

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

#ifdef __AVX512F__
// Sixteen rows of sixteen lanes are turned: within quarters of registers first, as no other permutation is as cheap.
inline void turn_rows(f32xn* rows) {
  __m512 a[kLanes], b[kLanes];
  const auto low = [](__m512 x, __m512 y) { return _mm512_castpd_ps(_mm512_unpacklo_pd(_mm512_castps_pd(x), _mm512_castps_pd(y))); };
  const auto high = [](__m512 x, __m512 y) { return _mm512_castpd_ps(_mm512_unpackhi_pd(_mm512_castps_pd(x), _mm512_castps_pd(y))); };
  for (int i = 0; i < kLanes; i += 2) {
    const __m512 x = std::bit_cast<__m512>(rows[i]), y = std::bit_cast<__m512>(rows[i + 1]);
    a[i] = _mm512_unpacklo_ps(x, y), a[i + 1] = _mm512_unpackhi_ps(x, y);
  }
  for (int i = 0; i < kLanes; i += 4) {
    b[i] = low(a[i], a[i + 2]), b[i + 1] = high(a[i], a[i + 2]);
    b[i + 2] = low(a[i + 1], a[i + 3]), b[i + 3] = high(a[i + 1], a[i + 3]);
  }
  for (int i = 0; i < 4; ++i) {  // quarter q of b[4 g + i] is column 4 q + i of rows 4 g to 4 g + 3
    const __m512 even = _mm512_shuffle_f32x4(b[i], b[4 + i], 0x88), more_even = _mm512_shuffle_f32x4(b[8 + i], b[12 + i], 0x88);
    const __m512 odd = _mm512_shuffle_f32x4(b[i], b[4 + i], 0xdd), more_odd = _mm512_shuffle_f32x4(b[8 + i], b[12 + i], 0xdd);
    rows[i] = std::bit_cast<f32xn>(_mm512_shuffle_f32x4(even, more_even, 0x88));
    rows[4 + i] = std::bit_cast<f32xn>(_mm512_shuffle_f32x4(odd, more_odd, 0x88));
    rows[8 + i] = std::bit_cast<f32xn>(_mm512_shuffle_f32x4(even, more_even, 0xdd));
    rows[12 + i] = std::bit_cast<f32xn>(_mm512_shuffle_f32x4(odd, more_odd, 0xdd));
  }
}
#else
// Rows [a.., b..] exchange blocks of ``Step`` lanes; after all powers of two the matrix is turned.
template <int Step>
inline void exchange(f32xn& a, f32xn& b) {
#ifdef __AVX2__
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

inline void turn_rows(f32xn* rows) { turn<1>(rows); }
#endif

// Rows of keys as [steps, Run] for the first ``count`` and some beyond them; ``fetch()`` is called once for each piece of a row.
template <typename T, int64_t Run, typename Fetch>
void turn_keys(const T* const* keys, int64_t count, int64_t width, Fetch fetch, float* to) {
  constexpr int64_t kWidth = kPairs<T> ? 2 * kLanes : kLanes;
  for (int64_t k = 0; k < count; k += kLanes) {
    for (int64_t d = 0, s = 0; d < width; d += kWidth, s += kLanes) {
      f32xn rows[kLanes];
      for (int64_t i = 0; i < kLanes; ++i) {
        rows[i] = steps_at(keys[k + i] + d, width - d);
        fetch();
      }
      turn_rows(rows);
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

// Steps of a run of so many tokens' values: pairs of tokens where a step takes two.
template <typename T>
constexpr int64_t kTokens = kPairs<T> ? 2 : 1;

// kLanes dimensions of one step of values: those of ``first``, and beside each that of ``second`` where a step takes two tokens.
template <typename T>
inline f32xn values_at(const T* first, const T* second) {
#ifdef __AVX512BF16__
  if constexpr (kPairs<T>) {
    const auto wide = [](const T* row) { return _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(row))); };
    return std::bit_cast<f32xn>(_mm512_or_si512(wide(first), _mm512_slli_epi32(wide(second), 16)));
  }
#endif
  (void)second;
  return load_lanes(first);
}

// Rows of values as steps of ``wide`` dimensions, zeros beside ``width``.
template <typename T, int64_t Run, typename Fetch>
void pair_values(const T* const* rows, int64_t width, int64_t wide, Fetch fetch, float* to) {
  for (int64_t i = 0; i < Run; i += kTokens<T>, to += wide) {
    const T *first = rows[i], *second = rows[i + kTokens<T> - 1];
    int64_t d = 0;
    for (; d + kLanes <= width; d += kLanes) {
      store_lanes(to + d, values_at(first + d, second + d));
      fetch();
    }
    if (d == wide) continue;
    T ends[2][kLanes] = {};
    std::memcpy(ends[0], first + d, (width - d) * sizeof(T));
    std::memcpy(ends[1], second + d, (width - d) * sizeof(T));
    store_lanes(to + d, values_at<T>(ends[0], ends[1]));
  }
}

// weights[0 .. 2 * kLanes) as steps, beside each other from ``to`` on, which may be where they are: rounded to bf16 where a step takes two.
template <typename T>
inline void store_weights(f32xn first, f32xn second, float* to) {
#ifdef __AVX512BF16__
  if constexpr (kPairs<T>) {
    const __m512bh both = _mm512_cvtne2ps_pbh(std::bit_cast<__m512>(second), std::bit_cast<__m512>(first));
    return store_lanes(to, std::bit_cast<f32xn>(both));
  }
#endif
  store_lanes(to, first);
  store_lanes(to + kLanes, second);
}

// result[q][i] += weights[q][s] * values(s, i) over ``count`` steps, for Queries queries, whose weights are Span apart, and kLanes * Vectors
// dimensions from ``from`` on.
template <typename T, int64_t Span, int Queries, int Vectors, typename Values>
[[gnu::always_inline]] inline void add_lanes(const float* weights, Values values, int64_t from, int64_t count, int64_t wide, float* results) {
  f32xn acc[Queries][Vectors];
  for (int q = 0; q < Queries; ++q) {
    for (int v = 0; v < Vectors; ++v) acc[q][v] = load_lanes(results + q * wide + from + v * kLanes);
  }
  for (int64_t s = 0; s < count; ++s) {
    f32xn value[Vectors];
    for (int v = 0; v < Vectors; ++v) value[v] = values(s, from + v * kLanes);
    for (int q = 0; q < Queries; ++q) {
      const f32xn weight = spread(weights[q * Span + s]);
      for (int v = 0; v < Vectors; ++v) acc[q][v] = step<T>(weight, value[v], acc[q][v]);
    }
  }
  for (int q = 0; q < Queries; ++q) {
    for (int v = 0; v < Vectors; ++v) store_lanes(results + q * wide + from + v * kLanes, acc[q][v]);
  }
}

constexpr int kMostQueries = kLanes == 16 ? 6 : 4;  // whose sums registers hold beside some values

// The same for ``num`` queries one behind the other, and all dimensions.
template <typename T, int64_t Span, typename Values>
void add_values(const float* weights, Values values, int64_t num, int64_t count, int64_t wide, float* results) {
  const auto take = [&]<int Queries>(std::integral_constant<int, Queries>) {
    constexpr int kVectors = kLanes == 16 ? 4 : Queries == 1 ? 8 : Queries == 2 ? 4 : 2;  // as many sums as registers hold
    int64_t i = 0;
    for (; i + kVectors * kLanes <= wide; i += kVectors * kLanes) add_lanes<T, Span, Queries, kVectors>(weights, values, i, count, wide, results);
    for (; i < wide; i += kLanes) add_lanes<T, Span, Queries, 1>(weights, values, i, count, wide, results);
    weights += Queries * Span, results += Queries * wide, num -= Queries;
  };
  while (num >= kMostQueries) take(std::integral_constant<int, kMostQueries>{});
  if constexpr (kMostQueries > 5) {
    if (num == 5) take(std::integral_constant<int, 5>{});
    if (num == 4) take(std::integral_constant<int, 4>{});
  }
  if (num == 3) take(std::integral_constant<int, 3>{});
  if (num == 2) take(std::integral_constant<int, 2>{});
  if (num == 1) take(std::integral_constant<int, 1>{});
}

}  // namespace antiphon
