// The two halves of a layer on Intel's matrix units (hot): one call computes an attention half, one an FFN half, in bfloat16;
// weights may be int8 with a scale per output, and then rows become int8 with a scale each.
//
// Every row's sums have one order, so that a row's bits depend neither on its batch nor on threads, and a token recomputed as part
// of a prompt gets the bits it had as a decode. The torch path in models/ is the reference; where the processor lacks the
// instructions this file compiles to a library that says so.
// T rows, D hidden, N query heads, K KV heads, G = N/K, H head dim, R rotary dim, B decodes, M blocks a row.

#include <torch/library.h>

#if defined(__AMX_BF16__) && defined(__AMX_INT8__) && defined(__AMX_TILE__) && defined(__AVX512BF16__) && defined(__AVX512BW__)
#define ANTIPHON_TILES 1
#include <ATen/ops/empty.h>

#include <atomic>
#include <optional>
#include <tuple>

#include "gemm.h"
#include "paged.h"
#endif

namespace {

#ifdef ANTIPHON_TILES

using namespace antiphon;
using Bias = std::optional<Tensor>;

bool ready() {
  static const bool enabled = enable_tiles();
  return enabled;
}

// ---- rows ---------------------------------------------------------------------------------------------------------------

// RMSNorm of one row: statistics in fp32.
void norm_row(const bits16* x, const bits16* w, bits16* out, int64_t d, float eps) {
  __m512 a = _mm512_setzero_ps(), b = _mm512_setzero_ps();
  int64_t i = 0;
  for (; i + 32 <= d; i += 32) {
    const __m512 u = load16(x + i), v = load16(x + i + 16);
    a = _mm512_fmadd_ps(u, u, a);
    b = _mm512_fmadd_ps(v, v, b);
  }
  for (; i < d; i += 16) {
    const __m512 u = load16(x + i, first_lanes(d - i));
    a = _mm512_fmadd_ps(u, u, a);
  }
  const float mean = _mm512_reduce_add_ps(_mm512_add_ps(a, b)) / static_cast<float>(d);
  const __m512 scale = _mm512_set1_ps(1.0f / std::sqrt(mean + eps));
  for (i = 0; i < d; i += 16) {
    const __mmask16 m = first_lanes(d - i);
    store16(out + i, _mm512_mul_ps(_mm512_mul_ps(load16(x + i, m), scale), load16(w + i, m)), m);
  }
}

// Rows [T, width] of stride ``stride`` in int8 with one scale each; behind the width they are zero.
void quantize_rows(const bits16* x, int64_t rows, int64_t width, int64_t stride, int8_t* out, int64_t out_stride, float* scales) {
  parallel_for(0, rows, 8, [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t) {
      const bits16* row = x + t * stride;
      __m512 largest = _mm512_setzero_ps();
      __mmask16 bad = 0;
      for (int64_t i = 0; i < width; i += 16) {
        const __m512 v = load16(row + i, first_lanes(width - i));
        largest = _mm512_max_ps(largest, _mm512_abs_ps(v));
        bad |= _mm512_cmp_ps_mask(_mm512_sub_ps(v, v), _mm512_setzero_ps(), _CMP_NEQ_UQ);  // infinite, or no number
      }
      const float bound = _mm512_reduce_max_ps(largest);
      scales[t] = bad != 0 ? NAN : bound / 127.0f;  // a row that is no number anywhere must not look like one
      const __m512 factor = _mm512_set1_ps(bound > 0.0f && bad == 0 ? 127.0f / bound : 0.0f);
      int8_t* to = out + t * out_stride;
      for (int64_t i = 0; i < out_stride; i += 16) {
        const __m512 v = i < width ? load16(row + i, first_lanes(width - i)) : _mm512_setzero_ps();
        _mm_storeu_si128(reinterpret_cast<__m128i*>(to + i), _mm512_cvtsepi32_epi8(_mm512_cvtps_epi32(_mm512_mul_ps(v, factor))));
      }
    }
  });
}

void norm_rows(const bits16* x, const bits16* w, bits16* out, int64_t rows, int64_t d, int64_t out_stride, float eps) {
  parallel_for(0, rows, 16, [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t) norm_row(x + t * d, w, out + t * out_stride, d, eps);
  });
}

thread_local Scratch padded_rows, int8_rows, int8_scales, hidden_rows, seen_rows, wide_rows;

// Rows as a product takes them.
struct Rows {
  const char* data;
  int64_t count;
  const float* scales;  // of int8 rows
};

// Rows [count, width] with a whole number of tiles each: as they are, copied with zeros behind, or in int8 for int8 weights.
Rows rows_for(const Packed& w, const bits16* x, int64_t count, int64_t width, int64_t stride) {
  if (w.is_int8) {
    int8_t* to = int8_rows.get<int8_t>(count * w.row_bytes());
    float* scales = int8_scales.get<float>(count);
    quantize_rows(x, count, width, stride, to, w.row_bytes(), scales);
    return {reinterpret_cast<const char*>(to), count, scales};
  }
  const int64_t whole = w.row_bytes() / 2;
  if (stride == whole) return {reinterpret_cast<const char*>(x), count, nullptr};
  bits16* to = padded_rows.get<bits16>(count * whole);
  for (int64_t t = 0; t < count; ++t) {
    std::memcpy(to + t * whole, x + t * stride, width * 2);
    std::memset(to + t * whole + width, 0, (whole - width) * 2);
  }
  return {reinterpret_cast<const char*>(to), count, nullptr};
}

Rows rows_for(const Packed& w, const Tensor& x) {
  TORCH_CHECK(x.dim() == 2 && x.is_contiguous() && x.scalar_type() == at::kBFloat16);
  TORCH_CHECK(divide_up(x.size(1) * (w.is_int8 ? 1 : 2), kRowBytes) == w.depth);
  return rows_for(w, data16(x), x.size(0), x.size(1), x.size(1));
}

// ---- matrix products ----------------------------------------------------------------------------------------------------

constexpr int64_t kCachedBytes = int64_t{1} << 20;  // of rows that one pass over the weights reads: they stay in the L2 cache

// int32 sums of a block, in place as what they stand for: times the row's scale, times the output's.
void rescale(float* sums, int rows, int strips, const float* row_scales, const float* output_scales) {
  for (int s = 0; s < strips; ++s) {
    const __m512 by_output = _mm512_loadu_ps(output_scales + s * kLanes);
    for (int r = 0; r < rows; ++r) {
      float* at = sums + s * 256 + r * kLanes;
      const __m512 sum = _mm512_cvtepi32_ps(_mm512_load_si512(at));
      _mm512_store_ps(at, _mm512_mul_ps(_mm512_mul_ps(sum, _mm512_set1_ps(row_scales[r])), by_output));
    }
  }
}

// ``scales``: of int8 weights, by packed output. ``next``: weights of the product that follows, whose first strips are fetched at the
// end of this one.
template <typename Make>
void multiply(const Rows& rows, const Packed& w, const float* scales, const Packed* next, const Make& make_epilogue) {
  const int64_t row_bytes = w.row_bytes();
  const int64_t chunk = std::max<int64_t>(2 * kLanes, kCachedBytes / row_bytes / (2 * kLanes) * (2 * kLanes));
  parallel_for(0, divide_up(w.strips, 2), 1, [&](int64_t begin, int64_t end) {
    const auto epilogue = make_epilogue();
    gemm::Soon after;
    if (next != nullptr) {  // its strips fall to threads as these do
      const int64_t pairs = divide_up(w.strips, 2), first = 2 * (begin * divide_up(next->strips, 2) / pairs);
      after = gemm::Soon(*next, first, 4);
    }
    const int64_t last = std::min(2 * end, w.strips);
    for (int64_t first = 0; first < rows.count; first += chunk) {
      const int64_t count = std::min(chunk, rows.count - first);
      if (w.is_int8) {
        gemm::run<true>(rows.data, row_bytes, first, count, w, 2 * begin, last, after,
                        [&](int64_t row, int height, int64_t strip, int strips, float* sums) {
                          rescale(sums, height, strips, rows.scales + row, scales + strip * kLanes);
                          epilogue(row, height, strip, strips, sums);
                        });
      } else {
        gemm::run<false>(rows.data, row_bytes, first, count, w, 2 * begin, last, after, epilogue);
      }
    }
  });
}

const bits16* bias_data(const Bias& bias) { return bias.has_value() ? data16(*bias) : nullptr; }

__m512 with_bias(__m512 v, const bits16* bias, int64_t output, __mmask16 m) {
  return bias == nullptr ? v : _mm512_add_ps(v, load16(bias + output, m));
}

// Calls put(row, output, mask, sums) for every 16 sums of a block.
template <typename Put>
auto each_sixteen(int64_t outputs, const bits16* bias, const Put& put) {
  return [=](int64_t row, int rows, int64_t strip, int strips, const float* sums) {
    for (int s = 0; s < strips; ++s) {
      const int64_t output = (strip + s) * kLanes;
      const __mmask16 m = first_lanes(outputs - output);
      for (int r = 0; r < rows; ++r) put(row + r, output, m, with_bias(_mm512_load_ps(sums + s * 256 + r * kLanes), bias, output, m));
    }
  };
}

void linear_into(const Rows& rows, const Packed& w, const float* scales, const Packed* next, const Bias& bias, int64_t outputs,
                 bits16* out) {
  const bits16* b = bias_data(bias);
  multiply(rows, w, scales, next, [&] {
    return each_sixteen(outputs, b, [=](int64_t t, int64_t o, __mmask16 m, __m512 v) { store16(out + t * outputs + o, v, m); });
  });
}

// Scales of int8 weights, one for every packed output.
const float* scale_data(const Packed& w, const Bias& scales) {
  if (!w.is_int8) return nullptr;
  TORCH_CHECK(scales.has_value() && scales->scalar_type() == at::kFloat && scales->is_contiguous() && scales->numel() == w.strips * kLanes);
  return scales->const_data_ptr<float>();
}

Tensor pack_weight(const Tensor& weight, bool pairs) { return pack(weight, pairs); }

Tensor tile_linear(const Tensor& x, const Tensor& packed, const Bias& scales, const Bias& bias, int64_t outputs) {
  const Packed w(packed);
  Tensor out = at::empty({x.size(0), outputs}, x.options());
  linear_into(rows_for(w, x), w, scale_data(w, scales), nullptr, bias, outputs, data16(out));
  return out;
}

// The same with results in fp32.
Tensor tile_logits(const Tensor& x, const Tensor& packed, const Bias& bias, int64_t outputs) {
  const Packed w(packed);
  Tensor out = at::empty({x.size(0), outputs}, x.options().dtype(at::kFloat));
  float* to = out.data_ptr<float>();
  multiply(rows_for(w, x), w, nullptr, nullptr, [&] {
    return each_sixteen(outputs, bias_data(bias),
                        [=](int64_t t, int64_t o, __mmask16 m, __m512 v) { _mm512_mask_storeu_ps(to + t * outputs + o, m, v); });
  });
  return out;
}

// The largest result of every row and the lowest index that has it, without storing the others. NaN is larger than any number.
std::tuple<Tensor, Tensor> tile_best(const Tensor& x, const Tensor& packed, const Bias& bias, int64_t outputs) {
  const Packed w(packed);
  const int64_t rows = x.size(0);
  struct Best {
    alignas(64) float value[kLanes];
    alignas(64) int32_t index[kLanes];
  };
  const int64_t threads = at::get_num_threads();
  static thread_local Scratch scratch;
  Best* table = scratch.get<Best>(rows * threads);
  for (int64_t i = 0; i < rows * threads; ++i) {
    std::fill_n(table[i].value, kLanes, -std::numeric_limits<float>::infinity());
    std::fill_n(table[i].index, kLanes, static_cast<int32_t>(outputs));
  }
  multiply(rows_for(w, x), w, nullptr, nullptr, [&] {
    Best* mine = table + ThreadPool::thread() * rows;
    return each_sixteen(outputs, bias_data(bias), [=](int64_t t, int64_t o, __mmask16 m, __m512 v) {
      Best& best = mine[t];
      // Outputs come in ascending order, so an equal one later on does not win; NaN does, and stays.
      const __mmask16 larger = _mm512_mask_cmp_ps_mask(m, v, _mm512_load_ps(best.value), _CMP_GT_OQ);
      const __mmask16 won = larger | _mm512_mask_cmp_ps_mask(m, v, v, _CMP_UNORD_Q);
      _mm512_mask_store_ps(best.value, won, v);
      _mm512_mask_store_epi32(best.index, won,
                              _mm512_add_epi32(_mm512_set1_epi32(static_cast<int32_t>(o)),
                                               _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0)));
    });
  });
  Tensor ids = at::empty({rows}, x.options().dtype(at::kLong)), values = at::empty({rows}, x.options().dtype(at::kFloat));
  for (int64_t t = 0; t < rows; ++t) {
    float value = -std::numeric_limits<float>::infinity();
    int32_t index = 0;
    for (int64_t k = 0; k < threads; ++k) {
      const Best& best = table[k * rows + t];
      for (int64_t l = 0; l < kLanes; ++l) {
        const bool nan = best.value[l] != best.value[l];
        if (nan || best.value[l] > value || (best.value[l] == value && best.index[l] < index)) value = best.value[l], index = best.index[l];
        if (nan) break;
      }
      if (value != value) break;
    }
    ids.data_ptr<int64_t>()[t] = index;
    values.data_ptr<float>()[t] = value;
  }
  return {ids, values};
}

// ---- attention ----------------------------------------------------------------------------------------------------------

struct Heads {
  int64_t queries, keys, dim, rotated_half;  // N, K, H, R/2
  int64_t groups() const { return queries / keys; }
  int64_t width() const { return (queries + 2 * keys) * dim; }
};

// Rotate q and k of rows_TW in place, norming them per head first where norms are given, and store k and v at slots_T.
void rotate_and_cache(bits16* rows, int64_t count, const Heads& heads, const Tensor& cos, const Tensor& sin, const int64_t* positions,
                      const int64_t* slots, bits16* k_cache, bits16* v_cache, const Bias& q_norm, const Bias& k_norm, float eps) {
  const int64_t half = heads.rotated_half, kv_width = heads.keys * heads.dim;
  const float *cos_table = cos.const_data_ptr<float>(), *sin_table = sin.const_data_ptr<float>();
  const bits16 *q_weight = bias_data(q_norm), *k_weight = bias_data(k_norm);
  parallel_for(0, count, 8, [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t) {
      bits16* row = rows + t * heads.width();
      const float *c = cos_table + positions[t] * half, *s = sin_table + positions[t] * half;
      for (int64_t n = 0; n < heads.queries + heads.keys; ++n) {
        bits16* head = row + n * heads.dim;
        const bits16* weight = n < heads.queries ? q_weight : k_weight;
        if (weight != nullptr) norm_row(head, weight, head, heads.dim, eps);
        for (int64_t i = 0; i < half; i += 16) {
          const __mmask16 m = first_lanes(half - i);
          const __m512 a = load16(head + i, m), b = load16(head + half + i, m);
          const __m512 cs = _mm512_maskz_loadu_ps(m, c + i), sn = _mm512_maskz_loadu_ps(m, s + i);
          store16(head + i, _mm512_fmsub_ps(a, cs, _mm512_mul_ps(b, sn)), m);
          store16(head + half + i, _mm512_fmadd_ps(b, cs, _mm512_mul_ps(a, sn)), m);
        }
      }
      const bits16* k = row + heads.queries * heads.dim;
      std::memcpy(k_cache + slots[t] * kv_width, k, kv_width * 2);
      std::memcpy(v_cache + slots[t] * kv_width, k + kv_width, kv_width * 2);
    }
  });
}

struct Workspace {
  Scratch scores, weights, values, queries, keys, starts, starts_beside;
};
thread_local Workspace workspace;

const TileShapes& sixteen() {
  static const TileShapes shapes{16, 16, 16, 16, 16, 16, 16, 16};
  return shapes;
}

// One decoding row: q [N, H] over its context, KV heads [head, head + count), a group of lanes at a time. K and V of ``next``, the thread's
// next row, are fetched meanwhile, and of the thread's first row (``is_first``) V while scores are weighed.
void decode_row(const bits16* q, const paged::Cache& cache, const paged::Context& context, bool is_first, const paged::Context* next,
                const Heads& heads, int64_t head, int64_t count, float scale, int64_t window, bits16* out) {
  Workspace& ws = workspace;
  const int64_t groups = heads.groups(), depth = heads.dim / kDepth;
  const int64_t heads_a_pass = std::max<int64_t>(1, kLanes / groups), last = context.tokens - 1;
  const bool fetches = cache.whole_blocks && count == heads.keys;
  paged::Sight sight;
  std::fill_n(sight.low, kLanes, static_cast<int32_t>(window > 0 ? std::max<int64_t>(0, last - window + 1) : 0));
  std::fill_n(sight.high, kLanes, static_cast<int32_t>(last));
  sight.close(kLanes);
  const int64_t spans = divide_up(sight.end - sight.first, paged::kSpan);
  float* scores = ws.scores.get<float>((spans + 1) * 512);
  bits16* weights = ws.weights.get<bits16>(spans * kTile);
  bits16* keys = ws.keys.get<bits16>(4 * kLanes * heads.dim);
  bits16* values = ws.values.get<bits16>(paged::kDimsAtOnce / kLanes * kTile);
  bits16* queries = ws.queries.get<bits16>(heads_a_pass * depth * kTile);
  alignas(64) float inverse[kLanes];
  const int64_t pairs = spans * paged::kSpan / 2, lane_groups = divide_up(groups, kLanes);
  const int64_t weighed = divide_up(count, heads_a_pass) * lane_groups * pairs;
  const int64_t gathered = count * lane_groups * divide_up(heads.dim, paged::kDimsAtOnce) * pairs;
  paged::Feed own, soon;
  if (fetches && is_first) own = paged::Feed(cache, context, cache.v, nullptr, pairs);
  if (fetches && next != nullptr) soon = paged::Feed(cache, *next, cache.k, cache.v, gathered + (is_first ? 0 : weighed));
  for (int64_t h = head; h < head + count; h += heads_a_pass) {
    const int64_t here = std::min(heads_a_pass, head + count - h);
    for (int64_t g = 0; g < groups; g += kLanes) {  // more than 16 query heads of one KV head take several passes
      const int64_t lanes = std::min(std::min(groups, kLanes), groups - g);
      paged::place_queries([&](int64_t l) { return q + ((h + l / lanes) * groups + g + l % lanes) * heads.dim; }, here * lanes, here,
                           heads.dim, queries);
      sixteen().load();
      paged::score(cache, context, sight.first, sight.end, h, here, queries, scores, keys);
      paged::weigh(sight, scale, scores, weights, inverse, is_first ? own : soon);
      const int rows = static_cast<int>(lanes);
      TileShapes{16, rows, 16, 16, rows, rows, rows, rows}.load();
      for (int64_t j = 0; j < here; ++j) {
        paged::gather_values(
            sight, heads.dim, j * lanes, lanes, weights, inverse,
            [&](int64_t span, int64_t from, int64_t end) {
              paged::interleave_values(cache, context, span, h + j, from, end, values, soon);
              return values;
            },
            [&](int64_t r) { return out + ((h + j) * groups + g + r) * heads.dim; });
      }
    }
  }
  _tile_release();
}

// One prompt chunk: rows [0, rows) of q (stride ``width``) see the context causally, the last row its last token.
void attend_chunk(const bits16* q, int64_t width, int64_t rows, const paged::Cache& cache, paged::Context context, const Heads& heads,
                  float scale, int64_t window, bits16* out) {
  const int64_t groups = heads.groups(), depth = heads.dim / kDepth, past = context.tokens - rows;
  const int64_t from = window > 0 ? std::max<int64_t>(0, past - window + 1) / paged::kSpan * paged::kSpan : 0;
  const int64_t spans = divide_up(context.tokens - from, paged::kSpan), span_size = heads.dim / kLanes * kTile;
  if (cache.whole_blocks) context.lay_out(workspace.starts.get<int64_t>(divide_up(context.tokens, kLanes)));
  static thread_local Scratch interleaved;
  bits16* values = interleaved.get<bits16>(heads.keys * spans * span_size);
  parallel_for(0, heads.keys * spans, 8, [&](int64_t begin, int64_t end) {
    paged::Feed nothing;
    for (int64_t i = begin; i < end; ++i) {
      paged::interleave_values(cache, context, from + i % spans * paged::kSpan, i / spans, 0, heads.dim, values + i * span_size, nothing);
    }
  });
  const int64_t tiles = divide_up(rows * groups, kLanes), num_tasks = tiles * heads.keys;
  std::atomic<int64_t> next{0};
  parallel_for(0, std::min<int64_t>(at::get_num_threads(), num_tasks), 1, [&](int64_t, int64_t) {
    Workspace& ws = workspace;
    bits16* queries = ws.queries.get<bits16>(depth * kTile);
    bits16* keys = ws.keys.get<bits16>(4 * kLanes * heads.dim);
    alignas(64) float inverse[kLanes];
    sixteen().load();
    for (int64_t task = next++; task < num_tasks; task = next++) {
      const int64_t tile = tiles - 1 - task / heads.keys, head = task % heads.keys;  // those with most context first
      const int64_t first = tile * kLanes, lanes = std::min(kLanes, rows * groups - first);
      paged::Sight sight;
      for (int64_t l = 0; l < lanes; ++l) {
        const int64_t t = (first + l) / groups;
        sight.high[l] = static_cast<int32_t>(past + t);
        sight.low[l] = static_cast<int32_t>(window > 0 ? std::max<int64_t>(0, past + t - window + 1) : 0);
      }
      sight.close(lanes);
      paged::place_queries([&](int64_t l) { return q + (first + l) / groups * width + (head * groups + (first + l) % groups) * heads.dim; },
                           lanes, 1, heads.dim, queries);
      const int64_t here = divide_up(sight.end - sight.first, paged::kSpan);
      float* scores = ws.scores.get<float>((here + 1) * 512);
      bits16* weights = ws.weights.get<bits16>(here * kTile);
      paged::score(cache, context, sight.first, sight.end, head, 1, queries, scores, keys);
      paged::Feed nothing;
      paged::weigh(sight, scale, scores, weights, inverse, nothing);
      paged::gather_values(
          sight, heads.dim, 0, lanes, weights, inverse,
          [&](int64_t span, int64_t dim, int64_t) {
            return values + (head * spans + (span - from) / paged::kSpan) * span_size + dim / kLanes * kTile;
          },
          [&](int64_t r) {
            return out + ((first + r) / groups * heads.queries + head * groups + (first + r) % groups) * heads.dim;
          });
    }
    _tile_release();
  });
}

struct Batch {
  const Bias& blocks;  // int32 [B, M]
  const Bias& lens;    // int64 [B]
  int64_t block_size;
  at::TensorList chunk_slots;  // int64 [C] by chunk
  at::IntArrayRef chunk_rows;  // rows by chunk; chunks follow the decodes, in order
};

void attend_rows(const bits16* qkv, const Tensor& k_cache, const Tensor& v_cache, const Batch& batch, const Heads& heads, float scale,
                 int64_t window, bits16* out) {
  const paged::Cache cache{data16(k_cache), data16(v_cache), heads.keys, heads.dim, batch.block_size % kLanes == 0};
  const int64_t width = heads.width(), out_width = heads.queries * heads.dim;
  int64_t row = 0;
  if (batch.lens.has_value() && batch.blocks.has_value()) {
    const int64_t decodes = batch.lens->numel(), stride = batch.blocks->size(1);
    const int32_t* table = batch.blocks->const_data_ptr<int32_t>();
    const int64_t* lens = batch.lens->const_data_ptr<int64_t>();
    const int64_t parts = decodes >= 2 * at::get_num_threads() ? 1 : std::min<int64_t>(heads.keys, at::get_num_threads());
    parallel_for(0, decodes * parts, 1, [&](int64_t begin, int64_t end) {
      const auto context_of = [&](int64_t task, Scratch& starts) {
        const int64_t b = task / parts;
        paged::Context context{table + b * stride, batch.block_size, nullptr, lens[b]};
        if (cache.whole_blocks) context.lay_out(starts.get<int64_t>(divide_up(context.tokens, kLanes)));
        return context;
      };
      Workspace& ws = workspace;
      paged::Context context = context_of(begin, ws.starts);
      for (int64_t task = begin; task < end; ++task) {
        const int64_t b = task / parts, head = heads.keys * (task % parts) / parts, stop = heads.keys * (task % parts + 1) / parts;
        const bool has_next = task + 1 < end;
        Scratch& beside = (task - begin) % 2 == 0 ? ws.starts_beside : ws.starts;
        const paged::Context next = has_next ? context_of(task + 1, beside) : context;
        decode_row(qkv + b * width, cache, context, task == begin, has_next ? &next : nullptr, heads, head, stop - head, scale, window,
                   out + b * out_width);
        context = next;
      }
    });
    row = decodes;
  }
  for (size_t i = 0; i < batch.chunk_slots.size(); ++i) {
    const Tensor& slots = batch.chunk_slots[i];
    const paged::Context context{nullptr, batch.block_size, slots.const_data_ptr<int64_t>(), slots.numel()};
    attend_chunk(qkv + row * width, width, batch.chunk_rows[i], cache, context, heads, scale, window, out + row * out_width);
    row += batch.chunk_rows[i];
  }
}

Heads heads_of(const Tensor& k_cache, int64_t num_heads, const Tensor& cos) {
  const Heads heads{num_heads, k_cache.size(1), k_cache.size(2), cos.size(1)};
  TORCH_CHECK(heads.dim % kDepth == 0 && num_heads % heads.keys == 0 && k_cache.is_contiguous() && 2 * heads.rotated_half <= heads.dim);
  return heads;
}

// Attention of qkv_T(N+2K)H, rotated here in place; K and V are in the cache afterwards. [T, N*H].
Tensor tile_attention(const Tensor& qkv, const Tensor& cos, const Tensor& sin, const Tensor& positions, const Tensor& slots,
                      const Tensor& k_cache, const Tensor& v_cache, const Bias& blocks, const Bias& lens, int64_t block_size,
                      at::TensorList chunk_slots, at::IntArrayRef chunk_rows, int64_t num_heads, double scale, int64_t window,
                      const Bias& q_norm, const Bias& k_norm, double eps) {
  const Heads heads = heads_of(k_cache, num_heads, cos);
  const int64_t rows = positions.numel();
  TORCH_CHECK(qkv.is_contiguous() && qkv.numel() == rows * heads.width());
  rotate_and_cache(data16(qkv), rows, heads, cos, sin, positions.const_data_ptr<int64_t>(), slots.const_data_ptr<int64_t>(),
                   data16(k_cache), data16(v_cache), q_norm, k_norm, static_cast<float>(eps));
  Tensor out = at::empty({rows, num_heads * heads.dim}, qkv.options());
  attend_rows(data16(qkv), k_cache, v_cache, Batch{blocks, lens, block_size, chunk_slots, chunk_rows}, heads, static_cast<float>(scale),
              window, data16(out));
  return out;
}

// The attention half of a layer: x_TD advances in place, the FFN's rows come back.
Tensor attention_half(const Tensor& x, const Tensor& input_norm, const Tensor& qkv_weight, const Bias& qkv_bias, const Tensor& cos,
                      const Tensor& sin, const Tensor& positions, const Tensor& slots, const Tensor& k_cache, const Tensor& v_cache,
                      const Bias& blocks, const Bias& lens, int64_t block_size, at::TensorList chunk_slots, at::IntArrayRef chunk_rows,
                      int64_t num_heads, double scale, int64_t window, const Bias& q_norm, const Bias& k_norm, const Tensor& out_weight,
                      const Bias& out_bias, const Tensor& ffn_norm, double eps) {
  const Heads heads = heads_of(k_cache, num_heads, cos);
  const int64_t rows = x.size(0), d = x.size(1);
  const float e = static_cast<float>(eps);
  const Packed qkv_packed(qkv_weight), out_packed(out_weight);
  TORCH_CHECK(x.is_contiguous() && x.scalar_type() == at::kBFloat16 && positions.numel() == rows && slots.numel() == rows);
  TORCH_CHECK(!qkv_packed.is_int8 && !out_packed.is_int8);
  const int64_t stride = qkv_packed.depth * kDepth, width = heads.width();
  bits16* normed = hidden_rows.get<bits16>(rows * stride);
  if (stride != d) std::memset(normed, 0, rows * stride * 2);
  norm_rows(data16(x), data16(input_norm), normed, rows, d, stride, e);
  bits16* qkv = wide_rows.get<bits16>(rows * width);
  linear_into({reinterpret_cast<const char*>(normed), rows, nullptr}, qkv_packed, nullptr, &out_packed, qkv_bias, width, qkv);
  rotate_and_cache(qkv, rows, heads, cos, sin, positions.const_data_ptr<int64_t>(), slots.const_data_ptr<int64_t>(), data16(k_cache),
                   data16(v_cache), q_norm, k_norm, e);
  bits16* seen = seen_rows.get<bits16>(rows * num_heads * heads.dim);  // N*H is a multiple of 32, as H is
  attend_rows(qkv, k_cache, v_cache, Batch{blocks, lens, block_size, chunk_slots, chunk_rows}, heads, static_cast<float>(scale), window,
              seen);
  bits16* stream = data16(x);
  multiply({reinterpret_cast<const char*>(seen), rows, nullptr}, out_packed, nullptr, nullptr, [&] {
    return each_sixteen(d, bias_data(out_bias), [=](int64_t t, int64_t o, __mmask16 m, __m512 v) {
      bits16* at = stream + t * d + o;
      store16(at, _mm512_add_ps(load16(at, m), v), m);
    });
  });
  Tensor leaving = at::empty(x.sizes(), x.options());
  norm_rows(stream, data16(ffn_norm), data16(leaving), rows, d, d, e);
  return leaving;
}

// A gated FFN shard: down(silu(gate(x)) * up(x)); gate and up are packed in pairs of strips. Scales where weights are int8.
Tensor gated_half(const Tensor& x, const Tensor& gate_up_weight, const Bias& gate_up_scales, const Bias& gate_up_bias,
                  const Tensor& down_weight, const Bias& down_scales, const Bias& down_bias, int64_t intermediate) {
  const Packed gate_up(gate_up_weight), down(down_weight);
  const int64_t rows = x.size(0), stride = divide_up(intermediate, kDepth) * kDepth, outputs = x.size(1);
  TORCH_CHECK(gate_up.strips % 2 == 0 && gate_up.strips / 2 == divide_up(intermediate, kLanes));
  TORCH_CHECK(down.depth == divide_up(intermediate * (down.is_int8 ? 1 : 2), kRowBytes));
  bits16* activated = wide_rows.get<bits16>(rows * stride);
  if (stride != intermediate) std::memset(activated, 0, rows * stride * 2);
  const bits16* bias = bias_data(gate_up_bias);
  multiply(rows_for(gate_up, x), gate_up, scale_data(gate_up, gate_up_scales), &down, [&] {
    return [=](int64_t row, int count, int64_t strip, int strips, const float* sums) {
      for (int s = 0; s < strips; s += 2) {
        const int64_t output = (strip + s) / 2 * kLanes;
        const __mmask16 m = first_lanes(intermediate - output);
        for (int r = 0; r < count; ++r) {
          const __m512 gate = with_bias(_mm512_load_ps(sums + s * 256 + r * kLanes), bias, output, m);
          const __m512 up = with_bias(_mm512_load_ps(sums + (s + 1) * 256 + r * kLanes), bias, intermediate + output, m);
          store16(activated + (row + r) * stride + output, _mm512_mul_ps(silu(gate), up), m);
        }
      }
    };
  });
  Tensor out = at::empty({rows, outputs}, x.options());
  linear_into(rows_for(down, activated, rows, intermediate, stride), down, scale_data(down, down_scales), nullptr, down_bias, outputs,
              data16(out));
  return out;
}

// Fetch these bytes of a weight into the calling thread's cache.
void warm(const Tensor& weight, int64_t first, int64_t bytes) {
  TORCH_CHECK(weight.is_contiguous() && first >= 0 && bytes >= 0 && first + bytes <= static_cast<int64_t>(weight.nbytes()));
  Prefetch ahead;
  ahead.start(static_cast<const char*>(weight.const_data_ptr()) + first, bytes);
  ahead.fetch_all();
}

#else

bool ready() { return false; }

#endif

}  // namespace

TORCH_LIBRARY_FRAGMENT(antiphon, m) {
  m.def("tiles_ready() -> bool", &ready);
#ifdef ANTIPHON_TILES
  m.def("warm(Tensor weight, int first, int bytes) -> ()");
  m.def("pack_weight(Tensor weight, bool pairs) -> Tensor");
  m.def("tile_linear(Tensor x, Tensor packed, Tensor? scales, Tensor? bias, int outputs) -> Tensor");
  m.def("tile_logits(Tensor x, Tensor packed, Tensor? bias, int outputs) -> Tensor");
  m.def("tile_best(Tensor x, Tensor packed, Tensor? bias, int outputs) -> (Tensor, Tensor)");
  m.def(
      "tile_attention(Tensor(a!) qkv, Tensor cos, Tensor sin, Tensor positions, Tensor slots, Tensor(b!) k_cache, Tensor(c!) v_cache, "
      "Tensor? blocks, Tensor? lens, int block_size, Tensor[] chunk_slots, int[] chunk_rows, int num_heads, float scale, int window, "
      "Tensor? q_norm, Tensor? k_norm, float eps) -> Tensor");
  m.def(
      "attention_half(Tensor(a!) x, Tensor input_norm, Tensor qkv_weight, Tensor? qkv_bias, Tensor cos, Tensor sin, Tensor positions, "
      "Tensor slots, Tensor(b!) k_cache, Tensor(c!) v_cache, Tensor? blocks, Tensor? lens, int block_size, Tensor[] chunk_slots, "
      "int[] chunk_rows, int num_heads, float scale, int window, Tensor? q_norm, Tensor? k_norm, Tensor out_weight, Tensor? out_bias, "
      "Tensor ffn_norm, float eps) -> Tensor");
  m.def(
      "gated_half(Tensor x, Tensor gate_up_weight, Tensor? gate_up_scales, Tensor? gate_up_bias, Tensor down_weight, Tensor? down_scales, "
      "Tensor? down_bias, int intermediate) -> Tensor");
#endif
}

#ifdef ANTIPHON_TILES
TORCH_LIBRARY_IMPL(antiphon, CompositeExplicitAutograd, m) {
  m.impl("warm", &warm);
  m.impl("pack_weight", &pack_weight);
  m.impl("tile_linear", &tile_linear);
  m.impl("tile_logits", &tile_logits);
  m.impl("tile_best", &tile_best);
  m.impl("tile_attention", &tile_attention);
  m.impl("attention_half", &attention_half);
  m.impl("gated_half", &gated_half);
}
#endif
