// Paged attention over the rows of one step (hot): decodes, then prompts' chunks, for processors without matrix units.
//
// A row's result has one order of sums whatever the rows beside it, and whether it came as a decode or in a chunk: a score goes over
// the head's dimensions from the first to the last; the softmax goes over the row's own context, a span after the other (online,
// arXiv 1805.02867); values are added in the order of the context. So a token recomputed as part of a prompt gets the bits it had as
// a decode, however the prompt was cut. Keys are turned, and values widened, once for some rows of a chunk and all query heads that
// share them, a run of the context at a time; a decode takes values from where they are.
// T rows, N query heads, K KV heads, G = N/K, H head dim of queries and keys, V of values, C context, Q = queries of a task.

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include "elements.h"
#include "keys.h"
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
using antiphon::f32xn;
using antiphon::kLanes;
using antiphon::kVector;
using antiphon::load;
using antiphon::load8;
using antiphon::load_lanes;
using antiphon::multiply_add;
using antiphon::score_keys;
using antiphon::Scratch;
using antiphon::spread;
using antiphon::steps_at;
using antiphon::steps_of;
using antiphon::store;
using antiphon::store_lanes;
using antiphon::total;
using antiphon::turn_keys;
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

  // Where each token of the context from ``first`` on lies, those before it left open: no division for each of them.
  const int64_t* all_slots(int64_t first, int64_t last, std::vector<int64_t>& kept) const {
    if (slots != nullptr) return slots;
    kept.resize(last);
    for (int64_t c = first, block = first / block_size; c < last; ++block) {
      const int64_t end = std::min(last, (block + 1) * block_size);
      for (int64_t at = blocks[block] * block_size + c - block * block_size; c < end; ++c, ++at) kept[c] = at;
    }
    return kept.data();
  }
};

struct Heads {
  int64_t groups, h, v;  // G, H, V
  int64_t k_slot, k_head, v_slot, v_head;  // strides
  int64_t window;
  float scale, cap;
  int64_t wide_v() const { return (v + kLanes - 1) / kLanes * kLanes; }
};

// Rows of ``width`` elements in fp32, each padded with zeros to ``wide``.
template <typename T>
void widen(const T* from, int64_t width, float* to, int64_t wide) {
  int64_t i = 0;
  for (; i + kLanes <= width; i += kLanes) store_lanes(to + i, load_lanes(from + i));
  for (; i < width; ++i) to[i] = load(from[i]);
  for (; i < wide; ++i) to[i] = 0.0f;
}

constexpr int64_t kAhead = 32;  // tokens whose keys are fetched before they are needed: a block's are far from the next one's

// Scores of a run's ``count`` keys for ``num`` queries one behind the other, and of some beyond them.
template <typename T>
void score_run(const float* queries, int64_t num, const float* keys, int64_t count, int64_t steps, float scale, float* scores) {
  for (int64_t k = 0; k < count; k += 2 * kLanes) {
    const float* query = queries;
    float* to = scores + k;
    int64_t left = num;
    const auto take = [&]<int Queries>(std::integral_constant<int, Queries>) {
      score_keys<T, kRun, kSpan, Queries>(query, keys + k, steps, scale, to);
      query += Queries * steps, to += Queries * kSpan, left -= Queries;
    };
    while (left >= 6) take(std::integral_constant<int, 6>{});
    if (left >= 4) take(std::integral_constant<int, 4>{});
    if (left == 3) take(std::integral_constant<int, 3>{});
    if (left == 2) take(std::integral_constant<int, 2>{});
    if (left == 1) take(std::integral_constant<int, 1>{});
  }
}

// result[g][i] += weights[g][c] * values(c)[i] over c, for Groups queries and kLanes * Vectors dimensions from ``from`` on.
template <int Groups, int Vectors, typename Values>
[[gnu::always_inline]] inline void add_lanes(const float* weights, Values values, int64_t from, int64_t count, int64_t wide, float* results) {
  f32xn acc[Groups][Vectors];
  for (int g = 0; g < Groups; ++g) {
    for (int l = 0; l < Vectors; ++l) acc[g][l] = load_lanes(results + g * wide + from + l * kLanes);
  }
  for (int64_t c = 0; c < count; ++c) {
    const auto* at = values(c) + from;
    f32xn value[Vectors];
    for (int l = 0; l < Vectors; ++l) value[l] = load_lanes(at + l * kLanes);
    for (int g = 0; g < Groups; ++g) {
      const f32xn weight = spread(weights[g * kSpan + c]);
      for (int l = 0; l < Vectors; ++l) acc[g][l] = multiply_add(weight, value[l], acc[g][l]);
    }
  }
  for (int g = 0; g < Groups; ++g) {
    for (int l = 0; l < Vectors; ++l) store_lanes(results + g * wide + from + l * kLanes, acc[g][l]);
  }
}

// The same for ``num`` queries one behind the other, and all dimensions.
template <typename Values>
void add_values(const float* weights, Values values, int64_t num, int64_t count, int64_t wide, float* results) {
  const auto take = [&]<int Groups>(std::integral_constant<int, Groups>) {
    constexpr int kVectors = kLanes == 16 ? 4 : Groups == 1 ? 8 : Groups == 2 ? 4 : 2;  // as many sums as registers hold
    int64_t i = 0;
    for (; i + kVectors * kLanes <= wide; i += kVectors * kLanes) add_lanes<Groups, kVectors>(weights, values, i, count, wide, results);
    for (; i < wide; i += kLanes) add_lanes<Groups, 1>(weights, values, i, count, wide, results);
    weights += Groups * kSpan, results += Groups * wide, num -= Groups;
  };
  while (num >= 4) take(std::integral_constant<int, 4>{});
  if (num == 3) take(std::integral_constant<int, 3>{});
  if (num == 2) take(std::integral_constant<int, 2>{});
  if (num == 1) take(std::integral_constant<int, 1>{});
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
  for (int64_t i = 0; i < wide; i += kLanes) store_lanes(result + i, load_lanes(result + i) * factor);
}

struct Buffers {
  Scratch queries, scores, run, results;
  std::vector<Softmax> softmax;
  std::vector<int64_t> slots;
};

// One KV head of some rows. ``q`` and ``out`` are the first row's, of the heads that share it.
template <typename T>
void attend(const Rows& rows, const Heads& heads, const T* q, int64_t q_stride, const T* k_cache, const T* v_cache, const float* sinks,
            T* out, int64_t out_stride, Buffers& scratch) {
  const int64_t groups = heads.groups, queries = rows.count * groups, steps = steps_of<T>(heads.h), wide_v = heads.wide_v();
  const auto high = [&](int64_t r) { return rows.past + r + 1; };
  const auto low = [&](int64_t r) { return heads.window > 0 ? std::max<int64_t>(0, high(r) - heads.window) : 0; };
  scratch.softmax.resize(queries);
  float *query = scratch.queries.get<float>(queries * steps), *scores = scratch.scores.get<float>(queries * kSpan);
  float *run = scratch.run.get<float>(kRun * std::max(steps, wide_v)), *results = scratch.results.get<float>(queries * wide_v);
  std::fill(results, results + queries * wide_v, 0.0f);
  for (int64_t i = 0; i < queries; ++i) {
    const T* from = q + i / groups * q_stride + i % groups * heads.h;
    constexpr int64_t kWidth = antiphon::kPairs<T> ? 2 * kLanes : kLanes;
    for (int64_t d = 0, s = 0; d < heads.h; d += kWidth, s += kLanes) store_lanes(query + i * steps + s, steps_at(from + d, heads.h - d));
    scratch.softmax[i] = sinks == nullptr ? Softmax{-INFINITY, 0.0f} : Softmax{sinks[i % groups], 1.0f};
  }
  const int64_t first = low(0), last = high(rows.count - 1);
  const int64_t* slots = rows.all_slots(first, last, scratch.slots);
  for (int64_t span = first / kSpan * kSpan; span < last; span += kSpan) {
    const int64_t begin = std::max(span, first), end = std::min(span + kSpan, last);
    const int64_t top = std::max<int64_t>(0, begin - rows.past);  // rows that see some of it
    const int64_t bottom = heads.window > 0 ? std::min(rows.count, end + heads.window - rows.past - 1) : rows.count;
    for (int64_t c = begin; c < end; c += kRun) {
      const int64_t count = std::min(kRun, end - c), i = std::max(top, c - rows.past) * groups;
      const auto fetch = [&](int64_t k, int64_t d) {
        if (c + k + kAhead < last) __builtin_prefetch(k_cache + slots[c + k + kAhead] * heads.k_slot + d);
        if (d < heads.v) __builtin_prefetch(v_cache + slots[c + k] * heads.v_slot + d);
      };
      turn_keys<T, kRun>(count, heads.h, [&](int64_t k) { return k_cache + slots[c + k] * heads.k_slot; }, fetch, run);
      score_run<T>(query + i * steps, bottom * groups - i, run, count, steps, heads.scale, scores + c - begin + i * kSpan);
    }
    for (int64_t i = top * groups; i < bottom * groups; ++i) {
      const int64_t r = i / groups, from = std::max(begin, low(r)), seen = std::min(end, high(r)) - from;
      soften(scores + i * kSpan + from - begin, seen, heads.cap, scratch.softmax[i], results + i * wide_v, wide_v);
    }
    if (rows.count == 1 && heads.v % kLanes == 0) {  // taken once each, straight from where they are
      const auto value = [&](int64_t i) { return v_cache + slots[begin + i] * heads.v_slot; };
      add_values(scores, value, groups, end - begin, wide_v, results);
      continue;
    }
    for (int64_t c = begin; c < end; c += kRun) {
      const int64_t count = std::min(kRun, end - c);
      for (int64_t i = 0; i < count; ++i) widen(v_cache + slots[c + i] * heads.v_slot, heads.v, run + i * wide_v, wide_v);
      const auto add = [&](int64_t r, int64_t num_rows, int64_t from, int64_t seen) {
        const auto value = [&](int64_t i) { return run + (from - c + i) * wide_v; };
        add_values(scores + r * groups * kSpan + from - begin, value, num_rows * groups, seen, wide_v, results + r * groups * wide_v);
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
#pragma omp simd
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
      thread_local Buffers scratch;
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
