// Attention over a paged bf16 cache on matrix units (hot), the same arithmetic for a decode's one row and a prompt's many.
//
// Up to 16 query rows are the lanes of a register: scores are kept as [context][lanes], so that maxima and sums run down the
// registers. Context is taken in tiles of 32 tokens from token 0 on, whatever the rows, so that a row's result does not depend on the
// rows beside it: recomputing a decoded token as part of a prompt gives the same bits.
//
//     scores  [16 tokens x lanes] = K tile [16 tokens x 32] * Q tile [32 x lanes]      K straight from the cache
//     weights [lanes x 32 tokens] = 2^((score - max) * scale), rounded to bf16, turned by a 16 x 16 transpose
//     result  [lanes x 16 dims]  += weights * V tile [32 tokens x 16 dims]             V with neighbouring tokens interleaved
//
// N query heads, K KV heads, G = N/K, H head dim (a multiple of 32), S slots.

#pragma once

#include "tiles.h"

#include <algorithm>
#include <limits>

namespace antiphon::paged {

constexpr int64_t kSpan = 32;  // tokens of a context tile
constexpr int64_t kDimsAtOnce = 4 * kLanes;  // of a head's results, which tile registers hold beside weights and values

struct Cache {
  const bits16 *k, *v;
  int64_t kv_heads, dim;  // K, H
  bool whole_blocks;      // 16 consecutive tokens from a multiple of 16 lie in consecutive slots
  int64_t row() const { return kv_heads * dim; }
};

// Where a request's tokens are: by blocks, or slot by slot.
struct Context {
  const int32_t* blocks;
  int64_t block_size;
  const int64_t* slots;
  int64_t tokens;
  const int64_t* starts = nullptr;  // the slot of every 16th token, where 16 lie together

  int64_t slot(int64_t token) const {
    return slots != nullptr ? slots[token] : blocks[token / block_size] * block_size + token % block_size;
  }
  void lay_out(int64_t* to) {
    for (int64_t i = 0; i * kLanes < tokens; ++i) to[i] = slot(i * kLanes);
    starts = to;
  }
};

// Which tokens [low, high] each lane sees.
struct Sight {
  alignas(64) int32_t low[kLanes], high[kLanes];
  int64_t first, end;            // all lanes together see [first, end)
  int64_t clear_from, clear_to;  // within it, every lane sees [clear_from, clear_to)

  void close(int64_t lanes) {
    int32_t lowest = low[0], highest = high[0], low_max = low[0], high_min = high[0];
    for (int64_t l = 1; l < lanes; ++l) {
      lowest = std::min(lowest, low[l]), low_max = std::max(low_max, low[l]);
      highest = std::max(highest, high[l]), high_min = std::min(high_min, high[l]);
    }
    for (int64_t l = lanes; l < kLanes; ++l) low[l] = lowest, high[l] = highest;
    first = lowest / kSpan * kSpan, end = highest + 1;
    clear_from = low_max, clear_to = high_min + 1;
  }
};

// Fetches planes of a context into the L2 cache, evenly over so many calls, so that memory works while the caller computes: a burst would
// fill the processor's miss buffers and make it wait. Up to eight blocks are fetched side by side, as in prefetch.h.
class Feed {
 public:
  Feed() = default;
  // ``first`` and then ``second`` (none where it is nullptr), planes of the cache, are there once ``some`` was called ``calls`` times.
  Feed(const Cache& cache, const Context& context, const bits16* first, const bits16* second, int64_t calls)
      : plane_(reinterpret_cast<const char*>(first)), second_(reinterpret_cast<const char*>(second)), starts_(context.starts),
        row_bytes_(cache.row() * 2), num_blocks_(divide_up(context.tokens, kLanes)), left_(num_blocks_) {
    const int64_t lines = (second == nullptr ? 1 : 2) * num_blocks_ * kLanes * divide_up(row_bytes_, kLine);
    rate_ = divide_up(lines * kUnit, std::max<int64_t>(1, calls));
  }

  void some() {
    for (owed_ += rate_; owed_ > 0; at_ += kLine, owed_ -= count_ * kUnit) {
      if (at_ >= end_ && !begins()) return;
      for (int64_t i = 0; i < count_; ++i) _mm_prefetch(blocks_[i] + at_, _MM_HINT_T1);
    }
  }

 private:
  // The next blocks, or false where all were fetched.
  bool begins() {
    if (left_ == 0 && second_ != nullptr) plane_ = second_, second_ = nullptr, left_ = num_blocks_;
    if (left_ == 0) return rate_ = owed_ = 0, false;
    count_ = std::min(left_, kBeside);
    for (int64_t i = 0; i < count_; ++i) blocks_[i] = plane_ + starts_[num_blocks_ - left_ + i] * row_bytes_;
    left_ -= count_;
    at_ = 0, end_ = kLanes * row_bytes_;
    return true;
  }

  static constexpr int64_t kBeside = 8, kLine = 64, kUnit = 256;  // parts of a line that rates are counted in
  const char *plane_ = nullptr, *second_ = nullptr, *blocks_[kBeside];
  const int64_t* starts_ = nullptr;
  int64_t row_bytes_ = 0, num_blocks_ = 0, left_ = 0, count_ = 0, at_ = 0, end_ = 0, rate_ = 0, owed_ = 0;
};

// 16 tokens of one head as rows of a tile: in place where they are consecutive, else gathered; tokens past the end are zero.
inline const bits16* key_rows(const Cache& cache, const Context& context, int64_t token, int64_t head, bits16* gathered, int64_t& row_bytes) {
  if (cache.whole_blocks) {
    row_bytes = cache.row() * 2;
    return cache.k + context.starts[token / kLanes] * cache.row() + head * cache.dim;
  }
  for (int64_t t = 0; t < kLanes; ++t) {
    bits16* to = gathered + t * cache.dim;
    if (token + t < context.tokens) {
      std::memcpy(to, cache.k + context.slot(token + t) * cache.row() + head * cache.dim, cache.dim * 2);
    } else {
      std::memset(to, 0, cache.dim * 2);
    }
  }
  row_bytes = cache.dim * 2;
  return gathered;
}

// V of 32 tokens of one head, its dims [from, end), as tiles [16 dims each][16 pairs of tokens][16 dims][2]; tokens past the end are zero.
inline void interleave_values(const Cache& cache, const Context& context, int64_t token, int64_t head, int64_t from, int64_t end, bits16* to,
                              Feed& feed) {
  alignas(64) static constexpr uint16_t kLow[32] = {0, 32, 1, 33, 2,  34, 3,  35, 4,  36, 5,  37, 6,  38, 7,  39,
                                                    8, 40, 9, 41, 10, 42, 11, 43, 12, 44, 13, 45, 14, 46, 15, 47};
  const __m512i low = _mm512_load_si512(kLow), high = _mm512_add_epi16(low, _mm512_set1_epi16(16));
  const int64_t row = cache.row(), count = std::min(kSpan, context.tokens - token);
  const bits16* base = cache.v + head * cache.dim;
  const bits16* rows[kSpan];
  for (int64_t t = 0; t < count; t += cache.whole_blocks ? kLanes : 1) {
    if (cache.whole_blocks) {
      const bits16* at = base + context.starts[(token + t) / kLanes] * row;
      for (int64_t i = 0; i < kLanes; ++i) rows[t + i] = at + i * row;
    } else {
      rows[t] = base + context.slot(token + t) * row;
    }
  }
  for (int64_t pair = 0; pair < kSpan / 2; ++pair) {
    feed.some();
    const bool has_first = 2 * pair < count, has_second = 2 * pair + 1 < count;
    for (int64_t d = from; d < end; d += kDepth) {
      const __m512i x = has_first ? _mm512_loadu_si512(rows[2 * pair] + d) : _mm512_setzero_si512();
      const __m512i y = has_second ? _mm512_loadu_si512(rows[2 * pair + 1] + d) : _mm512_setzero_si512();
      bits16* out = to + (d - from) / kLanes * kTile + pair * kDepth;
      _mm512_store_si512(out, _mm512_permutex2var_epi16(x, low, y));
      _mm512_store_si512(out + kTile, _mm512_permutex2var_epi16(x, high, y));
    }
  }
}

inline void transpose16(__m512i r[16]) {
  __m512i t[16];
  for (int i = 0; i < 16; i += 2) {
    t[i] = _mm512_unpacklo_epi32(r[i], r[i + 1]);
    t[i + 1] = _mm512_unpackhi_epi32(r[i], r[i + 1]);
  }
  for (int i = 0; i < 16; i += 4) {
    r[i] = _mm512_unpacklo_epi64(t[i], t[i + 2]);
    r[i + 1] = _mm512_unpackhi_epi64(t[i], t[i + 2]);
    r[i + 2] = _mm512_unpacklo_epi64(t[i + 1], t[i + 3]);
    r[i + 3] = _mm512_unpackhi_epi64(t[i + 1], t[i + 3]);
  }
  for (int i = 0; i < 4; ++i) {
    t[i] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0x88);
    t[i + 4] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0xdd);
    t[i + 8] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0x88);
    t[i + 12] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0xdd);
  }
  for (int i = 0; i < 4; ++i) {
    r[i] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0x88);
    r[i + 8] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0xdd);
    r[i + 4] = _mm512_shuffle_i32x4(t[i + 4], t[i + 12], 0x88);
    r[i + 12] = _mm512_shuffle_i32x4(t[i + 4], t[i + 12], 0xdd);
  }
}

// Query rows, one a lane, as tiles [16 pairs of dims][16 lanes][2], one for every 32 dims. Lanes [0, lanes) are split among
// ``heads`` heads in equal runs; a head's tiles have zeros in the lanes of others.
template <typename Query>
void place_queries(const Query& query, int64_t lanes, int64_t heads, int64_t dim, bits16* tiles) {
  const int64_t depth = dim / kDepth, lanes_a_head = lanes / heads;
  for (int64_t d = 0; d < depth; ++d) {
    __m512i r[16];
    for (int64_t l = 0; l < kLanes; ++l) r[l] = l < lanes ? _mm512_loadu_si512(query(l) + d * kDepth) : _mm512_setzero_si512();
    transpose16(r);
    for (int64_t h = 0; h < heads; ++h) {
      const __mmask16 own = static_cast<__mmask16>(first_lanes((h + 1) * lanes_a_head) & ~first_lanes(h * lanes_a_head));
      for (int i = 0; i < 16; ++i) _mm512_store_si512(tiles + (h * depth + d) * kTile + i * kDepth, _mm512_maskz_mov_epi32(own, r[i]));
    }
  }
}

// scores [Blocks x 16 tokens][lanes] = sum over heads [head, head + heads) of K times that head's query tiles.
template <int Blocks>
inline void score_blocks(const Cache& cache, const Context& context, int64_t token, int64_t head, int64_t heads, const bits16* queries,
                         float* scores, bits16* gathered) {
  const int64_t depth = cache.dim / kDepth;
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  for (int64_t h = 0; h < heads; ++h) {
    const bits16* k[Blocks];
    int64_t bytes = 0;
    for (int b = 0; b < Blocks; ++b) {
      k[b] = key_rows(cache, context, token + b * kLanes, head + h, gathered + b * kLanes * cache.dim, bytes);
    }
    order_memory();
    for (int64_t d = 0; d < depth; ++d) {
      _tile_loadd(6, queries + (h * depth + d) * kTile, 64);
      _tile_loadd(4, k[0] + d * kDepth, bytes);
      _tile_dpbf16ps(0, 4, 6);
      if constexpr (Blocks > 1) {
        _tile_loadd(5, k[1] + d * kDepth, bytes);
        _tile_dpbf16ps(1, 5, 6);
      }
      if constexpr (Blocks > 2) {
        _tile_loadd(4, k[2] + d * kDepth, bytes);
        _tile_dpbf16ps(2, 4, 6);
      }
      if constexpr (Blocks > 3) {
        _tile_loadd(5, k[3] + d * kDepth, bytes);
        _tile_dpbf16ps(3, 5, 6);
      }
    }
    order_memory();  // the next head's keys may be gathered where these are
  }
  order_memory();
  _tile_stored(0, scores, 64);
  _tile_stored(1, scores + 256, 64);  // whole spans are written, so that no later reader meets what nobody wrote
  if constexpr (Blocks > 2) {
    _tile_stored(2, scores + 512, 64);
    _tile_stored(3, scores + 768, 64);
  }
  order_memory();
}

// Scores of tokens [first, end).
inline void score(const Cache& cache, const Context& context, int64_t first, int64_t end, int64_t head, int64_t heads,
                  const bits16* queries, float* scores, bits16* gathered) {
  for (int64_t token = first; token < end; token += 4 * kLanes, scores += 4 * 256) {
    switch (divide_up(std::min(4 * kLanes, end - token), kLanes)) {
      case 4: score_blocks<4>(cache, context, token, head, heads, queries, scores, gathered); break;
      case 3: score_blocks<3>(cache, context, token, head, heads, queries, scores, gathered); break;
      case 2: score_blocks<2>(cache, context, token, head, heads, queries, scores, gathered); break;
      default: score_blocks<1>(cache, context, token, head, heads, queries, scores, gathered);
    }
  }
}

// Turn scores [tokens][lanes] from sight.first on into weight tiles [spans][lanes][32 tokens] and 1/sum per lane.
inline void weigh(const Sight& sight, float scale, const float* scores, bits16* weights, float* inverse, Feed& feed) {
  const __m512i low = _mm512_load_si512(sight.low), high = _mm512_load_si512(sight.high);
  const auto seen = [&](int64_t c) {
    const __m512i at = _mm512_set1_epi32(static_cast<int32_t>(c));
    return _mm512_mask_cmple_epi32_mask(_mm512_cmple_epi32_mask(low, at), at, high);
  };
  __m512 best = _mm512_set1_ps(-std::numeric_limits<float>::infinity()), beside = best;
  const float* from = scores - sight.first * kLanes;
  int64_t c = sight.first;
  for (; c < std::min(sight.clear_from, sight.end); ++c) best = _mm512_mask_max_ps(best, seen(c), _mm512_load_ps(from + c * kLanes), best);
  for (; c + 1 < sight.clear_to; c += 2) {
    best = _mm512_max_ps(_mm512_load_ps(from + c * kLanes), best);
    beside = _mm512_max_ps(_mm512_load_ps(from + (c + 1) * kLanes), beside);
  }
  for (; c < sight.end; ++c) best = _mm512_mask_max_ps(best, seen(c), _mm512_load_ps(from + c * kLanes), best);
  best = _mm512_max_ps(best, beside);

  const __m512 factor = _mm512_set1_ps(scale * kLog2E), offset = _mm512_mul_ps(best, factor);
  alignas(64) static constexpr uint16_t kPairs[32] = {0, 16, 1, 17, 2,  18, 3,  19, 4,  20, 5,  21, 6,  22, 7,  23,
                                                      8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
  const __m512i pairs = _mm512_load_si512(kPairs);
  __m512 sum_even = _mm512_setzero_ps(), sum_odd = _mm512_setzero_ps();
  for (int64_t span = sight.first; span < sight.end; span += kSpan, weights += kTile) {
    __m512i turned[16];
    const bool clear = span >= sight.clear_from && span + kSpan <= sight.clear_to;
    for (int64_t p = 0; p < kSpan / 2; ++p) {
      feed.some();
      const int64_t token = span + 2 * p;
      __m512 even = exp2(_mm512_fmsub_ps(_mm512_load_ps(from + token * kLanes), factor, offset));
      __m512 odd = exp2(_mm512_fmsub_ps(_mm512_load_ps(from + (token + 1) * kLanes), factor, offset));
      if (!clear) {
        even = _mm512_maskz_mov_ps(seen(token), even);
        odd = _mm512_maskz_mov_ps(seen(token + 1), odd);
      }
      sum_even = _mm512_add_ps(sum_even, even);
      sum_odd = _mm512_add_ps(sum_odd, odd);
      turned[p] = _mm512_permutexvar_epi16(pairs, (__m512i)_mm512_cvtne2ps_pbh(odd, even));
    }
    transpose16(turned);
    for (int l = 0; l < 16; ++l) _mm512_store_si512(weights + l * kDepth, turned[l]);
  }
  _mm512_store_ps(inverse, _mm512_div_ps(_mm512_set1_ps(1.0f), _mm512_add_ps(sum_even, sum_odd)));
}

// result [lanes][H] of one KV head, its lanes from ``lane`` on; tiles 4-7 have as many rows as ``rows`` lanes, tile 1 too.
// values(span, from, end) gives the span's interleaved V of dims [from, end).
template <typename Values, typename Out>
void gather_values(const Sight& sight, int64_t dim, int64_t lane, int64_t rows, const bits16* weights, const float* inverse,
                   const Values& values, const Out& out) {
  alignas(64) float result[4 * 256];
  for (int64_t d = 0; d < dim; d += kDimsAtOnce) {
    const int64_t end = std::min(dim, d + kDimsAtOnce), tiles = (end - d) / kLanes;
    _tile_zero(4);
    _tile_zero(5);
    _tile_zero(6);
    _tile_zero(7);
    const bits16* w = weights + lane * kDepth;
    for (int64_t span = sight.first; span < sight.end; span += kSpan, w += kTile) {
      const bits16* v = values(span, d, end);
      order_memory();
      _tile_loadd(1, w, 64);
      _tile_loadd(2, v, 64);
      _tile_dpbf16ps(4, 1, 2);
      _tile_loadd(3, v + kTile, 64);
      _tile_dpbf16ps(5, 1, 3);
      if (tiles > 2) {
        _tile_loadd(2, v + 2 * kTile, 64);
        _tile_dpbf16ps(6, 1, 2);
        _tile_loadd(3, v + 3 * kTile, 64);
        _tile_dpbf16ps(7, 1, 3);
      }
      order_memory();  // the next span's values may be laid where these are
    }
    order_memory();
    _tile_stored(4, result, 64);
    _tile_stored(5, result + 256, 64);
    _tile_stored(6, result + 512, 64);
    _tile_stored(7, result + 768, 64);
    order_memory();
    for (int64_t r = 0; r < rows; ++r) {
      const __m512 factor = _mm512_set1_ps(inverse[lane + r]);
      for (int64_t t = 0; t < tiles; ++t) {
        store16(out(r) + d + t * kLanes, _mm512_mul_ps(_mm512_load_ps(result + t * 256 + r * kLanes), factor));
      }
    }
  }
}

}  // namespace antiphon::paged
