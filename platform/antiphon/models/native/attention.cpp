// Paged attention over the rows of one step (hot): decodes, then prompts' chunks, for processors without matrix units.
//
// A row's result has one order of sums whatever the rows beside it, and whether it came as a decode or in a chunk: a score goes over
// the head's dimensions from the first to the last; the softmax goes over the row's own context, a span after the other (online,
// arXiv 1805.02867); values are added in the order of the context. So a token recomputed as part of a prompt gets the bits it had as
// a decode, however the prompt was cut. Keys are turned, and values paired, once for some rows of a chunk and all query heads that
// share them, a run of the context at a time; a decode takes values from where they are.
// T rows, N query heads, K KV heads, G = N/K, H head dim of queries and keys, V of values, C context, Q = queries of a task.

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include "context.h"
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
using antiphon::f32xn;
using antiphon::kLanes;
using antiphon::kTokens;
using antiphon::larger;
using antiphon::largest;
using antiphon::load;
using antiphon::load_lanes;
using antiphon::score_keys;
using antiphon::Scratch;
using antiphon::spread;
using antiphon::steps_at;
using antiphon::steps_of;
using antiphon::store;
using antiphon::store_lanes;
using antiphon::store_weights;
using antiphon::turn_keys;
using antiphon::values_at;
using antiphon::weights_against;
using at::Tensor;

constexpr int64_t kRun = 32;      // of the context whose keys are turned, or values paired, at once
constexpr int64_t kSpan = 128;    // of the context, from a multiple of itself, whose scores are held at once: they fit the first cache
constexpr int64_t kQueries = 72;  // of a chunk that share them, about

// Rows [row, row + count) of the step, which follow each other in a request; the first sees [.., past] of the context.
struct Rows {
  int64_t row, count, past;
  const int64_t* slots;   // of the context, or
  const int32_t* blocks;  // its blocks
  int64_t block_size;

  // Whether a decode that sees [.., its_past] of these blocks is the next row of the same request, and taken with at most ``most`` others.
  bool goes_on(int64_t its_past, const int32_t* its_blocks, int64_t most) const {
    return count < most && its_past == past + count && std::equal(blocks, blocks + (its_past - 1) / block_size + 1, its_blocks);
  }

  int64_t slot(int64_t c) const { return slots != nullptr ? slots[c] : blocks[c / block_size] * block_size + c % block_size; }

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

// What a thread's tasks read of a cache, fetched into its second cache some lines ahead of them, a line at a time while it computes: a
// burst, or the first cache's few misses at once, would leave the memory idle most of the time.
template <typename T>
class Feed {
 public:
  Feed(const T* cache, int64_t stride) : cache_(cache), stride_(stride) {}

  // Rows that are taken after those added before, and the elements of a token from ``offset`` on that they read.
  void add(const Rows& rows, int64_t first, int64_t last, int64_t offset, int64_t width) {
    const int64_t bytes = sizeof(T), together = width == stride_ ? rows.block_size : 1;  // tokens whose elements lie side by side
    for (int64_t c = first; c < last;) {
      const int64_t end = std::min(last, (c / rows.block_size + 1) * rows.block_size), num = std::min(end - c, together);
      const char* at = reinterpret_cast<const char*>(cache_ + rows.slot(c) * stride_ + offset);
      pieces_.push_back({at, (num * width * bytes + kLine - 1) / kLine, num * stride_ * bytes, (end - c) / num});
      added_ += pieces_.back().lines * pieces_.back().count;
      c = end;
    }
  }

  // So many lines were added up to the task that is computed now: those soon after them may be fetched beside it.
  void begin(int64_t lines) {
    const bool is_first = limit_ == 0;
    limit_ = std::min(lines + kAhead, added_);
    for (int64_t i = 0; is_first && i < kAhead; ++i) one();
  }
  int64_t added() const { return added_; }

  [[gnu::always_inline]] void one() {
    if (fetched_ == limit_) return;
    if (line_ == now_.lines) advance();
    __builtin_prefetch(now_.at + line_++ * kLine, 0, 2);
    ++fetched_;
  }

 private:
  static constexpr int64_t kLine = 64, kAhead = 320;
  struct Piece {  // of a block: ``count`` times as many lines, each ``step`` bytes behind the one before
    const char* at;
    int64_t lines, step, count;
  };

  void advance() {
    line_ = 0;
    if (--now_.count > 0) {
      now_.at += now_.step;
      return;
    }
    now_ = pieces_[next_];
    if (++next_ == pieces_.size()) pieces_.clear(), next_ = 0;
  }

  const T* cache_;
  int64_t stride_;
  std::vector<Piece> pieces_;
  size_t next_ = 0;
  Piece now_{};
  int64_t line_ = 0, added_ = 0, fetched_ = 0, limit_ = 0;
};

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

// What a query knows of the softmax over its context so far: the largest score and the sum of exp(score - best).
struct Softmax {
  float best, sum;
};

// Scores of a span's tokens from ``begin`` to ``end``, of which the row sees [low, high), become weights against the best so far, in steps
// of T; its result so far is brought to the same. ``begin`` and ``end`` are borders of runs.
template <typename T>
void soften(float* s, int64_t begin, int64_t low, int64_t high, int64_t end, float cap, Softmax& so_far, float* result, int64_t wide) {
  if (cap > 0.0f) {
#pragma omp simd
    for (int64_t c = low; c < high; ++c) {
      const float x = s[c] / cap, e = exp_negative(-2.0f * std::fabs(x));
      s[c] = std::copysign(cap * ((1.0f - e) / (1.0f + e)), x);
    }
  }
  std::fill(s + begin, s + low, -INFINITY);
  std::fill(s + high, s + end, -INFINITY);
  f32xn most = spread(so_far.best);
  for (int64_t c = begin; c < end; c += kLanes) most = larger(load_lanes(s + c), most);
  const float best = largest(most);
  f32xn sums[2] = {};
  for (int64_t c = begin; c < end; c += 2 * kLanes) {
    const f32xn first = weights_against<T>(load_lanes(s + c), best), second = weights_against<T>(load_lanes(s + c + kLanes), best);
    sums[0] += first, sums[1] += second;
    store_weights<T>(first, second, s + c / kTokens<T>);
  }
  const float sum = antiphon::total_lanes(sums[0] + sums[1]);
  if (so_far.sum == 0.0f) {
    so_far = {best, sum};
    return;
  }
  const float factor = exp_negative(so_far.best - best);
  so_far = {best, so_far.sum * factor + sum};
  for (int64_t i = 0; i < wide; i += kLanes) store_lanes(result + i, load_lanes(result + i) * factor);
}

struct Buffers {
  Scratch queries, scores, run, results, zeros;
  std::vector<Softmax> softmax;
  std::vector<int64_t> slots;
};

// Some rows and ``num`` of the KV heads from ``head`` on.
struct Task {
  Rows rows;
  int64_t head, num;
};

template <typename T>
struct Step {
  const Heads& heads;
  const T *q, *k_cache, *v_cache;
  const float* sinks;
  T* out;
  int64_t q_stride, out_stride;
};

// What of the context the first row sees on, and where the last row's ends.
inline int64_t first_seen(const Rows& rows, int64_t window) { return window > 0 ? std::max<int64_t>(0, rows.past + 1 - window) : 0; }
inline int64_t end_seen(const Rows& rows) { return rows.past + rows.count; }

template <typename T>
void attend(const Task& task, const Step<T>& all, Feed<T>& keys_ahead, Feed<T>& values_ahead, Buffers& scratch) {
  const Rows& rows = task.rows;
  const Heads& heads = all.heads;
  const int64_t groups = heads.groups, queries = rows.count * groups, steps = steps_of<T>(heads.h), wide_v = heads.wide_v();
  const auto high = [&](int64_t r) { return rows.past + r + 1; };
  const auto low = [&](int64_t r) { return heads.window > 0 ? std::max<int64_t>(0, high(r) - heads.window) : 0; };
  const int64_t every = task.num * queries;  // the queries of one head behind those of another, ``groups`` of a row together
  scratch.softmax.resize(every);
  float *query = scratch.queries.get<float>(every * steps), *scores = scratch.scores.get<float>(every * kSpan);
  float *run = scratch.run.get<float>(kRun * std::max(steps, wide_v)), *results = scratch.results.get<float>(every * wide_v);
  const T* zeros = scratch.zeros.get<T>(std::max(heads.h, heads.v));
  std::fill(results, results + every * wide_v, 0.0f);
  const auto row_of = [&](int64_t i) { return rows.row + i % queries / groups; };
  const auto head_of = [&](int64_t i) { return (task.head + i / queries) * groups + i % groups; };
  for (int64_t i = 0; i < every; ++i) {
    const T* from = all.q + row_of(i) * all.q_stride + head_of(i) * heads.h;
    constexpr int64_t kWidth = antiphon::kPairs<T> ? 2 * kLanes : kLanes;
    for (int64_t d = 0, s = 0; d < heads.h; d += kWidth, s += kLanes) store_lanes(query + i * steps + s, steps_at(from + d, heads.h - d));
    scratch.softmax[i] = all.sinks == nullptr ? Softmax{-INFINITY, 0.0f} : Softmax{all.sinks[head_of(i)], 1.0f};
  }
  const int64_t first = first_seen(rows, heads.window), last = end_seen(rows);
  const int64_t* slots = rows.all_slots(first, last, scratch.slots);
  for (int64_t span = first / kSpan * kSpan; span < last; span += kSpan) {
    const int64_t begin = std::max(span, first / kRun * kRun), end = std::min(span + kSpan, (last + kRun - 1) / kRun * kRun);
    const int64_t top = std::max<int64_t>(0, span - rows.past);  // rows that see some of it
    const int64_t bottom = heads.window > 0 ? std::min(rows.count, end + heads.window - rows.past - 1) : rows.count;
    const auto all_rows = [&](const T* cache, int64_t stride, int64_t run, int64_t from, int64_t to, const T** each) {
      for (int64_t c = run; c < run + kRun; ++c) *each++ = c < from || c >= to ? zeros : cache + slots[c] * stride;
    };
    const T* tokens[kRun];
    const auto top_of = [&](int64_t run) { return std::max(top, run - rows.past) * groups; };  // the first query that sees some of a run
    for (int64_t c = begin; c < end; c += kRun) {
      for (int64_t n = 0; n < task.num; ++n) {
        all_rows(all.k_cache + (task.head + n) * heads.k_head, heads.k_slot, c, first, last, tokens);
        turn_keys<T, kRun>(tokens, kRun, heads.h, [&] { keys_ahead.one(); }, run);
        const int64_t i = n * queries + top_of(c);
        score_run<T>(query + i * steps, bottom * groups - top_of(c), run, kRun, steps, heads.scale, scores + c - span + i * kSpan);
      }
    }
    for (int64_t n = 0; n < task.num; ++n) {
      for (int64_t i = n * queries + top * groups; i < n * queries + bottom * groups; ++i) {
        const int64_t r = i % queries / groups;
        soften<T>(scores + i * kSpan, begin - span, std::max(span, low(r)) - span, std::min(end, high(r)) - span, end - span, heads.cap,
                  scratch.softmax[i], results + i * wide_v, wide_v);
      }
    }
    for (int64_t c = begin; c < end; c += kRun) {
      for (int64_t n = 0; n < task.num; ++n) {
        const auto add = [&](int64_t r, int64_t num_rows, int64_t from, int64_t to) {  // of the run, what lies in [from, to) of the context
          all_rows(all.v_cache + (task.head + n) * heads.v_head, heads.v_slot, c, from, to, tokens);
          const int64_t i = n * queries + r * groups, num = num_rows * groups, each = kRun / kTokens<T>;
          const float* weights = scores + (c - span) / kTokens<T> + i * kSpan;
          if (num <= antiphon::kMostQueries && heads.v % kLanes == 0) {  // taken once, straight from where they are
            const auto lanes = [&](int64_t s, int64_t d) {
              values_ahead.one();
              return values_at(tokens[kTokens<T> * s] + d, tokens[kTokens<T> * (s + 1) - 1] + d);
            };
            antiphon::add_values<T, kSpan>(weights, lanes, num, each, wide_v, results + i * wide_v);
          } else {
            antiphon::pair_values<T, kRun>(tokens, heads.v, wide_v, [&] { values_ahead.one(); }, run);
            const auto lanes = [&](int64_t s, int64_t d) { return load_lanes(run + s * wide_v + d); };
            antiphon::add_values<T, kSpan>(weights, lanes, num, each, wide_v, results + i * wide_v);
          }
        };
        const int64_t r = top_of(c) / groups;
        if (c >= low(bottom - 1) && std::min(c + kRun, last) <= high(r)) {
          add(r, bottom - r, first, last);
        } else {  // a row keeps clear of what it doesn't see, which may be no number: a draft's, say
          for (int64_t row = r; row < bottom; ++row) add(row, 1, std::max(first, low(row)), high(row));
        }
      }
    }
  }
  for (int64_t i = 0; i < every; ++i) {
    T* to = all.out + row_of(i) * all.out_stride + head_of(i) * heads.v;
    const float inverse = 1.0f / scratch.softmax[i].sum;
#pragma omp simd
    for (int64_t j = 0; j < heads.v; ++j) store(to[j], results[i * wide_v + j] * inverse);
  }
}

// The tasks [begin, end) one after the other. What a decode reads is fetched while the one before computes; a chunk's rows read much the
// same, and compute more with it.
template <typename T>
void attend_all(const std::vector<Task>& tasks, int64_t begin, int64_t end, const Step<T>& all) {
  thread_local Buffers scratch;
  const Heads& heads = all.heads;
  Feed<T> keys_ahead(all.k_cache, heads.k_slot), values_ahead(all.v_cache, heads.v_slot);
  const auto expect = [&](int64_t task) {
    if (task == end || tasks[task].rows.slots != nullptr) return;
    const Task& each = tasks[task];
    const int64_t first = first_seen(each.rows, heads.window), last = end_seen(each.rows);
    keys_ahead.add(each.rows, first, last, each.head * heads.k_head, each.num * heads.k_head);
    values_ahead.add(each.rows, first, last, each.head * heads.v_head, each.num * heads.v_head);
  };
  expect(begin);
  for (int64_t task = begin; task < end; ++task) {
    const int64_t keys = keys_ahead.added(), values = values_ahead.added();
    expect(task + 1);
    keys_ahead.begin(keys);
    values_ahead.begin(values);
    attend(tasks[task], all, keys_ahead, values_ahead, scratch);
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
  std::vector<Rows> some;
  const int64_t most = std::max<int64_t>(1, kQueries / heads.groups);
  for (int64_t b = 0; b < decodes; ++b) {
    const int32_t* table = blocks->const_data_ptr<int32_t>() + b * blocks->size(1);
    const int64_t past = lens->const_data_ptr<int64_t>()[b] - 1;
    if (!some.empty() && some.back().goes_on(past, table, most)) {
      ++some.back().count;  // a draft of the row before
      some.back().blocks = table;
    } else {
      some.push_back({b, 1, past, nullptr, table, block_size});
    }
  }
  // A row's heads lie side by side, and are taken together where there is work enough for all.
  const int64_t together = static_cast<int64_t>(some.size()) >= 2 * at::get_num_threads() ? kv_heads : 1;
  int64_t row = decodes;
  std::vector<Task> tasks;
  const auto take = [&](const Rows& rows, int64_t num) {
    for (int64_t head = 0; head < kv_heads; head += num) tasks.push_back({rows, head, num});
  };
  for (const Rows& each : some) take(each, together);
  for (size_t i = 0; i < chunk_slots.size(); ++i) {
    const int64_t context = chunk_slots[i].numel(), past = context - chunk_rows[i];
    TORCH_CHECK(chunk_slots[i].is_contiguous() && past >= 0);
    for (int64_t r = (chunk_rows[i] - 1) / most * most; r >= 0; r -= most) {  // the longest first: whoever comes last waits least
      take({row + r, std::min(most, chunk_rows[i] - r), past + r, chunk_slots[i].const_data_ptr<int64_t>(), nullptr, 1}, 1);
    }
    row += chunk_rows[i];
  }
  TORCH_CHECK(row == num_rows, "the decodes and chunks have other rows than the step");
  const Tensor out = at::empty({num_rows, num_heads * heads.v}, rows.options());
  dispatch(rows, [&](auto tag) {
    using T = decltype(tag);
    const float* sink = sinks.has_value() ? sinks->const_data_ptr<float>() : nullptr;
    const Step<T> all{heads, data<T>(rows), data<T>(k_cache), data<T>(v_cache), sink, data<T>(out), rows.stride(0), out.size(1)};
    const auto work = [&](int64_t begin, int64_t end) { attend_all(tasks, begin, end, all); };
    antiphon::parallel_for(0, static_cast<int64_t>(tasks.size()), 1, work, chunk_rows.empty() ? 1 : 8);
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
