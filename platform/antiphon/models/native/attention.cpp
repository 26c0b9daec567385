// Paged attention over the rows of one step (hot): decodes, then prompts' chunks, for processors without matrix units.
//
// A row's result has one order of sums whatever the rows beside it, and whether it came as a decode or in a chunk: a score is eight
// lanes over the head's dimensions, then lanes in pairs; the softmax goes over the row's own context, a span after the other (online,
// arXiv 1805.02867); values are added in the order of the context. So a token recomputed as part of a prompt gets the bits it had as a decode, however the prompt was cut.
// Keys and values are widened once for some rows of a chunk and all query heads that share them, a run of the context at a time.
// T rows, N query heads, K KV heads, G = N/K, H head dim of queries and keys, V of values, C context, Q = queries of a task.

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include "elements.h"
#include "lanes.h"
#include "thread_pool.h"

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <optional>
#include <vector>

namespace {

using antiphon::bf16;
using antiphon::data;
using antiphon::dispatch;
using antiphon::exp_negative;
using antiphon::f32x8;
using antiphon::kVector;
using antiphon::load;
using antiphon::load8;
using antiphon::multiply_add;
using antiphon::store;
using antiphon::store8;
using antiphon::total;
using antiphon::totals;
using at::Tensor;

constexpr int64_t kRun = 32;      // of the context whose keys, or values, are widened at once
constexpr int64_t kSpan = 512;    // of the context, from a multiple of itself, whose scores are held at once: they fit the second cache
constexpr int64_t kQueries = 48;  // of a chunk that share them, about

// Rows [row, row + count) of the step, which follow each other in a request; the first sees [.., past] of the context.
struct Rows {
  int64_t row, count, past;
  const int64_t* slots;   // of the context, or
  const int32_t* blocks;  // its blocks
  int64_t block_size;

  int64_t slot(int64_t c) const { return slots != nullptr ? slots[c] : blocks[c / block_size] * block_size + c % block_size; }
};

struct Heads {
  int64_t groups, h, v;  // G, H, V
  int64_t k_slot, k_head, v_slot, v_head;  // strides
  int64_t window;
  float scale, cap;
  int64_t wide_h() const { return (h + kVector - 1) / kVector * kVector; }
  int64_t wide_v() const { return (v + kVector - 1) / kVector * kVector; }
};

// Rows of ``width`` elements in fp32, each padded with zeros to ``wide``.
template <typename T>
void widen(const T* from, int64_t width, float* to, int64_t wide) {
  int64_t i = 0;
  for (; i + kVector <= width; i += kVector) store8(to + i, load8(from + i));
  for (; i < width; ++i) to[i] = load(from[i]);
  for (; i < wide; ++i) to[i] = 0.0f;
}

constexpr int64_t kAhead = 24;  // tokens whose keys are fetched before they are needed: a block's are far from the next one's

// Have a row of a cache fetched.
template <typename T>
inline void expect(const T* row, int64_t width) {
  constexpr int64_t kLine = 64 / sizeof(T);
  for (int64_t i = 0; i < width; i += kLine) __builtin_prefetch(row + i);
}

// scores[q][k] of Queries queries and four keys; rows of both ``wide`` floats apart.
template <int Queries>
[[gnu::always_inline]] inline void four_keys(const float* queries, const float* keys, int64_t wide, float* scores) {
  f32x8 acc[Queries][4] = {};
  for (int64_t i = 0; i < wide; i += kVector) {
    f32x8 key[4];
    for (int k = 0; k < 4; ++k) key[k] = load8(keys + k * wide + i);
    for (int q = 0; q < Queries; ++q) {
      const f32x8 query = load8(queries + q * wide + i);
      for (int k = 0; k < 4; ++k) acc[q][k] = multiply_add(query, key[k], acc[q][k]);
    }
  }
  for (int q = 0; q < Queries; ++q) totals(acc[q], scores + q * kSpan);
}

template <int Queries>
void score_run(const float* queries, const float* keys, int64_t num_keys, int64_t wide, float* scores) {
  for (int64_t k = 0; k < num_keys; k += 4) four_keys<Queries>(queries, keys + k * wide, wide, scores + k);
}

// result[g][i] += weights[g][c] * values[c][i] over c, for Groups queries and 8 * Lanes dimensions.
template <int Groups, int Lanes>
[[gnu::always_inline]] inline void add_lanes(const float* weights, const float* values, int64_t count, int64_t wide, float* results) {
  f32x8 acc[Groups][Lanes];
  for (int g = 0; g < Groups; ++g) {
    for (int l = 0; l < Lanes; ++l) acc[g][l] = load8(results + g * wide + l * kVector);
  }
  for (int64_t c = 0; c < count; ++c) {
    f32x8 value[Lanes];
    for (int l = 0; l < Lanes; ++l) value[l] = load8(values + c * wide + l * kVector);
    for (int g = 0; g < Groups; ++g) {
      const f32x8 weight = f32x8{} + weights[g * kSpan + c];
      for (int l = 0; l < Lanes; ++l) acc[g][l] = multiply_add(weight, value[l], acc[g][l]);
    }
  }
  for (int g = 0; g < Groups; ++g) {
    for (int l = 0; l < Lanes; ++l) store8(results + g * wide + l * kVector, acc[g][l]);
  }
}

template <int Groups>
void add_values(const float* weights, const float* values, int64_t count, int64_t wide, float* results) {
  constexpr int kLanes = 8 / Groups;
  int64_t i = 0;
  for (; i + kLanes * kVector <= wide; i += kLanes * kVector) add_lanes<Groups, kLanes>(weights, values + i, count, wide, results + i);
  for (; i < wide; i += kVector) add_lanes<Groups, 1>(weights, values + i, count, wide, results + i);
}

// What a query knows of the softmax over its context so far: the largest score and the sum of exp(score - best).
struct Softmax {
  float best, sum;
};

// Scores of a row's part of a span become weights against the best so far; its result so far is brought to the same.
void soften(float* s, int64_t count, float cap, Softmax& so_far, float* result, int64_t wide) {
  if (cap > 0.0f) {
#pragma omp simd
    for (int64_t c = 0; c < count; ++c) {
      const float x = s[c] / cap, e = exp_negative(-2.0f * std::fabs(x));
      s[c] = std::copysign(cap * ((1.0f - e) / (1.0f + e)), x);
    }
  }
  float best = so_far.best;
#pragma omp simd reduction(max : best)
  for (int64_t c = 0; c < count; ++c) best = s[c] > best ? s[c] : best;
#pragma omp simd
  for (int64_t c = 0; c < count; ++c) s[c] = exp_negative(s[c] - best);
  f32x8 lanes = {};
  int64_t c = 0;
  for (; c + kVector <= count; c += kVector) lanes += load8(s + c);
  float sum = total(lanes);
  for (; c < count; ++c) sum += s[c];
  if (so_far.sum == 0.0f) {
    so_far = {best, sum};
    return;
  }
  const float factor = exp_negative(so_far.best - best);
  so_far = {best, so_far.sum * factor + sum};
  for (int64_t i = 0; i < wide; i += kVector) store8(result + i, load8(result + i) * factor);
}

struct Scratch {
  std::vector<float> queries, scores, run, results;
  std::vector<Softmax> softmax;
};

// One KV head of some rows. ``q`` and ``out`` are the first row's, of the heads that share it.
template <typename T>
void attend(const Rows& rows, const Heads& heads, const T* q, int64_t q_stride, const T* k_cache, const T* v_cache, const float* sinks,
            T* out, int64_t out_stride, Scratch& scratch) {
  const int64_t groups = heads.groups, queries = rows.count * groups, wide_h = heads.wide_h(), wide_v = heads.wide_v();
  const auto high = [&](int64_t r) { return rows.past + r + 1; };
  const auto low = [&](int64_t r) { return heads.window > 0 ? std::max<int64_t>(0, high(r) - heads.window) : 0; };
  scratch.queries.resize(queries * wide_h);
  scratch.scores.resize(queries * kSpan);
  scratch.run.resize(kRun * std::max(wide_h, wide_v));
  scratch.results.assign(queries * wide_v, 0.0f);
  scratch.softmax.resize(queries);
  float *query = scratch.queries.data(), *scores = scratch.scores.data(), *run = scratch.run.data(), *results = scratch.results.data();
  for (int64_t i = 0; i < queries; ++i) {
    widen(q + i / groups * q_stride + i % groups * heads.h, heads.h, query + i * wide_h, wide_h);
    for (int64_t j = 0; j < heads.h; ++j) query[i * wide_h + j] *= heads.scale;
    scratch.softmax[i] = sinks == nullptr ? Softmax{-INFINITY, 0.0f} : Softmax{sinks[i % groups], 1.0f};
  }
  const int64_t first = low(0), last = high(rows.count - 1);
  for (int64_t span = first / kSpan * kSpan; span < last; span += kSpan) {
    const int64_t begin = std::max(span, first), end = std::min(span + kSpan, last);
    const int64_t top = std::max<int64_t>(0, begin - rows.past);  // rows that see some of it
    const int64_t bottom = heads.window > 0 ? std::min(rows.count, end + heads.window - rows.past - 1) : rows.count;
    for (int64_t c = begin; c < end; c += kRun) {
      const int64_t count = std::min(kRun, end - c), padded = (count + 3) / 4 * 4;
      for (int64_t i = 0; i < count; ++i) {
        if (c + i + kAhead < last) expect(k_cache + rows.slot(c + i + kAhead) * heads.k_slot, heads.h);
        expect(v_cache + rows.slot(c + i) * heads.v_slot, heads.v);
        widen(k_cache + rows.slot(c + i) * heads.k_slot, heads.h, run + i * wide_h, wide_h);
      }
      std::fill(run + count * wide_h, run + padded * wide_h, 0.0f);
      float* to = scores + c - begin;
      int64_t i = std::max(top, c - rows.past) * groups;
      for (; i + 3 <= bottom * groups; i += 3) score_run<3>(query + i * wide_h, run, padded, wide_h, to + i * kSpan);
      for (; i + 2 <= bottom * groups; i += 2) score_run<2>(query + i * wide_h, run, padded, wide_h, to + i * kSpan);
      for (; i < bottom * groups; ++i) score_run<1>(query + i * wide_h, run, padded, wide_h, to + i * kSpan);
    }
    for (int64_t i = top * groups; i < bottom * groups; ++i) {
      const int64_t r = i / groups, from = std::max(begin, low(r)), seen = std::min(end, high(r)) - from;
      soften(scores + i * kSpan + from - begin, seen, heads.cap, scratch.softmax[i], results + i * wide_v, wide_v);
    }
    for (int64_t c = begin; c < end; c += kRun) {
      const int64_t count = std::min(kRun, end - c);
      for (int64_t i = 0; i < count; ++i) widen(v_cache + rows.slot(c + i) * heads.v_slot, heads.v, run + i * wide_v, wide_v);
      const auto add = [&](int64_t r, int64_t num_rows, int64_t from, int64_t seen) {
        const float *weights = scores + r * groups * kSpan + from - begin, *values = run + (from - c) * wide_v;
        float* result = results + r * groups * wide_v;
        int64_t i = 0;
        for (; i + 4 <= num_rows * groups; i += 4) add_values<4>(weights + i * kSpan, values, seen, wide_v, result + i * wide_v);
        for (; i + 2 <= num_rows * groups; i += 2) add_values<2>(weights + i * kSpan, values, seen, wide_v, result + i * wide_v);
        for (; i < num_rows * groups; ++i) add_values<1>(weights + i * kSpan, values, seen, wide_v, result + i * wide_v);
      };
      for (int64_t r = std::max(top, c - rows.past); r < bottom;) {
        const int64_t from = std::max(c, low(r)), to = std::min(c + count, high(r));
        int64_t next = r + 1;  // rows that see the same of the run are taken together
        while (next < bottom && std::max(c, low(next)) == from && std::min(c + count, high(next)) == to) ++next;
        if (to > from) add(r, next - r, from, to - from);
        r = next;
      }
    }
  }
  for (int64_t i = 0; i < queries; ++i) {
    T* to = out + i / groups * out_stride + i % groups * heads.v;
    const float inverse = 1.0f / scratch.softmax[i].sum;
    for (int64_t j = 0; j < heads.v; ++j) store(to[j], results[i * wide_v + j] * inverse);
  }
}

// Attention of every row over its own context, whose K and V are in the caches [P*S, K, H] and [P*S, K, V] already. Queries are the
// leading N*H elements of each row of ``rows``. The first len(lens) rows are decodes over blocks_BM (int32) with lens_B tokens of
// context, the row itself included; behind them stand chunks, chunk_rows[i] rows each, the last of which sees all of chunk_slots[i].
// window <= 0 sees everything. Scores are bounded to cap * tanh(score / cap) where cap > 0; sinks_N are logits beside the scores that
// take a share of the softmax and give no value. Returns [T, N*V].
Tensor paged_attention(const Tensor& rows, const Tensor& k_cache, const Tensor& v_cache, const std::optional<Tensor>& blocks,
                       const std::optional<Tensor>& lens, int64_t block_size, at::TensorList chunk_slots, at::IntArrayRef chunk_rows,
                       int64_t num_heads, double scale, int64_t window, double cap, const std::optional<Tensor>& sinks) {
  const int64_t kv_heads = k_cache.size(1), num_rows = rows.size(0), decodes = lens.has_value() ? lens->numel() : 0;
  const Heads heads{num_heads / kv_heads, k_cache.size(2), v_cache.size(2), k_cache.stride(0), k_cache.stride(1), v_cache.stride(0),
                    v_cache.stride(1), window, static_cast<float>(scale), static_cast<float>(cap)};
  TORCH_CHECK(rows.dim() == 2 && rows.stride(1) == 1 && rows.size(1) >= num_heads * heads.h && num_heads % kv_heads == 0);
  TORCH_CHECK(k_cache.stride(2) == 1 && v_cache.stride(2) == 1 && v_cache.size(1) == kv_heads && v_cache.size(0) == k_cache.size(0));
  TORCH_CHECK(k_cache.scalar_type() == rows.scalar_type() && v_cache.scalar_type() == rows.scalar_type());
  TORCH_CHECK(decodes == 0 || (blocks.has_value() && blocks->is_contiguous() && blocks->size(0) == decodes && lens->is_contiguous()));
  TORCH_CHECK(chunk_slots.size() == chunk_rows.size());
  TORCH_CHECK(!sinks.has_value() || (sinks->is_contiguous() && sinks->scalar_type() == at::kFloat && sinks->numel() == num_heads));
  std::vector<Rows> tasks;
  for (int64_t b = 0; b < decodes; ++b) {
    const int32_t* table = blocks->const_data_ptr<int32_t>() + b * blocks->size(1);
    tasks.push_back({b, 1, lens->const_data_ptr<int64_t>()[b] - 1, nullptr, table, block_size});
  }
  int64_t row = decodes;
  for (size_t i = 0; i < chunk_slots.size(); ++i) {
    const int64_t context = chunk_slots[i].numel(), past = context - chunk_rows[i];
    TORCH_CHECK(chunk_slots[i].is_contiguous() && past >= 0);
    const int64_t most = std::max<int64_t>(1, kQueries / heads.groups);
    for (int64_t r = 0; r < chunk_rows[i]; r += most) {
      tasks.push_back({row + r, std::min(most, chunk_rows[i] - r), past + r, chunk_slots[i].const_data_ptr<int64_t>(), nullptr, 1});
    }
    row += chunk_rows[i];
  }
  TORCH_CHECK(row == num_rows, "the decodes and chunks have other rows than the step");
  const Tensor out = at::empty({num_rows, num_heads * heads.v}, rows.options());
  const float* sink = sinks.has_value() ? sinks->const_data_ptr<float>() : nullptr;
  dispatch(rows, [&](auto tag) {
    using T = decltype(tag);
    const auto work = [&](int64_t begin, int64_t end) {
      thread_local Scratch scratch;
      for (int64_t task = begin; task < end; ++task) {
        const Rows& each = tasks[task / kv_heads];
        const int64_t k = task % kv_heads, first = k * heads.groups;
        attend(each, heads, data<T>(rows) + each.row * rows.stride(0) + first * heads.h, rows.stride(0), data<T>(k_cache) + k * heads.k_head,
               data<T>(v_cache) + k * heads.v_head, sink == nullptr ? nullptr : sink + first,
               data<T>(out) + each.row * out.size(1) + first * heads.v, out.size(1), scratch);
      }
    };
    antiphon::parallel_for(0, static_cast<int64_t>(tasks.size()) * kv_heads, 1, work, chunk_rows.empty() ? 1 : 8);
  });
  return out;
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(antiphon, m) {
  m.def(
      "paged_attention(Tensor rows, Tensor k_cache, Tensor v_cache, Tensor? blocks, Tensor? lens, int block_size, Tensor[] chunk_slots, "
      "int[] chunk_rows, int num_heads, float scale, int window, float cap=0.0, Tensor? sinks=None) -> Tensor");
}

TORCH_LIBRARY_IMPL(antiphon, CompositeExplicitAutograd, m) { m.impl("paged_attention", &paged_attention); }
