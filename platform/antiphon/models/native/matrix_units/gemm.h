// Rows times packed weights on matrix units (hot): bf16 or int8 in, fp32 or int32 sums, an epilogue per block of results.
//
// Packed weights are strips of 16 outputs, each a run of tiles [depth][16][64 bytes]: 16 groups of inputs (2 bf16 or 4 int8) by 16
// outputs. While four strips are computed the next four are fetched. Every row is summed over the inputs in one order, so it does not
// depend on the rows beside it or on threads.
// T rows, I inputs, O outputs.

#pragma once

#include "../large_pages.h"
#include "../prefetch.h"
#include "../thread_pool.h"
#include "tiles.h"

namespace antiphon {

constexpr int64_t kRowBytes = 64, kTileBytes = kLanes * kRowBytes;

struct Packed {
  const char* data;
  int64_t strips, depth;
  bool is_int8;

  explicit Packed(const Tensor& t)
      : data(static_cast<const char*>(t.const_data_ptr())), strips(t.size(0)), depth(t.size(1)), is_int8(t.scalar_type() == at::kChar) {
    TORCH_CHECK(t.dim() == 4 && t.size(2) == kLanes && t.size(3) * t.element_size() == kRowBytes && t.is_contiguous());
    TORCH_CHECK(is_int8 || t.scalar_type() == at::kBFloat16);
  }
  const char* strip(int64_t index) const { return data + index * depth * kTileBytes; }
  int64_t row_bytes() const { return depth * kRowBytes; }
};

// Pack weight_OI, bf16 or int8. With ``pairs``, strips alternate between the first and the second half of the outputs.
template <typename T>
Tensor pack_as(const Tensor& weight, bool pairs) {
  constexpr int64_t kWidth = kRowBytes / sizeof(T), kGroup = 4 / sizeof(T);  // inputs of a tile, and of its groups
  const int64_t outputs = weight.size(0), inputs = weight.size(1), half = outputs / 2;
  TORCH_CHECK(weight.dim() == 2 && weight.is_contiguous() && (!pairs || outputs % 2 == 0));
  const int64_t depth = divide_up(inputs, kWidth), strips = pairs ? 2 * divide_up(half, kLanes) : divide_up(outputs, kLanes);
  Tensor packed = LargePages::zeros({strips, depth, kLanes, kWidth}, weight.scalar_type());
  const T* from = static_cast<const T*>(weight.const_data_ptr());
  T* to = static_cast<T*>(packed.data_ptr());
  parallel_for(0, strips, 1, [&](int64_t begin, int64_t end) {
    for (int64_t s = begin; s < end; ++s) {
      for (int64_t lane = 0; lane < kLanes; ++lane) {
        const int64_t within = (pairs ? s / 2 : s) * kLanes + lane;
        if (within >= (pairs ? half : outputs)) break;
        const T* row = from + (pairs && s % 2 == 1 ? half + within : within) * inputs;
        for (int64_t i = 0; i < inputs; ++i) {
          to[((s * depth + i / kWidth) * kLanes + i % kWidth / kGroup) * kWidth + lane * kGroup + i % kGroup] = row[i];
        }
      }
    }
  });
  return packed;
}

inline Tensor pack(const Tensor& weight, bool pairs) {
  if (weight.scalar_type() == at::kChar) return pack_as<int8_t>(weight, pairs);
  TORCH_CHECK(weight.scalar_type() == at::kBFloat16);
  return pack_as<bits16>(weight, pairs);
}

namespace gemm {

constexpr int64_t kStrips = 4, kTileLines = kTileBytes / 64;  // strips computed together; cache lines of a tile

// Strips of weights that a thread reads after those it computes now.
struct Soon {
  const char* at = nullptr;
  int64_t bytes = 0;

  Soon() = default;
  Soon(const Packed& w, int64_t strip, int64_t count)
      : at(w.strip(strip)), bytes(std::max<int64_t>(0, std::min(count, w.strips - strip)) * w.depth * kTileBytes) {}
};

#define ANTIPHON_DOT(result, rows, weights) \
  if constexpr (Int8) {                     \
    _tile_dpbssd(result, rows, weights);    \
  } else {                                  \
    _tile_dpbf16ps(result, rows, weights);  \
  }

// One block of rows times up to four strips: registers 0-3 results, 4 rows, 5-7 weights.
template <bool Int8, int Strips>
inline void one_by(const char* rows, int64_t row_bytes, const Packed& w, int64_t strip, float* sums, Prefetch& ahead) {
  const char* at = w.strip(strip);
  const int64_t stride = w.depth * kTileBytes;
  _tile_zero(0);
  if constexpr (Strips > 1) _tile_zero(1);
  if constexpr (Strips > 2) _tile_zero(2);
  if constexpr (Strips > 3) _tile_zero(3);
  for (int64_t d = 0; d < w.depth; ++d, at += kTileBytes) {
    _tile_loadd(4, rows + d * kRowBytes, row_bytes);
    _tile_loadd(5, at, 64);
    ANTIPHON_DOT(0, 4, 5);
    ahead.fetch(kTileLines);
    if constexpr (Strips > 1) {
      _tile_loadd(6, at + stride, 64);
      ANTIPHON_DOT(1, 4, 6);
      ahead.fetch(kTileLines);
    }
    if constexpr (Strips > 2) {
      _tile_loadd(7, at + 2 * stride, 64);
      ANTIPHON_DOT(2, 4, 7);
      ahead.fetch(kTileLines);
    }
    if constexpr (Strips > 3) {
      _tile_loadd(5, at + 3 * stride, 64);
      ANTIPHON_DOT(3, 4, 5);
      ahead.fetch(kTileLines);
    }
  }
  order_memory();
  _tile_stored(0, sums, 64);
  if constexpr (Strips > 1) _tile_stored(1, sums + 256, 64);
  if constexpr (Strips > 2) _tile_stored(2, sums + 512, 64);
  if constexpr (Strips > 3) _tile_stored(3, sums + 768, 64);
}

template <bool Int8>
inline void one_by(int64_t strips, const char* rows, int64_t row_bytes, const Packed& w, int64_t strip, float* sums, Prefetch& ahead) {
  switch (strips) {
    case 4: return one_by<Int8, 4>(rows, row_bytes, w, strip, sums, ahead);
    case 3: return one_by<Int8, 3>(rows, row_bytes, w, strip, sums, ahead);
    case 2: return one_by<Int8, 2>(rows, row_bytes, w, strip, sums, ahead);
    default: return one_by<Int8, 1>(rows, row_bytes, w, strip, sums, ahead);
  }
}

// Two blocks of rows times two strips: registers 0-3 results, 4 and 5 rows, 6 and 7 weights.
template <bool Int8>
inline void two_by_two(const char* rows, int64_t row_bytes, const Packed& w, int64_t strip, float* sums, Prefetch& ahead) {
  const char *at = w.strip(strip), *beside = w.strip(strip + 1), *below = rows + kLanes * row_bytes;
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  for (int64_t d = 0; d < w.depth; ++d) {
    _tile_loadd(4, rows + d * kRowBytes, row_bytes);
    _tile_loadd(6, at + d * kTileBytes, 64);
    ANTIPHON_DOT(0, 4, 6);
    ahead.fetch(kTileLines);
    _tile_loadd(7, beside + d * kTileBytes, 64);
    ANTIPHON_DOT(1, 4, 7);
    _tile_loadd(5, below + d * kRowBytes, row_bytes);
    ANTIPHON_DOT(2, 5, 6);
    ahead.fetch(kTileLines);
    ANTIPHON_DOT(3, 5, 7);
  }
  order_memory();
  _tile_stored(0, sums, 64);
  _tile_stored(1, sums + 256, 64);
  _tile_stored(2, sums + 512, 64);
  _tile_stored(3, sums + 768, 64);
}

#undef ANTIPHON_DOT

// Sums of rows [first, first + count) for strips [begin, end) of the weights, handed to
// epilogue(row, rows, strip, strips, sums [strips][16][16]), int32 bits where weights are int8. While blocks of rows meet four strips,
// the next four are fetched (``after``: those of the thread's next product).
template <bool Int8, typename Epilogue>
void run(const char* rows, int64_t row_bytes, int64_t first, int64_t count, const Packed& w, int64_t begin, int64_t end,
         const Soon& after, const Epilogue& epilogue) {
  alignas(64) float sums[4 * 256];
  const int64_t tail = count % kLanes, blocks = divide_up(count, kLanes);
  const int last = static_cast<int>(tail == 0 ? kLanes : tail);
  const TileShapes whole{16, 16, 16, 16, 16, 16, 16, 16}, single{last, last, last, last, last, 16, 16, 16},
      paired{16, 16, last, last, 16, last, 16, 16};
  const TileShapes* loaded = nullptr;
  const auto use = [&](const TileShapes& shapes) {
    if (loaded != &shapes) (loaded = &shapes)->load();
  };
  Prefetch ahead;
  const auto expect = [&](const Soon& soon) { ahead.start(soon.at, soon.bytes); };
  expect(Soon(w, begin, std::min(kStrips, end - begin)));
  ahead.fetch_all();
  order_memory();
  for (int64_t strip = begin; strip < end; strip += kStrips) {
    const int64_t strips = std::min(kStrips, end - strip), next = strip + kStrips;
    expect(next < end ? Soon(w, next, std::min(kStrips, end - next)) : after);
    for (int64_t block = 0; block < blocks;) {
      const int64_t row = first + block * kLanes;
      const char* at = rows + row * row_bytes;
      if (block + 1 < blocks && strips % 2 == 0) {
        const bool ends = block + 2 == blocks;
        use(ends ? paired : whole);
        for (int64_t s = 0; s < strips; s += 2) {
          two_by_two<Int8>(at, row_bytes, w, strip + s, sums, ahead);
          order_memory();
          epilogue(row, kLanes, strip + s, 2, sums);
          epilogue(row + kLanes, ends ? last : kLanes, strip + s, 2, sums + 512);
        }
        block += 2;
        continue;
      }
      const bool ends = block + 1 == blocks;
      use(ends ? single : whole);
      one_by<Int8>(strips, at, row_bytes, w, strip, sums, ahead);
      order_memory();
      epilogue(row, ends ? last : kLanes, strip, static_cast<int>(strips), sums);
      ++block;
    }
  }
  _tile_release();
}

}  // namespace gemm
}  // namespace antiphon
