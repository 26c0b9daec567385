// Rows times a weight packed in blocks (hot): what the vector units of processors with bfloat16 arithmetic, and float32, are served by.
//
// The weight is read from memory once for a panel of rows. A row's sum has one order whatever the rows beside it and whatever the number
// of threads: inputs ascending, threads share out columns. T rows, I inputs, O outputs.

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <mutex>
#include <optional>
#include <tuple>

#include "blocks.h"
#include "../large_pages.h"

namespace {

using antiphon::Beside;
using antiphon::bf16;
using antiphon::Bits;
using antiphon::data;
using antiphon::exp_negative;
using antiphon::kBlock;
using antiphon::kLanes;
using antiphon::Lanes;
using antiphon::load;
using antiphon::multiply;
using antiphon::padded;
using antiphon::passes_of;
using antiphon::Prefetch;
using antiphon::Scratch;
using antiphon::store;
using antiphon::Sums;
using antiphon::Tiles;
using at::Tensor;

constexpr int64_t kPanelRows = 128;  // rows that go through a thread's blocks together: they stay in its L2
constexpr int64_t kMostInputs = 1024;  // of blocks that are fetched whole while the one before is multiplied
constexpr int64_t kLinesAStep = 2;   // that a step of a pass takes of a block
constexpr int64_t kMemoryRows = 4;   // that computing isn't slower for than memory: nothing is fetched beside them but what comes next

// Runs of blocks for each thread, which takes as many as it gets to.
int64_t runs_a_thread(int64_t rows) { return rows > kPanelRows ? 6 : 2; }

// Whether the vector units of this build serve weights of this format better than others do.
bool packs(bool is_bf16) {
#if defined(__AVX512F__)
  (void)is_bf16;
  return true;
#elif ANTIPHON_HALF_LANES
  return !is_bf16;  // row_linear (kernels.cpp) widens a weight once for all rows
#else
  (void)is_bf16;
  return false;
#endif
}

// weight_OI in blocks, [O / 32, I, 32] with both widths padded by zeros.
Tensor pack_linear(const Tensor& weight) {
  TORCH_CHECK(weight.is_contiguous() && weight.dim() == 2 && weight.device().is_cpu());
  const int64_t rows = weight.size(0), cols = weight.size(1), k = padded(cols), num_blocks = padded(rows) / kBlock;
  const Tensor out = antiphon::LargePages::zeros({num_blocks, k, kBlock}, weight.scalar_type());
  if (weight.scalar_type() == at::kBFloat16) {
    antiphon::pack_as<uint16_t>(reinterpret_cast<uint16_t*>(data<bf16>(out)), reinterpret_cast<const uint16_t*>(data<bf16>(weight)), nullptr,
                                rows, cols, num_blocks, k, 2);
  } else {
    TORCH_CHECK(weight.scalar_type() == at::kFloat, "pack_linear takes float32 or bfloat16");
    antiphon::pack_as<float>(data<float>(out), weight.const_data_ptr<float>(), nullptr, rows, cols, num_blocks, k, 1);
  }
  return out;
}

// to[n] = sums[n] + bias[n].
template <typename From, typename To>
void finish(const float* sums, const From* bias, int64_t count, To* to) {
  if (bias == nullptr) {
#pragma omp simd
    for (int64_t n = 0; n < count; ++n) store(to[n], sums[n]);
  } else {
#pragma omp simd
    for (int64_t n = 0; n < count; ++n) store(to[n], sums[n] + load(bias[n]));
  }
}

// Rows as deep as blocks, which are padded: these, or a copy with zeros behind.
template <typename T>
const T* as_deep(const T* x, int64_t rows, int64_t inputs, int64_t k) {
  if (k == inputs) return x;
  static thread_local Scratch memory;
  T* to = memory.get<T>(rows * k);
  for (int64_t t = 0; t < rows; ++t) {
    std::memcpy(static_cast<void*>(to + t * k), x + t * inputs, inputs * sizeof(T));
    std::memset(static_cast<void*>(to + t * k + inputs), 0, (k - inputs) * sizeof(T));
  }
  return to;
}

// take(row, block, sums) for every row and every block of [begin, end), which lie where ``at(block)`` says, a panel of rows after the other
// and in it a block's rows.
template <typename T, typename At, typename Take>
void multiply_blocks(const T* x, int64_t rows, int64_t k, int64_t begin, int64_t end, const At& at, const Take& take) {
  alignas(64) Sums sums;
  const Tiles none(false);
  Prefetch ahead;
  for (int64_t panel = 0; panel < rows; panel += kPanelRows) {
    const int64_t last = std::min(panel + kPanelRows, rows), whole = (last - panel) / kBlock;
    const int64_t passes = whole * passes_of(kBlock) + passes_of((last - panel) % kBlock);
    for (int64_t b = begin; b < end; ++b) {
      const T* block = at(b);
      // The first panel's rows take turns with a block in the nearest caches, while the next one comes from memory.
      const bool expects = panel == 0 && last - panel > kMemoryRows && k <= kMostInputs;
      if (expects) ahead.start(reinterpret_cast<const char*>(at(std::min(b + 1, end - 1))), b + 1 < end ? k * kBlock * sizeof(T) : 0);
      const Beside beside{ahead, expects ? (kLinesAStep * Beside::kSteps + passes - 1) / passes : 0, b == begin};
      for (int64_t r = panel; r < last; r += kBlock) {
        const int64_t count = std::min(kBlock, last - r);
        multiply(none, x + r * k, k, count, block, k, sums, beside);
        for (int64_t i = 0; i < count; ++i) take(r + i, b, &sums[i][0][0]);
      }
    }
  }
}

template <typename T>
auto in_order(const T* packed, int64_t k) {
  return [=](int64_t block) { return packed + block * k * kBlock; };
}

template <typename T, typename To>
void run(const T* x, int64_t rows, int64_t inputs, const T* packed, const T* bias, int64_t outputs, To* out) {
  const int64_t k = padded(inputs);
  x = as_deep(x, rows, inputs, k);
  antiphon::parallel_for(0, padded(outputs) / kBlock, 1, [&](int64_t begin, int64_t end) {
    multiply_blocks(x, rows, k, begin, end, in_order(packed, k), [&](int64_t row, int64_t block, const float* sums) {
      const int64_t first = block * kBlock;
      finish(sums, bias == nullptr ? nullptr : bias + first, std::min(kBlock, outputs - first), out + row * outputs + first);
    });
  }, runs_a_thread(rows));
}

// silu(gate) * up where the blocks of both, rounded as results are, come one after the other.
template <typename T>
void run_gated(const T* x, int64_t rows, int64_t inputs, const T* packed, const T* bias, int64_t width, T* out) {
  const int64_t k = padded(inputs), half = width / kBlock;
  x = as_deep(x, rows, inputs, k);
  antiphon::parallel_for(0, half, 1, [&](int64_t begin, int64_t end) {
    alignas(64) T gates[kPanelRows][kBlock], ups[kBlock];
    const auto at = [&](int64_t i) { return packed + (i / 2 + i % 2 * half) * k * kBlock; };
    multiply_blocks(x, rows, k, 2 * begin, 2 * end, at, [&](int64_t row, int64_t i, const float* sums) {
      T* gate = gates[row % kPanelRows];
      const int64_t first = i / 2 * kBlock;
      finish(sums, bias == nullptr ? nullptr : bias + first + i % 2 * width, kBlock, i % 2 == 0 ? gate : ups);
      if (i % 2 == 0) return;
      T* to = out + row * width + first;
#pragma omp simd
      for (int64_t n = 0; n < kBlock; ++n) {
        const float g = load(gate[n]), e = exp_negative(-std::fabs(g));
        store(to[n], g * ((g >= 0.0f ? 1.0f : e) / (1.0f + e)) * load(ups[n]));
      }
    });
  }, runs_a_thread(rows));
}

// The largest result of a row in each lane, and its output; what is no number is larger than any.
struct Best {
  Lanes value[2];
  Bits output[2];

  void see(const float* sums, int64_t first) {
    constexpr Bits kMine = Bits{0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
    for (int64_t half = 0; half < 2; ++half) {
      const Lanes each = antiphon::load_lanes(sums + half * kLanes);
      const auto larger = each > value[half] || each != each;
      value[half] = larger ? each : value[half];
      output[half] = larger ? kMine + static_cast<uint32_t>(first + half * kLanes) : output[half];
    }
  }

  void tell(float& most, int64_t& where) const {
    for (int64_t half = 0; half < 2; ++half) {
      for (int64_t lane = 0; lane < kLanes; ++lane) {
        const float each = value[half][lane];
        const int64_t its = output[half][lane];
        if (each > most || (each != each && most == most) || (each == most && its < where)) most = each, where = its;
      }
    }
  }
};

template <typename T>
void run_best(const T* x, int64_t rows, int64_t inputs, const T* packed, const T* bias, int64_t outputs, float* values, int64_t* indices) {
  const int64_t k = padded(inputs);
  x = as_deep(x, rows, inputs, k);
  std::fill(values, values + rows, -INFINITY);
  std::fill(indices, indices + rows, int64_t{0});
  std::mutex telling;
  antiphon::parallel_for(0, padded(outputs) / kBlock, 1, [&](int64_t begin, int64_t end) {
    static thread_local Scratch memory;
    Best* best = memory.get<Best>(rows);
    for (int64_t row = 0; row < rows; ++row) {
      for (int64_t half = 0; half < 2; ++half) best[row].value[half] = Lanes{} - INFINITY, best[row].output[half] = Bits{};
    }
    multiply_blocks(x, rows, k, begin, end, in_order(packed, k), [&](int64_t row, int64_t block, const float* sums) {
      const int64_t first = block * kBlock, width = std::min(kBlock, outputs - first);
      if (bias == nullptr && width == kBlock) return best[row].see(sums, first);
      alignas(64) float all[kBlock];
      std::fill(all + width, all + kBlock, -INFINITY);
      finish(sums, bias == nullptr ? nullptr : bias + first, width, all);
      best[row].see(all, first);
    });
    const std::lock_guard alone(telling);
    for (int64_t row = 0; row < rows; ++row) best[row].tell(values[row], indices[row]);
  }, runs_a_thread(rows));
}

void check(const Tensor& x, const Tensor& packed, const std::optional<Tensor>& bias, int64_t outputs) {
  TORCH_CHECK(x.dim() == 2 && x.is_contiguous() && packed.is_contiguous() && x.scalar_type() == packed.scalar_type());
  TORCH_CHECK(packed.size(0) == padded(outputs) / kBlock && packed.size(1) == padded(x.size(1)) && packed.size(2) == kBlock);
  TORCH_CHECK(!bias.has_value() || (bias->is_contiguous() && bias->numel() == outputs && bias->scalar_type() == x.scalar_type()));
}

// x_TI @ weight_OI^T + bias_O of a packed weight, in its format, or in fp32 where no rounding is wanted.
Tensor packed_linear(const Tensor& x, const Tensor& packed, const std::optional<Tensor>& bias, int64_t outputs, bool in_fp32) {
  const int64_t rows = x.size(0), inputs = x.size(1);
  check(x, packed, bias, outputs);
  const Tensor out = at::empty({rows, outputs}, in_fp32 ? x.options().dtype(at::kFloat) : x.options());
  antiphon::dispatch(x, [&](auto tag) {
    using T = decltype(tag);
    const T *from = data<T>(x), *weight = data<T>(packed), *more = bias.has_value() ? data<T>(*bias) : nullptr;
    if (out.scalar_type() == at::kFloat) {
      run(from, rows, inputs, weight, more, outputs, data<float>(out));
    } else {
      run(from, rows, inputs, weight, more, outputs, data<bf16>(out));
    }
  });
  return out;
}

// silu(gate) * up, [T, O / 2], of the results of packed_linear, whose first half is the gate; O / 2 is a multiple of a block's outputs.
Tensor packed_gated(const Tensor& x, const Tensor& packed, const std::optional<Tensor>& bias, int64_t outputs) {
  check(x, packed, bias, outputs);
  TORCH_CHECK(outputs % (2 * kBlock) == 0, "packed_gated takes whole blocks of gate and up");
  const Tensor out = at::empty({x.size(0), outputs / 2}, x.options());
  antiphon::dispatch(x, [&](auto tag) {
    using T = decltype(tag);
    run_gated(data<T>(x), x.size(0), x.size(1), data<T>(packed), bias.has_value() ? data<T>(*bias) : nullptr, outputs / 2, data<T>(out));
  });
  return out;
}

// The lowest index of each row's largest result, int64 [T], and that result in fp32 [T]; what is no number is larger than any.
std::tuple<Tensor, Tensor> packed_best(const Tensor& x, const Tensor& packed, const std::optional<Tensor>& bias, int64_t outputs) {
  check(x, packed, bias, outputs);
  const Tensor indices = at::empty({x.size(0)}, x.options().dtype(at::kLong)), values = at::empty({x.size(0)}, x.options().dtype(at::kFloat));
  antiphon::dispatch(x, [&](auto tag) {
    using T = decltype(tag);
    run_best(data<T>(x), x.size(0), x.size(1), data<T>(packed), bias.has_value() ? data<T>(*bias) : nullptr, outputs, data<float>(values),
             indices.mutable_data_ptr<int64_t>());
  });
  return {indices, values};
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(antiphon, m) {
  m.def("packs(bool is_bf16) -> bool", &packs);
  m.def("pack_linear(Tensor weight) -> Tensor");
  m.def("packed_linear(Tensor x, Tensor packed, Tensor? bias, int outputs, bool in_fp32) -> Tensor");
  m.def("packed_gated(Tensor x, Tensor packed, Tensor? bias, int outputs) -> Tensor");
  m.def("packed_best(Tensor x, Tensor packed, Tensor? bias, int outputs) -> (Tensor, Tensor)");
}

TORCH_LIBRARY_IMPL(antiphon, CompositeExplicitAutograd, m) {
  m.impl("pack_linear", &pack_linear);
  m.impl("packed_linear", &packed_linear);
  m.impl("packed_gated", &packed_gated);
  m.impl("packed_best", &packed_best);
}
