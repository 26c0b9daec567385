// Weights in blocks of 32 outputs, read as one linear stream, and the products of rows with one block (hot).
//
//     [outputs / 32][K / pair][2][16][pair]      pair = 2 for bfloat16 rows (the order of AMX tiles and of dpbf16), 1 for float32
//
// A row's sum has one order, inputs ascending, whatever the rows beside it and whatever the number of threads.
// Must not know: what the products are for.
#pragma once

#include <ATen/core/Tensor.h>

#include <algorithm>
#include <bit>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>

#include "../elements.h"
#include "../prefetch.h"
#include "../thread_pool.h"

#if defined(__AVX512F__) || defined(__AVX2__)
#include <immintrin.h>
#endif
#if defined(__AVX2__) && defined(__FMA__) && !defined(__AVX512F__)
#define ANTIPHON_HALF_LANES 1  // sixteen registers of eight: what is summed at once is chosen to stay in them
#else
#define ANTIPHON_HALF_LANES 0
#endif
#if defined(__linux__) && defined(__AMX_BF16__) && defined(__x86_64__)
#include <sys/syscall.h>
#include <unistd.h>
#define ANTIPHON_AMX 1
#else
#define ANTIPHON_AMX 0
#endif

namespace antiphon {

constexpr int64_t kLanes = 16;          // outputs of half a block
constexpr int64_t kBlock = 2 * kLanes;  // outputs of a block; widths are padded to it

// Inputs that are summed one after the other: as many as a core's nearest cache holds of a block. Longer rows are sums of such sums, more
// exact so.
template <typename T>
constexpr int64_t kChain = 32768 / (kBlock * sizeof(T));

typedef float Lanes __attribute__((vector_size(64)));
typedef uint32_t Bits __attribute__((vector_size(64)));

inline Lanes load_lanes(const float* from) {
  Lanes v;
  std::memcpy(&v, from, sizeof(v));
  return v;
}

inline void store_lanes(float* to, Lanes v) { std::memcpy(to, &v, sizeof(v)); }

template <typename T>
constexpr int64_t pair_of = std::is_same_v<T, bf16> ? 2 : 1;

inline int64_t padded(int64_t size) { return (size + kBlock - 1) / kBlock * kBlock; }

// out: one weight in blocks. Row n of half h of block b is first[16 b + n] or second[16 b + n]; where second is not given, halves
// are the even and odd runs of 16 rows of first. What lies beyond either size is zero.
template <typename T>
void pack_as(T* out, const T* first, const T* second, int64_t rows, int64_t cols, int64_t num_blocks, int64_t k, int64_t pair) {
  constexpr int64_t kTogether = 32;  // inputs: what is written of them lies in the nearest cache while all lanes write to it
  const auto copy = [&](auto fixed_pair, T* block, const T* from, int64_t half, int64_t lane, int64_t begin, int64_t end) {
    constexpr int64_t kPair = decltype(fixed_pair)::value;
    int64_t c = begin;
    for (; c + kPair <= end; c += kPair) {
      std::memcpy(block + (c / kPair * 2 + half) * kLanes * kPair + lane * kPair, from + c, kPair * sizeof(T));
    }
    for (; c < end; ++c) block[(c / kPair * 2 + half) * kLanes * kPair + lane * kPair + c % kPair] = from[c];
  };
  antiphon::parallel_for(0, num_blocks, 4, [&](int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; ++b) {
      T* block = out + b * k * kBlock;
      const int64_t last = second != nullptr ? rows - b * kLanes : rows - b * kBlock;
      if (cols < k || last < (second != nullptr ? kLanes : kBlock)) {  // the rest is written whole
        std::memset(static_cast<void*>(block), 0, k * kBlock * sizeof(T));
      }
      for (int64_t c = 0; c < cols; c += kTogether) {
        for (int64_t n = 0; n < kBlock; ++n) {
          const int64_t half = n / kLanes, lane = n % kLanes, row = second != nullptr ? b * kLanes + lane : b * kBlock + n;
          if (row >= rows) continue;
          const T* from = (second != nullptr && half == 1 ? second : first) + row * cols;
          const int64_t stop = std::min(cols, c + kTogether);
          pair == 2 ? copy(std::integral_constant<int64_t, 2>{}, block, from, half, lane, c, stop)
                    : copy(std::integral_constant<int64_t, 1>{}, block, from, half, lane, c, stop);
        }
      }
    }
  });
}

// sums_R2L[r][half][lane] of up to 32 rows x_RK (stride in elements) with one block.
using Sums = float[2 * kLanes][2][kLanes];

// each(0), … each(Count - 1), written out: a loop over an array of sums has compilers keep the sums in memory.
template <int Count, typename Each>
[[gnu::always_inline]] inline void for_each(const Each& each) {
  [&]<size_t... I>(std::index_sequence<I...>) __attribute__((always_inline)) { (each(std::integral_constant<size_t, I>{}), ...); }
  (std::make_index_sequence<Count>{});
}

// What vector units have fetched while they multiply rows with a block: more of it, where it comes from memory, and so many lines of what is
// ahead every kSteps.
struct Beside {
  static constexpr int64_t kSteps = 8;
  Prefetch& ahead;
  int64_t lines = 0;
  bool is_cold = true;
};

#if ANTIPHON_HALF_LANES
// R rows with V eights of a block's outputs, from the first of them on: R * V sums. Rows are float32 whatever the weights are.
template <int R, int V>
void sums_of_eights(const float* x, int64_t stride, const float* block, int64_t k, float* sums) {
  __m256 acc[R][V], w[V];
  for_each<R>([&](auto r) { for_each<V>([&](auto v) { acc[r][v] = _mm256_setzero_ps(); }); });
  for (int64_t i = 0; i < k; ++i) {
    for_each<V>([&](auto v) { w[v] = _mm256_loadu_ps(block + i * kBlock + 8 * v); });
    __builtin_prefetch(block + i * kBlock + 1024);
    for_each<R>([&](auto r) {
      const __m256 a = _mm256_broadcast_ss(x + r * stride + i);
      for_each<V>([&](auto v) { acc[r][v] = _mm256_fmadd_ps(a, w[v], acc[r][v]); });
    });
  }
  for_each<R>([&](auto r) { for_each<V>([&](auto v) { _mm256_storeu_ps(sums + r * kBlock + 8 * v, acc[r][v]); }); });
}

template <int R, int V>
void sums_of_eights(const float* x, int64_t stride, const bf16* block, int64_t k, float* sums) {
  const __m256i high = _mm256_set1_epi32(static_cast<int>(0xffff0000u));
  __m256 acc[R][V], w[V];
  for_each<R>([&](auto r) { for_each<V>([&](auto v) { acc[r][v] = _mm256_setzero_ps(); }); });
  for (int64_t i = 0; i < k; i += 2) {
    const auto pairs = [&](int v) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(block + i * kBlock + 16 * v)); };
    const auto add = [&](int64_t input) {
      for_each<R>([&](auto r) {
        const __m256 a = _mm256_broadcast_ss(x + r * stride + input);
        for_each<V>([&](auto v) { acc[r][v] = _mm256_fmadd_ps(a, w[v], acc[r][v]); });
      });
    };
    for_each<V>([&](auto v) { w[v] = _mm256_castsi256_ps(_mm256_slli_epi32(pairs(v), 16)); });
    add(i);
    for_each<V>([&](auto v) { w[v] = _mm256_castsi256_ps(_mm256_and_si256(pairs(v), high)); });
    add(i + 1);
  }
  for_each<R>([&](auto r) { for_each<V>([&](auto v) { _mm256_storeu_ps(sums + r * kBlock + 8 * v, acc[r][v]); }); });
}

template <int R, typename T>
void sums_of_rows(const float* x, int64_t stride, const T* block, int64_t k, float (*sums)[2][kLanes], const Beside&) {
  constexpr int64_t kHalf = kLanes * pair_of<T>;
  if constexpr (R <= 2) {
    sums_of_eights<R, 4>(x, stride, block, k, &sums[0][0][0]);
  } else {
    sums_of_eights<R, 2>(x, stride, block, k, &sums[0][0][0]);
    sums_of_eights<R, 2>(x, stride, block + kHalf, k, &sums[0][1][0]);
  }
}
#else
template <int R>
void sums_of_rows(const float* x, int64_t stride, const float* block, int64_t k, float (*sums)[2][kLanes], const Beside&) {
  Lanes acc[R][2] = {};
  for (int64_t i = 0; i < k; ++i) {
    const Lanes w0 = load_lanes(block + i * kBlock), w1 = load_lanes(block + i * kBlock + kLanes);
    __builtin_prefetch(block + i * kBlock + 1024);
    __builtin_prefetch(block + i * kBlock + 1024 + kLanes);
    for_each<R>([&](auto r) {
      const float a = x[r * stride + i];
      acc[r][0] += a * w0;
      acc[r][1] += a * w1;
    });
  }
  for_each<R>([&](auto r) {
    store_lanes(sums[r][0], acc[r][0]);
    store_lanes(sums[r][1], acc[r][1]);
  });
}

template <int R>
void sums_of_rows(const bf16* x, int64_t stride, const bf16* block, int64_t k, float (*sums)[2][kLanes], const Beside& beside) {
#if defined(__AVX512BF16__)
  __m512 acc[R][2];
  for_each<R>([&](auto r) { acc[r][0] = acc[r][1] = _mm512_setzero_ps(); });
  const auto take = [&](int64_t from, int64_t to, auto is_cold) __attribute__((always_inline)) {
    for (int64_t i = from; i < to; ++i) {
      const bf16* at = block + i * 2 * kBlock;
      const __m512bh w0 = (__m512bh)_mm512_loadu_si512(at), w1 = (__m512bh)_mm512_loadu_si512(at + kBlock);
      if constexpr (is_cold) {
        _mm_prefetch(reinterpret_cast<const char*>(at) + 4096, _MM_HINT_T0);
        _mm_prefetch(reinterpret_cast<const char*>(at) + 4160, _MM_HINT_T0);
      }
      for_each<R>([&](auto r) {
        int both;
        std::memcpy(&both, x + r * stride + 2 * i, sizeof(both));
        const __m512bh a = (__m512bh)_mm512_set1_epi32(both);
        acc[r][0] = _mm512_dpbf16_ps(acc[r][0], a, w0);
        acc[r][1] = _mm512_dpbf16_ps(acc[r][1], a, w1);
      });
    }
  };
  if (beside.lines == 0) {
    take(0, k / 2, std::true_type{});
  } else {
    for (int64_t i = 0; i < k / 2; i += Beside::kSteps) {
      const int64_t to = std::min(i + Beside::kSteps, k / 2);
      beside.is_cold ? take(i, to, std::true_type{}) : take(i, to, std::false_type{});
      beside.ahead.fetch(beside.lines);
    }
  }
  for_each<R>([&](auto r) {
    _mm512_storeu_ps(sums[r][0], acc[r][0]);
    _mm512_storeu_ps(sums[r][1], acc[r][1]);
  });
#else
  (void)beside;
  Lanes acc[R][2] = {};
  for (int64_t i = 0; i < k / 2; ++i) {
    Bits both[2];
    std::memcpy(both, block + i * 2 * kBlock, sizeof(both));
    for_each<2>([&](auto half) {
      const Lanes even = std::bit_cast<Lanes>(both[half] << 16), odd = std::bit_cast<Lanes>(both[half] & 0xffff0000u);
      for_each<R>([&](auto r) {
        acc[r][half] += load(x[r * stride + 2 * i]) * even;
        acc[r][half] += load(x[r * stride + 2 * i + 1]) * odd;
      });
    });
  }
  for_each<R>([&](auto r) {
    store_lanes(sums[r][0], acc[r][0]);
    store_lanes(sums[r][1], acc[r][1]);
  });
#endif
}
#endif

#if ANTIPHON_AMX
struct alignas(64) TileConfig {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t bytes_per_row[16] = {};
  uint8_t rows[16] = {};
};

// Whether the kernel lets this process use tiles; asked once.
inline bool has_tiles() {
  static const bool granted = [] {
    constexpr long kRequest = 0x1023, kTileData = 18;
    return syscall(SYS_arch_prctl, kRequest, kTileData) == 0;
  }();
  return granted;
}

// Tiles 0-3 sums, 4-5 rows, 6-7 weights: all whole, as rows behind the last may be read.
class Tiles {
 public:
  explicit Tiles(bool wanted) : on_(wanted && has_tiles()) {
    if (on_) {
      TileConfig config;
      for (int t = 0; t < 8; ++t) {
        config.bytes_per_row[t] = 64;
        config.rows[t] = 16;
      }
      // Written out: the compiler's own intrinsic claims to read eight of the bytes only.
      asm volatile("ldtilecfg %0" ::"m"(config));
    }
  }
  Tiles(const Tiles&) = delete;
  Tiles& operator=(const Tiles&) = delete;
  ~Tiles() {
    if (on_) {
      _tile_release();
    }
  }
  bool on() const { return on_; }

 private:
  bool on_;
};

template <bool kTwo>
void sums_by_tiles(const bf16* x, int64_t stride, const bf16* block, int64_t k, float (*sums)[2][kLanes], Prefetch& ahead) {
  asm volatile("" ::: "memory");  // the intrinsics do not say what they read: what was written before must be in place
  _tile_zero(0);
  _tile_zero(1);
  if constexpr (kTwo) {
    _tile_zero(2);
    _tile_zero(3);
  }
  for (int64_t i = 0; i < k; i += 32) {
    const bf16* at = block + i * kBlock;
    ahead.fetch(32);
    _tile_loadd(4, x + i, stride * sizeof(bf16));
    _tile_loadd(6, at, 128);
    _tile_dpbf16ps(0, 4, 6);
    _tile_loadd(7, at + kBlock, 128);
    _tile_dpbf16ps(1, 4, 7);
    if constexpr (kTwo) {
      _tile_loadd(5, x + 16 * stride + i, stride * sizeof(bf16));
      _tile_dpbf16ps(2, 5, 6);
      _tile_dpbf16ps(3, 5, 7);
    }
  }
  constexpr int64_t kSumsStride = sizeof(float) * kBlock;
  _tile_stored(0, &sums[0][0][0], kSumsStride);
  _tile_stored(1, &sums[0][1][0], kSumsStride);
  if constexpr (kTwo) {
    _tile_stored(2, &sums[16][0][0], kSumsStride);
    _tile_stored(3, &sums[16][1][0], kSumsStride);
  }
  asm volatile("" ::: "memory");
}
#else
class Tiles {
 public:
  explicit Tiles(bool) {}
  bool on() const { return false; }
};
#endif

// sums_of_rows of at most ``Most`` rows, together.
template <int Most, typename X, typename T>
void sums_of_few(const X* x, int64_t stride, int64_t rows, const T* block, int64_t k, float (*sums)[2][kLanes], const Beside& beside) {
  if constexpr (Most > 0) {
    rows == Most ? sums_of_rows<Most>(x, stride, block, k, sums, beside)
                 : sums_of_few<Most - 1>(x, stride, rows, block, k, sums, beside);
  }
}

#if defined(__AVX512F__)
constexpr int64_t kRowsAtOnce = 12;  // whose sums registers hold beside what is multiplied
#elif ANTIPHON_HALF_LANES
constexpr int64_t kRowsAtOnce = 6;
#else
constexpr int64_t kRowsAtOnce = 8;
#endif
constexpr int64_t kFewRows = 12;  // rows that memory is slower than, where registers are half as long: they are taken two at a time

// How often a block is gone through for so many rows.
constexpr int64_t passes_of(int64_t rows) { return (rows + kRowsAtOnce - 1) / kRowsAtOnce; }

// sums of up to 32 rows with ``k`` inputs of one block, without tiles.
template <typename T>
void sums_by_vectors(const T* x, int64_t stride, int64_t rows, const T* block, int64_t k, float (*sums)[2][kLanes], const Beside& beside) {
  int64_t r = 0;
#if ANTIPHON_HALF_LANES
  const float* wide = nullptr;
  if constexpr (std::is_same_v<T, float>) {
    wide = x;
  } else {
    static thread_local Scratch memory;
    float* to = memory.get<float>(rows * k);
    for (int64_t row = 0; row < rows; ++row) {
#pragma omp simd
      for (int64_t i = 0; i < k; ++i) to[row * k + i] = load(x[row * stride + i]);
    }
    wide = to;
    stride = k;
  }
  if (rows <= kFewRows) {
    for (; r + 2 <= rows; r += 2) sums_of_rows<2>(wide + r * stride, stride, block, k, sums + r, beside);
  }
  for (; r + 6 <= rows; r += 6) sums_of_rows<6>(wide + r * stride, stride, block, k, sums + r, beside);
  sums_of_few<5>(wide + r * stride, stride, rows - r, block, k, sums + r, beside);
#else
  for (int64_t passes = passes_of(rows); passes > 0; --passes) {  // of rows as equal as may be: one alone waits for each of its products
    const int64_t count = (rows - r + passes - 1) / passes;
    sums_of_few<kRowsAtOnce>(x + r * stride, stride, count, block, k, sums + r, beside);
    r += count;
  }
#endif
}

// sums of up to 32 rows with one block.
template <typename T>
void multiply(const Tiles& tiles, const T* x, int64_t stride, int64_t rows, const T* block, int64_t k, float (*sums)[2][kLanes],
              const Beside& beside) {
#if ANTIPHON_AMX
  if constexpr (std::is_same_v<T, bf16>) {
    if (tiles.on()) {
      return rows > 16 ? sums_by_tiles<true>(x, stride, block, k, sums, beside.ahead)
                       : sums_by_tiles<false>(x, stride, block, k, sums, beside.ahead);
    }
  }
#endif
  (void)tiles;
  sums_by_vectors(x, stride, rows, block, std::min(k, kChain<T>), sums, beside);
  for (int64_t from = kChain<T>; from < k; from += kChain<T>) {
    alignas(64) Sums more;
    sums_by_vectors(x + from, stride, rows, block + from * kBlock, std::min(kChain<T>, k - from), more, beside);
    float *to = &sums[0][0][0], *each = &more[0][0][0];
#pragma omp simd
    for (int64_t i = 0; i < rows * kBlock; ++i) to[i] += each[i];
  }
}

}  // namespace antiphon
