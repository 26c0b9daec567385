// The experts of one layer (hot): every expert's gate, up, activation and down over the rows that came for it, and each row's
// weighted sum, in one call. Also the gate that chooses experts from scores.
//
// Weights are packed once into blocks (blocks.h); the two halves of one are 16 gate and the 16 matching up outputs, or 32 down outputs.
// int8 weights lie in the same order and are widened block by block; their scales (float32, one per output) are applied to the sums.
//
//     rows ──sorted by expert──► sorted_MD ──gate, up──► act_MW ──down──► sum_TD += weight · result ──► out_TD
//
// Every row is computed by itself in a fixed order (experts ascending), so a row's result depends neither on its batch nor on the
// number of threads: threads share out columns, never sums. T rows, K ids per row, M pairs of them, D hidden, W expert width.

#include <ATen/core/Tensor.h>
#include <torch/library.h>

#include <algorithm>
#include <atomic>
#include <bit>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <memory>
#include <optional>
#include <vector>

#include "blocks.h"
#include "../elements.h"
#include "../prefetch.h"
#include "../thread_pool.h"

namespace {

using antiphon::bf16;
using antiphon::exp_negative;
using antiphon::kBlock;
using antiphon::kLanes;
using antiphon::load;
using antiphon::multiply;
using antiphon::pack_as;
using antiphon::padded;
using antiphon::Prefetch;
using antiphon::Scratch;
using antiphon::store;
using antiphon::Sums;
using antiphon::Tiles;
using at::Tensor;

constexpr int64_t kPanelRows = 128;    // rows that go through all blocks together: they stay in L2
constexpr int64_t kPrefetch = 4;       // blocks that are fetched while as many are computed
constexpr int64_t kRunsAThread = 2;    // of columns: each thread takes as many as it gets to
constexpr int64_t kSlackRows = 16;     // tiles may read this many rows behind the last

inline float silu(float x) {
  const float e = exp_negative(-std::fabs(x));
  return x * (x >= 0.0f ? 1.0f : e) / (1.0f + e);
}

inline float gelu_tanh(float x) {
  const float y = 0.79788456080286535588f * (x + 0.044715f * x * x * x);
  const float e = exp_negative(-2.0f * std::fabs(y));
  const float tanh = std::copysign((1.0f - e) / (1.0f + e), y);
  return 0.5f * x * (1.0f + tanh);
}

void pack_experts(const Tensor& out, const Tensor& first, const std::optional<Tensor>& second, int64_t pair) {
  const int64_t rows = first.size(0), cols = first.size(1), k = padded(cols);
  const int64_t num_blocks = second.has_value() ? padded(rows) / kLanes : padded(rows) / kBlock;
  TORCH_CHECK(first.is_contiguous() && out.is_contiguous() && (!second || (second->is_contiguous() && second->sizes() == first.sizes())));
  TORCH_CHECK(out.numel() == num_blocks * k * kBlock && out.scalar_type() == first.scalar_type());
  TORCH_CHECK(!second || second->scalar_type() == first.scalar_type());
  const auto run = [&](auto tag) {
    using T = decltype(tag);
    pack_as(static_cast<T*>(out.mutable_data_ptr()), static_cast<const T*>(first.const_data_ptr()),
            second ? static_cast<const T*>(second->const_data_ptr()) : nullptr, rows, cols, num_blocks, k, pair);
  };
  switch (first.element_size()) {
    case 1:
      return run(uint8_t{});
    case 2:
      return run(uint16_t{});
    default:
      TORCH_CHECK(first.element_size() == 4);
      return run(uint32_t{});
  }
}

// One block of int8 weights in the format of the rows; exact, as bfloat16 has eight bits of mantissa.
template <typename T>
const T* widen(const int8_t* from, int64_t count, T* to, Prefetch& ahead) {
#if defined(__AVX512BF16__)
  if constexpr (std::is_same_v<T, bf16>) {
    for (int64_t i = 0; i < count; i += 64) {
      if (i % 512 == 0) {
        ahead.fetch(8);
      }
      for (int64_t j = i; j < i + 64; j += 32) {
        const __m512 low = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from + j))));
        const __m512 high = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from + j + 16))));
        _mm512_store_si512(to + j, (__m512i)_mm512_cvtne2ps_pbh(high, low));
      }
    }
    return to;
  }
#endif
  (void)ahead;
#pragma omp simd
  for (int64_t i = 0; i < count; ++i) {
    store(to[i], static_cast<float>(from[i]));
  }
  return to;
}

// ---- the experts of a layer -------------------------------------------------------------------------------------------------

enum Column { kGateUp, kDown, kGateUpScale, kDownScale, kWidth, kNumColumns };

struct Expert {
  const int64_t* held;  // its row of the table: addresses, 0 where there is none, and its padded width
  int64_t first, rows;  // in sorted_MD
  template <typename T>
  const T* at(Column column) const {
    return reinterpret_cast<const T*>(held[column]);
  }
};

struct Pair {
  int32_t row;
  float weight;
};

enum Activation { kSilu, kGeluTanh };

template <typename T>
class Layer {
 public:
  Layer(const T* rows, int64_t row_stride, int64_t num_rows, int64_t hidden, T* out, int64_t out_stride)
      : rows_(rows), row_stride_(row_stride), num_rows_(num_rows), d_(hidden), dp_(padded(hidden)), out_(out), out_stride_(out_stride) {}

  void run(const std::vector<Expert>& experts, const Pair* pairs, int64_t num_pairs, int64_t widest, Activation activation) {
    static thread_local Scratch sorted_memory, act_memory;
    static thread_local Scratch sum_memory;
    sorted_ = sorted_memory.get<T>((num_pairs + kSlackRows) * dp_);
    act_ = act_memory.get<T>((num_pairs + kSlackRows) * widest);
    sum_ = sum_memory.get<float>(num_rows_ * dp_);
    act_stride_ = widest;
    for (int64_t m = 0; m < num_pairs; ++m) {
      T* to = sorted_ + m * dp_;
      std::memcpy(static_cast<void*>(to), rows_ + pairs[m].row * row_stride_, d_ * sizeof(T));
      std::memset(static_cast<void*>(to + d_), 0, (dp_ - d_) * sizeof(T));
    }
    antiphon::parallel_for(0, widest / kLanes, 1, [&](int64_t begin, int64_t end) {
      gate_up(experts, {kGateUp, kGateUpScale, begin, end}, activation);
    }, kRunsAThread);
    antiphon::parallel_for(0, dp_ / kBlock, 1, [&](int64_t begin, int64_t end) {
      for (int64_t t = 0; t < num_rows_; ++t) {
        std::memset(sum_ + t * dp_ + begin * kBlock, 0, (end - begin) * kBlock * sizeof(float));
      }
      down(experts, {kDown, kDownScale, begin, end}, pairs);
      const int64_t first = begin * kBlock, last = std::min(end * kBlock, d_);
      for (int64_t t = 0; t < num_rows_; ++t) {
        const float* from = sum_ + t * dp_;
        T* to = out_ + t * out_stride_;
#pragma omp simd
        for (int64_t i = first; i < last; ++i) {
          store(to[i], from[i]);
        }
      }
    }, kRunsAThread);
  }

 private:
  // A thread's share of every expert: these blocks of one weight.
  struct Share {
    Column weight, scale;
    int64_t begin, end;
  };

  int64_t depth(const Expert& expert, const Share& share) const { return share.weight == kGateUp ? dp_ : expert.held[kWidth]; }
  int64_t end_of(const Expert& expert, const Share& share) const {
    return share.weight == kGateUp ? std::min(share.end, expert.held[kWidth] / kLanes) : share.end;
  }

  // Have the few blocks from this one on fetched.
  void expect(Prefetch& ahead, const Expert& expert, const Share& share, int64_t block) const {
    const int64_t bytes = depth(expert, share) * kBlock * (expert.held[share.scale] == 0 ? sizeof(T) : 1);
    ahead.start(expert.at<char>(share.weight) + block * bytes, std::min(kPrefetch, end_of(expert, share) - block) * bytes);
  }

  // The block as the rows' format, and where its scales are (nullptr: it has none).
  const T* block_of(const Expert& expert, const Share& share, int64_t block, const float*& scales, Prefetch& ahead) const {
    const int64_t count = depth(expert, share) * kBlock;
    if (expert.held[share.scale] == 0) {
      scales = nullptr;
      return expert.at<T>(share.weight) + block * count;
    }
    static thread_local Scratch memory;
    scales = expert.at<float>(share.scale) + block * kBlock;
    return widen(expert.at<int8_t>(share.weight) + block * count, count, memory.get<T>(count), ahead);
  }

  // done(block, first row, rows, sums) for every block of the share and up to 32 rows of x at a time.
  template <typename Done>
  void products(const std::vector<Expert>& experts, const Share& share, const T* x, int64_t stride, Done done) const {
    alignas(64) Sums sums;
    const Tiles tiles(std::is_same_v<T, bf16>);
    Prefetch ahead;
    if (!experts.empty()) {
      expect(ahead, experts[0], share, share.begin);
      ahead.fetch_all();
    }
    for (size_t e = 0; e < experts.size(); ++e) {
      const Expert& expert = experts[e];
      const int64_t end = end_of(expert, share), k = depth(expert, share);
      for (int64_t panel = 0; panel < expert.rows; panel += kPanelRows) {
        const int64_t last = std::min(panel + kPanelRows, expert.rows);
        for (int64_t b = share.begin; b < end; ++b) {
          if (panel == 0 && (b - share.begin) % kPrefetch == 0) {
            if (b + kPrefetch < end) {
              expect(ahead, expert, share, b + kPrefetch);
            } else if (e + 1 < experts.size()) {
              expect(ahead, experts[e + 1], share, share.begin);
            }
          }
          const float* scales;
          const T* block = block_of(expert, share, b, scales, ahead);
          for (int64_t r = panel; r < last; r += kBlock) {
            const int64_t count = std::min(kBlock, last - r);
            multiply(tiles, x + (expert.first + r) * stride, stride, count, block, k, sums, {ahead});
            if (scales != nullptr) {
              for (int64_t i = 0; i < count; ++i) {
#pragma omp simd
                for (int64_t n = 0; n < kBlock; ++n) {
                  (&sums[i][0][0])[n] *= scales[n];
                }
              }
            }
            done(b, expert.first + r, count, sums);
          }
        }
      }
    }
  }

  void gate_up(const std::vector<Expert>& experts, const Share& share, Activation activation) const {
    products(experts, share, sorted_, dp_, [&](int64_t b, int64_t m, int64_t count, Sums& sums) {
      for (int64_t i = 0; i < count; ++i) {
        T* to = act_ + (m + i) * act_stride_ + b * kLanes;
        const float *gate = sums[i][0], *up = sums[i][1];
        if (activation == kSilu) {
#pragma omp simd
          for (int64_t n = 0; n < kLanes; ++n) {
            store(to[n], silu(gate[n]) * up[n]);
          }
        } else {
#pragma omp simd
          for (int64_t n = 0; n < kLanes; ++n) {
            store(to[n], gelu_tanh(gate[n]) * up[n]);
          }
        }
      }
    });
  }

  void down(const std::vector<Expert>& experts, const Share& share, const Pair* pairs) const {
    products(experts, share, act_, act_stride_, [&](int64_t b, int64_t m, int64_t count, Sums& sums) {
      for (int64_t i = 0; i < count; ++i) {
        const Pair pair = pairs[m + i];
        float* to = sum_ + pair.row * dp_ + b * kBlock;
        const float* from = &sums[i][0][0];
#pragma omp simd
        for (int64_t n = 0; n < kBlock; ++n) {
          to[n] += pair.weight * from[n];
        }
      }
    });
  }

  const T* rows_;
  int64_t row_stride_, num_rows_, d_, dp_;
  T* out_;
  int64_t out_stride_, act_stride_ = 0;
  T *sorted_ = nullptr, *act_ = nullptr;
  float* sum_ = nullptr;
};

template <typename Id>
int64_t run_layer(const Tensor& out, const Tensor& counts, const Tensor& rows, const Tensor& ids, const Tensor& weights,
                  const Tensor& table, Activation activation) {
  const int64_t num_rows = ids.size(0), num_ids = ids.size(1), num_experts = table.size(0);
  const Id* id = ids.const_data_ptr<Id>();
  const float* weight = weights.const_data_ptr<float>();
  const int64_t* held = table.const_data_ptr<int64_t>();
  static thread_local std::vector<int64_t> starts;
  static thread_local std::vector<Pair> pairs;
  static thread_local std::vector<Expert> experts;
  starts.assign(num_experts + 1, 0);
  for (int64_t t = 0; t < num_rows; ++t) {
    for (int64_t k = 0; k < num_ids; ++k) {
      const int64_t expert = id[t * ids.stride(0) + k * ids.stride(1)];
      if (expert < -1 || expert >= num_experts) {
        return -2;
      }
      if (expert >= 0) {
        if (held[expert * kNumColumns + kGateUp] == 0) {
          return expert;
        }
        ++starts[expert + 1];
      }
    }
  }
  int64_t* count = counts.mutable_data_ptr<int64_t>();
  int64_t widest = kBlock;
  experts.clear();
  for (int64_t e = 0; e < num_experts; ++e) {
    const int64_t here = starts[e + 1];
    if (here > 0) {
      experts.push_back({held + e * kNumColumns, starts[e], here});
      widest = std::max(widest, held[e * kNumColumns + kWidth]);
      count[e] += here;
    }
    starts[e + 1] += starts[e];
  }
  const int64_t num_pairs = starts[num_experts];
  pairs.resize(num_pairs);
  for (int64_t t = 0; t < num_rows; ++t) {
    for (int64_t k = 0; k < num_ids; ++k) {
      const int64_t expert = id[t * ids.stride(0) + k * ids.stride(1)];
      if (expert >= 0) {
        pairs[starts[expert]++] = {static_cast<int32_t>(t), weight[t * weights.stride(0) + k * weights.stride(1)]};
      }
    }
  }
  const auto run = [&](auto tag) {
    using T = decltype(tag);
    Layer<T> layer(static_cast<const T*>(rows.const_data_ptr()), rows.stride(0), num_rows, rows.size(1),
                   static_cast<T*>(out.mutable_data_ptr()), out.stride(0));
    layer.run(experts, pairs.data(), num_pairs, widest, activation);
  };
  if (rows.scalar_type() == at::kFloat) {
    run(float{});
  } else {
    run(bf16{});
  }
  return -1;
}

// out_TD = every row's weighted sum over its experts; ids of -1 add nothing. counts_E += rows by expert. table: by expert, see
// Column. Returns -1, or -2 where an id is no expert's, or an expert that rows came for and that is not held.
int64_t experts(const Tensor& out, const Tensor& counts, const Tensor& rows, const Tensor& ids, const Tensor& weights,
                const Tensor& table, bool gelu) {
  TORCH_CHECK(rows.device().is_cpu() && rows.dim() == 2 && rows.stride(1) == 1 && out.sizes() == rows.sizes() && out.stride(1) == 1);
  TORCH_CHECK(rows.scalar_type() == out.scalar_type() && (rows.scalar_type() == at::kFloat || rows.scalar_type() == at::kBFloat16));
  TORCH_CHECK(ids.dim() == 2 && ids.size(0) == rows.size(0) && weights.sizes() == ids.sizes() && weights.scalar_type() == at::kFloat);
  TORCH_CHECK(table.is_contiguous() && table.dim() == 2 && table.size(1) == kNumColumns && counts.numel() == table.size(0));
  const Activation activation = gelu ? kGeluTanh : kSilu;
  if (ids.scalar_type() == at::kInt) {
    return run_layer<int32_t>(out, counts, rows, ids, weights, table, activation);
  }
  return run_layer<int64_t>(out, counts, rows, ids, weights, table, activation);
}

// ---- the gate ---------------------------------------------------------------------------------------------------------------

struct Gate {
  int64_t num_experts, top_k, num_groups, num_kept, group_counted;  // group_counted: best experts that a group's rank sums; 0: no groups
  bool sigmoid, renormalise;
  float scale;
  const float *bias, *expert_scale;  // nullptr: none
};

// The largest value, the first of equal ones; -1 where there is none above -inf.
inline int64_t largest(const float* values, int64_t count) {
  int64_t best = -1;
  float most = -std::numeric_limits<float>::infinity();
  for (int64_t i = 0; i < count; ++i) {
    if (values[i] > most) {
      most = values[i];
      best = i;
    }
  }
  return best;
}

// Ids and weights of one row from its logits, which become scores; ranks and groups are scratch. False where the row's weights
// are non-finite.
bool choose(const Gate& gate, float* logits, float* ranks, float* groups, int64_t* ids, float* weights) {
  const int64_t num = gate.num_experts;
  constexpr float kNever = -std::numeric_limits<float>::infinity();
  float most = logits[0], sum = 0.0f;
  for (int64_t e = 0; e < num; ++e) {
    if (std::isnan(logits[e])) {
      return false;
    }
    most = std::max(most, logits[e]);
  }
  if (gate.sigmoid) {
    for (int64_t e = 0; e < num; ++e) {
      const float small = exp_negative(-std::fabs(logits[e]));
      logits[e] = (logits[e] >= 0.0f ? 1.0f : small) / (1.0f + small);
    }
  } else {
    if (std::isinf(most)) {
      return false;
    }
#pragma omp simd
    for (int64_t e = 0; e < num; ++e) {
      logits[e] = exp_negative(logits[e] - most);
    }
    for (int64_t e = 0; e < num; ++e) {
      sum += logits[e];
    }
#pragma omp simd
    for (int64_t e = 0; e < num; ++e) {
      logits[e] /= sum;
    }
  }
  for (int64_t e = 0; e < num; ++e) {
    ranks[e] = gate.bias == nullptr ? logits[e] : logits[e] + gate.bias[e];
  }
  if (gate.group_counted > 0) {
    const int64_t size = num / gate.num_groups;
    for (int64_t g = 0; g < gate.num_groups; ++g) {
      float first = kNever, second = kNever;
      for (int64_t e = g * size; e < (g + 1) * size; ++e) {
        if (ranks[e] > first) {
          second = first;
          first = ranks[e];
        } else {
          second = std::max(second, ranks[e]);
        }
      }
      groups[g] = gate.group_counted > 1 && size > 1 ? first + second : first;
    }
    for (int64_t kept = 0; kept < gate.num_kept; ++kept) {
      const int64_t g = largest(groups, gate.num_groups);
      if (g < 0) {
        return false;
      }
      groups[g] = std::numeric_limits<float>::quiet_NaN();  // kept: compares with nothing any more
    }
    for (int64_t e = 0; e < num; ++e) {
      if (!std::isnan(groups[e / size])) {
        ranks[e] = kNever;
      }
    }
  }
  sum = 0.0f;
  for (int64_t k = 0; k < gate.top_k; ++k) {
    const int64_t e = largest(ranks, num);
    if (e < 0) {
      return false;
    }
    ids[k] = e;
    weights[k] = logits[e];
    sum += logits[e];
    ranks[e] = kNever;
  }
  for (int64_t k = 0; k < gate.top_k; ++k) {
    weights[k] = (gate.renormalise ? weights[k] / (sum + 1e-20f) : weights[k]);
    weights[k] *= (gate.expert_scale == nullptr ? 1.0f : gate.expert_scale[ids[k]]) * gate.scale;
    if (!std::isfinite(weights[k])) {
      return false;
    }
  }
  return true;
}

// Experts of every row: ids_TK int64 and weights_TK fp32, with the shared expert (id num_experts) last where K > top_k. weight: the
// gate's rows and, behind them, the shared expert's own gate where it has one, packed. Rows whose weights are non-finite get ids
// of -1; returns how many there are.
int64_t route(const Tensor& ids, const Tensor& weights, const Tensor& rows, const Tensor& weight, const std::optional<Tensor>& bias,
              const std::optional<Tensor>& expert_scale, int64_t num_experts, int64_t top_k, bool has_shared_gate, bool sigmoid,
              bool renormalise, double scale, int64_t num_groups, int64_t num_kept, int64_t group_counted) {
  const int64_t num_rows = rows.size(0), d = rows.size(1), dp = padded(d), width = ids.size(1);
  const int64_t num_blocks = padded(num_experts + has_shared_gate) / kBlock, outputs = num_blocks * kBlock;
  TORCH_CHECK(rows.device().is_cpu() && rows.stride(1) == 1 && weight.numel() == outputs * dp && weight.scalar_type() == at::kFloat);
  TORCH_CHECK(rows.scalar_type() == at::kFloat || rows.scalar_type() == at::kBFloat16);
  TORCH_CHECK(ids.is_contiguous() && weights.is_contiguous() && ids.size(0) == num_rows && weights.sizes() == ids.sizes());
  TORCH_CHECK(width == top_k || width == top_k + 1);
  TORCH_CHECK(!bias || bias->scalar_type() == at::kFloat);
  TORCH_CHECK(!expert_scale || expert_scale->scalar_type() == at::kFloat);
  const Gate gate{num_experts,   top_k,   num_groups, num_kept, group_counted, sigmoid, renormalise, static_cast<float>(scale),
                  bias ? bias->const_data_ptr<float>() : nullptr, expert_scale ? expert_scale->const_data_ptr<float>() : nullptr};
  int64_t* to_ids = ids.mutable_data_ptr<int64_t>();
  float* to_weights = weights.mutable_data_ptr<float>();
  const float* packed = weight.const_data_ptr<float>();
  std::atomic<int64_t> num_bad{0};
  antiphon::parallel_for(0, num_rows, 16, [&](int64_t begin, int64_t end) {
    static thread_local Scratch memory;
    constexpr int64_t kRows = 8;
    float* x = memory.get<float>(kRows * dp + kRows * outputs + 2 * outputs);
    float *logits = x + kRows * dp, *ranks = logits + kRows * outputs, *groups = ranks + outputs;
    alignas(64) Sums sums;
    const Tiles none(false);
    Prefetch nothing;
    for (int64_t t = begin; t < end; t += kRows) {
      const int64_t count = std::min(kRows, end - t);
      for (int64_t r = 0; r < count; ++r) {
        float* row = x + r * dp;
        if (rows.scalar_type() == at::kFloat) {
          std::memcpy(row, rows.const_data_ptr<float>() + (t + r) * rows.stride(0), d * sizeof(float));
        } else {
          const bf16* from = static_cast<const bf16*>(rows.const_data_ptr()) + (t + r) * rows.stride(0);
#pragma omp simd
          for (int64_t i = 0; i < d; ++i) {
            row[i] = load(from[i]);
          }
        }
        std::memset(row + d, 0, (dp - d) * sizeof(float));
      }
      for (int64_t b = 0; b < num_blocks; ++b) {
        multiply(none, x, dp, count, packed + b * dp * kBlock, dp, sums, {nothing});
        for (int64_t r = 0; r < count; ++r) {
          std::memcpy(logits + r * outputs + b * kBlock, sums[r], kBlock * sizeof(float));
        }
      }
      for (int64_t r = 0; r < count; ++r) {
        float* row = logits + r * outputs;
        int64_t* row_ids = to_ids + (t + r) * width;
        float* row_weights = to_weights + (t + r) * width;
        bool good = true;
        if (width > top_k) {
          const float z = row[num_experts], small = exp_negative(-std::fabs(z));
          row_ids[top_k] = num_experts;
          row_weights[top_k] = has_shared_gate ? (z >= 0.0f ? 1.0f : small) / (1.0f + small) : 1.0f;
          good = !has_shared_gate || !std::isnan(z);
        }
        if (!choose(gate, row, ranks, groups, row_ids, row_weights) || !good) {
          ++num_bad;
          std::fill(row_ids, row_ids + width, -1);
          std::fill(row_weights, row_weights + width, 0.0f);
        }
      }
    }
  });
  return num_bad;
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(antiphon, m) {
  m.def("pack_experts(Tensor(a!) out, Tensor first, Tensor? second, int pair) -> ()");
  m.def("experts(Tensor(a!) out, Tensor(b!) counts, Tensor rows, Tensor ids, Tensor weights, Tensor table, bool gelu) -> int");
  m.def(
      "route(Tensor(a!) ids, Tensor(b!) weights, Tensor rows, Tensor weight, Tensor? bias, Tensor? expert_scale, int num_experts, "
      "int top_k, bool has_shared_gate, bool sigmoid, bool renormalise, float scale, int num_groups, int num_kept, "
      "int group_counted) -> int");
}

TORCH_LIBRARY_IMPL(antiphon, CompositeExplicitAutograd, m) {
  m.impl("pack_experts", &pack_experts);
  m.impl("experts", &experts);
  m.impl("route", &route);
}
