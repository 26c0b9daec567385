// Rows times a weight packed in blocks (hot): what the vector units of processors with bfloat16 arithmetic, and float32, are served by.
//
// The weight is read from memory once for a panel of rows. A row's sum has one order whatever the rows beside it and whatever the number
// of threads: inputs ascending, threads share out columns. T rows, I inputs, O outputs.

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <optional>

#include "blocks.h"
#include "../large_pages.h"

namespace {

using antiphon::bf16;
using antiphon::data;
using antiphon::kBlock;
using antiphon::load;
using antiphon::multiply;
using antiphon::padded;
using antiphon::Prefetch;
using antiphon::Scratch;
using antiphon::store;
using antiphon::Sums;
using antiphon::Tiles;
using at::Tensor;

constexpr int64_t kPanelRows = 128;  // rows that go through a thread's blocks together: they stay in its L2
constexpr int64_t kRunsAThread = 2;  // of blocks: each thread takes as many as it gets to

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

template <typename T, typename To>
void run(const T* x, int64_t rows, int64_t inputs, const T* packed, const T* bias, int64_t outputs, To* out) {
  const int64_t k = padded(inputs), num_blocks = padded(outputs) / kBlock;
  if (k != inputs) {  // blocks are as deep as their padding, and so must rows be
    static thread_local Scratch memory;
    T* to = memory.get<T>(rows * k);
    for (int64_t t = 0; t < rows; ++t) {
      std::memcpy(static_cast<void*>(to + t * k), x + t * inputs, inputs * sizeof(T));
      std::memset(static_cast<void*>(to + t * k + inputs), 0, (k - inputs) * sizeof(T));
    }
    x = to;
  }
  antiphon::parallel_for(0, num_blocks, 1, [&](int64_t begin, int64_t end) {
    alignas(64) Sums sums;
    const Tiles none(false);
    Prefetch nothing;
    for (int64_t panel = 0; panel < rows; panel += kPanelRows) {
      const int64_t last = std::min(panel + kPanelRows, rows);
      for (int64_t b = begin; b < end; ++b) {
        const T* block = packed + b * k * kBlock;
        const int64_t first = b * kBlock, width = std::min(kBlock, outputs - first);
        for (int64_t r = panel; r < last; r += kBlock) {
          const int64_t count = std::min(kBlock, last - r);
          multiply(none, x + r * k, k, count, block, k, sums, nothing);
          for (int64_t i = 0; i < count; ++i) {
            finish(&sums[i][0][0], bias == nullptr ? nullptr : bias + first, width, out + (r + i) * outputs + first);
          }
        }
      }
    }
  }, kRunsAThread);
}

// x_TI @ weight_OI^T + bias_O of a packed weight, in its format, or in fp32 where no rounding is wanted.
Tensor packed_linear(const Tensor& x, const Tensor& packed, const std::optional<Tensor>& bias, int64_t outputs, bool in_fp32) {
  const int64_t rows = x.size(0), inputs = x.size(1);
  TORCH_CHECK(x.dim() == 2 && x.is_contiguous() && packed.is_contiguous() && x.scalar_type() == packed.scalar_type());
  TORCH_CHECK(packed.size(0) == padded(outputs) / kBlock && packed.size(1) == padded(inputs) && packed.size(2) == kBlock);
  TORCH_CHECK(!bias.has_value() || (bias->is_contiguous() && bias->numel() == outputs && bias->scalar_type() == x.scalar_type()));
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

}  // namespace

TORCH_LIBRARY_FRAGMENT(antiphon, m) {
  m.def("packs(bool is_bf16) -> bool", &packs);
  m.def("pack_linear(Tensor weight) -> Tensor");
  m.def("packed_linear(Tensor x, Tensor packed, Tensor? bias, int outputs, bool in_fp32) -> Tensor");
}

TORCH_LIBRARY_IMPL(antiphon, CompositeExplicitAutograd, m) {
  m.impl("pack_linear", &pack_linear);
  m.impl("packed_linear", &packed_linear);
}
