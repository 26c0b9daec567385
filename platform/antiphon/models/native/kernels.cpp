// A step's own kernels (hot): norms, rotary embedding with the KV write, gated activation, products with weights in four bits and in
// bfloat16 for processors without its arithmetic.
//
// Every row is computed by itself in a fixed order, so a row's result does not depend on the rest of its batch.
// T rows, D hidden, N query heads, K KV heads, G = N/K, H head dim, R rotary dim, P blocks, S slots per block.
// bfloat16 is read and written with round-to-nearest-even; all arithmetic is fp32. The torch path in models/ is the reference.

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include "elements.h"
#include "lanes.h"
#include "large_pages.h"
#include "thread_pool.h"

#ifdef __AVX2__
#include <immintrin.h>
#endif
#ifdef __linux__
#include <sched.h>
#endif

#include <algorithm>
#include <atomic>
#include <bit>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <optional>
#include <vector>

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
using antiphon::total;

namespace {

using at::Tensor;

template <typename T, typename W>
void norm_row(const T* x, const W* w, T* out, int64_t d, float eps, float shift) {
  float sum = 0.0f;
#pragma omp simd reduction(+ : sum)
  for (int64_t i = 0; i < d; ++i) {
    const float v = load(x[i]);
    sum += v * v;
  }
  const float scale = 1.0f / std::sqrt(sum / static_cast<float>(d) + eps);
#pragma omp simd
  for (int64_t i = 0; i < d; ++i) {
    store(out[i], load(x[i]) * scale * (load(w[i]) + shift));
  }
}

// norm_row with a weight of the rows' format or, rounded once at the end, of more precision.
template <typename T>
void norm_row(const T* x, const Tensor& weight, T* out, int64_t d, float eps, float shift) {
  if (weight.scalar_type() == at::kFloat) {
    norm_row(x, data<float>(weight), out, d, eps, shift);
  } else {
    norm_row(x, data<T>(weight), out, d, eps, shift);
  }
}

void check_weight(const Tensor& x, const Tensor& weight) {
  TORCH_CHECK(weight.is_contiguous() && (weight.scalar_type() == at::kFloat || weight.scalar_type() == x.scalar_type()));
}

// RMSNorm over the last dimension; shift is added to the weight (1 for families that store weight - 1).
Tensor rms_norm(const Tensor& x, const Tensor& weight, double eps, double shift) {
  TORCH_CHECK(x.is_contiguous());
  check_weight(x, weight);
  Tensor out = at::empty(x.sizes(), x.options());
  const int64_t d = x.size(-1), rows = x.numel() / d;
  dispatch(x, [&](auto tag) {
    using T = decltype(tag);
    antiphon::parallel_for(0, rows, 16, [&](int64_t begin, int64_t end) {
      for (int64_t t = begin; t < end; ++t) {
        norm_row(data<T>(x) + t * d, weight, data<T>(out) + t * d, d, eps, shift);
      }
    });
  });
  return out;
}

template <typename T>
void add_row(T* row, const T* more, int64_t d) {
#pragma omp simd
  for (int64_t i = 0; i < d; ++i) store(row[i], load(row[i]) + load(more[i]));
}

// x_TD += added_TD, on the threads that the other kernels use: torch's own would wake up for it.
void add_rows(const Tensor& x, const Tensor& added) {
  TORCH_CHECK(x.is_contiguous() && added.is_contiguous() && x.sizes() == added.sizes() && x.scalar_type() == added.scalar_type());
  const int64_t d = x.size(-1), rows = x.numel() / d;
  dispatch(x, [&](auto tag) {
    using T = decltype(tag);
    antiphon::parallel_for(0, rows, 32, [&](int64_t begin, int64_t end) {
      add_row(data<T>(x) + begin * d, data<T>(added) + begin * d, (end - begin) * d);
    });
  });
}

// x_TD += added_TD, then its norm: the residual stream advances in the same pass.
Tensor add_rms_norm(const Tensor& x, const Tensor& added, const Tensor& weight, double eps, double shift) {
  TORCH_CHECK(x.is_contiguous() && added.is_contiguous() && x.sizes() == added.sizes() && x.scalar_type() == added.scalar_type());
  check_weight(x, weight);
  Tensor out = at::empty(x.sizes(), x.options());
  const int64_t d = x.size(-1), rows = x.numel() / d;
  dispatch(x, [&](auto tag) {
    using T = decltype(tag);
    antiphon::parallel_for(0, rows, 16, [&](int64_t begin, int64_t end) {
      for (int64_t t = begin; t < end; ++t) {
        T* row = data<T>(x) + t * d;
        add_row(row, data<T>(added) + t * d, d);
        norm_row(row, weight, data<T>(out) + t * d, d, eps, shift);
      }
    });
  });
  return out;
}

// Rotate q and k inside qkv_T(N+2K)H in place, norming them per head first where norms are given, and write k and v to
// slots_T of the caches [P*S, K, H]. cos and sin are tables [positions, R/2] in fp32.
void rope_and_cache(const Tensor& qkv, const Tensor& cos, const Tensor& sin, const Tensor& positions, const Tensor& slots,
                    const Tensor& k_cache, const Tensor& v_cache, int64_t num_heads, const std::optional<Tensor>& q_norm,
                    const std::optional<Tensor>& k_norm, double eps, double shift) {
  const int64_t kv_heads = k_cache.size(1), h = k_cache.size(2), half = cos.size(1);
  const int64_t rows = positions.numel(), width = (num_heads + 2 * kv_heads) * h;
  TORCH_CHECK(qkv.is_contiguous() && qkv.numel() == rows * width && cos.scalar_type() == at::kFloat);
  TORCH_CHECK(k_cache.is_contiguous() && v_cache.is_contiguous() && 2 * half <= h);
  if (q_norm.has_value()) check_weight(qkv, *q_norm);
  if (k_norm.has_value()) check_weight(qkv, *k_norm);
  const int64_t* position = positions.const_data_ptr<int64_t>();
  const int64_t* slot = slots.const_data_ptr<int64_t>();
  const float *cos_table = cos.const_data_ptr<float>(), *sin_table = sin.const_data_ptr<float>();
  dispatch(qkv, [&](auto tag) {
    using T = decltype(tag);
    antiphon::parallel_for(0, rows, 8, [&](int64_t begin, int64_t end) {
      for (int64_t t = begin; t < end; ++t) {
        T* row = data<T>(qkv) + t * width;
        const float *c = cos_table + position[t] * half, *s = sin_table + position[t] * half;
        for (int64_t n = 0; n < num_heads + kv_heads; ++n) {
          T* head = row + n * h;
          const bool is_query = n < num_heads;
          if (is_query ? q_norm.has_value() : k_norm.has_value()) {
            norm_row(head, is_query ? *q_norm : *k_norm, head, h, eps, shift);
          }
#pragma omp simd
          for (int64_t i = 0; i < half; ++i) {
            const float a = load(head[i]), b = load(head[i + half]);
            store(head[i], a * c[i] - b * s[i]);
            store(head[i + half], b * c[i] + a * s[i]);
          }
        }
        const T* k = row + num_heads * h;
        const int64_t kv_width = kv_heads * h;
        std::copy(k, k + kv_width, data<T>(k_cache) + slot[t] * kv_width);
        std::copy(k + kv_width, k + 2 * kv_width, data<T>(v_cache) + slot[t] * kv_width);
      }
    });
  });
}

// ``from`` into ``to``, both contiguous and of one type. By the threads that kernels compute on: PyTorch's own would stand in their way.
void copy_rows(const Tensor& to, const Tensor& from) {
  TORCH_CHECK(to.is_contiguous() && from.is_contiguous() && to.scalar_type() == from.scalar_type() && to.numel() == from.numel());
  TORCH_CHECK(to.device().is_cpu() && from.device().is_cpu());
  char* target = static_cast<char*>(to.mutable_data_ptr());
  const char* source = static_cast<const char*>(from.const_data_ptr());
  antiphon::parallel_for(0, static_cast<int64_t>(to.nbytes()), 1 << 17, [&](int64_t begin, int64_t end) {
    std::memcpy(target + begin, source + begin, end - begin);
  });
}

// silu(gate) * up from [T, 2I], both side by side.
Tensor silu_mul(const Tensor& gate_up) {
  TORCH_CHECK(gate_up.is_contiguous());
  const int64_t rows = gate_up.size(0), width = gate_up.size(1) / 2;
  Tensor out = at::empty({rows, width}, gate_up.options());
  dispatch(gate_up, [&](auto tag) {
    using T = decltype(tag);
    antiphon::parallel_for(0, rows, 4, [&](int64_t begin, int64_t end) {
      for (int64_t t = begin; t < end; ++t) {
        const T *gate = data<T>(gate_up) + t * 2 * width, *up = gate + width;
        T* to = data<T>(out) + t * width;
#pragma omp simd
        for (int64_t i = 0; i < width; ++i) {
          const float g = load(gate[i]);
          const float e = exp_negative(-std::fabs(g));
          const float sigmoid = (g >= 0.0f ? 1.0f : e) / (1.0f + e);
          store(to[i], g * sigmoid * load(up[i]));
        }
      }
    });
  });
  return out;
}

// What the 16 codes of one group stand for; kinds as in models/loading/stored/four_bit.py: 0 integer, 1 line, 2 e2m1.
template <typename Scale>
void values_of_group(int64_t kind, const Scale* scales, const void* lows, int64_t at, float* values) {
  if (kind == 2) {
    static constexpr float kMagnitudes[8] = {0.0f, 0.5f, 1.0f, 1.5f, 2.0f, 3.0f, 4.0f, 6.0f};
    const float factor = std::ldexp(1.0f, static_cast<int>(reinterpret_cast<const uint8_t*>(scales)[at]) - 127);
    for (int c = 0; c < 16; ++c) values[c] = (c < 8 ? factor : -factor) * kMagnitudes[c & 7];
    return;
  }
  const float scale = static_cast<float>(scales[at]);
  if (kind == 1) {
    const float least = static_cast<float>(static_cast<const c10::Half*>(lows)[at]);
    for (int c = 0; c < 16; ++c) values[c] = static_cast<float>(c) * scale + least;
    return;
  }
  const float zero = lows == nullptr ? 8.0f : static_cast<float>(static_cast<const uint8_t*>(lows)[at]);
  for (int c = 0; c < 16; ++c) values[c] = static_cast<float>(static_cast<Scale>((static_cast<float>(c) - zero) * scale));
}

// 16 codes of a group, two a byte, as numbers.
inline void sixteen_values(const uint8_t* codes, const float* values, float* to) {
#ifdef __AVX512BW__
  const __m128i bytes = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(codes)), half = _mm_set1_epi8(15);
  const __m128i both = _mm_unpacklo_epi8(_mm_and_si128(bytes, half), _mm_and_si128(_mm_srli_epi16(bytes, 4), half));
  _mm512_storeu_ps(to, _mm512_permutexvar_ps(_mm512_cvtepu8_epi32(both), _mm512_loadu_ps(values)));
#else
  for (int b = 0; b < 8; ++b) to[2 * b] = values[codes[b] & 15], to[2 * b + 1] = values[codes[b] >> 4];
#endif
}

// x_TI @ weight^T of a matrix in four bits, for few rows: each output becomes numbers in a thread's own cache and is used at once.
// Groups are runs of inputs, a multiple of 16. ``out`` [T, O] may be part of a wider one.
void four_bit_linear(const Tensor& out, const Tensor& x, const Tensor& codes, const Tensor& scales, const std::optional<Tensor>& lows,
                     int64_t group, int64_t kind) {
  const int64_t rows = x.size(0), inputs = x.size(1), outputs = codes.size(0), groups = inputs / group, stride = out.stride(0);
  TORCH_CHECK(codes.is_contiguous() && scales.is_contiguous() && x.is_contiguous() && out.stride(1) == 1 && x.scalar_type() == out.scalar_type());
  TORCH_CHECK(group % 16 == 0 && inputs % group == 0 && scales.size(0) == outputs && scales.size(1) == groups && 2 * codes.size(1) == inputs);
  TORCH_CHECK(out.size(0) == rows && out.size(1) == outputs && (!lows.has_value() || (lows->is_contiguous() && lows->sizes() == scales.sizes())));
  const bool is_bf16 = x.scalar_type() == at::kBFloat16;
  const Tensor wide = is_bf16 ? x.to(at::kFloat) : x;
  const float* from = wide.const_data_ptr<float>();
  const uint8_t* bytes = codes.const_data_ptr<uint8_t>();
  const void* low = lows.has_value() ? lows->const_data_ptr() : nullptr;
  const auto run = [&](auto scale_tag) {
    using Scale = decltype(scale_tag);
    const Scale* scale = static_cast<const Scale*>(scales.const_data_ptr());
    antiphon::parallel_for(0, outputs, 16, [&](int64_t begin, int64_t end) {
      thread_local std::vector<float> scratch;
      scratch.resize(inputs);
      float* weight = scratch.data();
      alignas(64) float values[16];
      for (int64_t o = begin; o < end; ++o) {
        for (int64_t g = 0; g < groups; ++g) {
          values_of_group<Scale>(kind, scale, low, o * groups + g, values);
          if (is_bf16) {
            for (float& value : values) {
              bf16 rounded;
              store(rounded, value);
              value = load(rounded);
            }
          }
          for (int64_t i = g * group; i < (g + 1) * group; i += 16) sixteen_values(bytes + (o * inputs + i) / 2, values, weight + i);
        }
        for (int64_t t = 0; t < rows; ++t) {
          const float* row = from + t * inputs;
          float sum = 0.0f;
#pragma omp simd reduction(+ : sum)
          for (int64_t i = 0; i < inputs; ++i) {
            sum += row[i] * weight[i];
          }
          if (is_bf16) {
            store(data<bf16>(out)[t * stride + o], sum);
          } else {
            data<float>(out)[t * stride + o] = sum;
          }
        }
      }
    });
  };
  switch (scales.scalar_type()) {
    case at::kHalf: run(c10::Half{}); break;
    case at::kBFloat16: run(c10::BFloat16{}); break;
    case at::kByte: TORCH_CHECK(kind == 2); run(uint8_t{}); break;
    default: TORCH_CHECK(scales.scalar_type() == at::kFloat); run(float{});
  }
}

Tensor large_zeros(at::IntArrayRef sizes, at::ScalarType dtype) { return antiphon::LargePages::zeros(sizes, dtype); }

// Takes the memory of these bytes of a tensor. What lies there stays, so that others may use it meanwhile.
void populate(const Tensor& memory, int64_t first, int64_t bytes) {
  TORCH_CHECK(memory.is_cpu() && memory.is_contiguous() && first >= 0 && bytes > 0 && first + bytes <= static_cast<int64_t>(memory.nbytes()));
#ifdef MADV_POPULATE_WRITE
  constexpr uintptr_t kSmallPage = 4096;
  const uintptr_t from = reinterpret_cast<uintptr_t>(memory.const_data_ptr()) + first, begin = from & ~(kSmallPage - 1);
  madvise(reinterpret_cast<void*>(begin), from + bytes - begin, MADV_POPULATE_WRITE);  // a wish: older kernels do it at the first touch
#endif
}

// Reads every byte once, each thread four runs side by side: what the machine's memory gives to a step that reads its weights.
int64_t read_all(const Tensor& memory) {
  TORCH_CHECK(memory.is_contiguous() && memory.is_cpu());
  const int64_t words = static_cast<int64_t>(memory.nbytes()) / 8, threads = at::get_num_threads();
  const uint64_t* from = data<uint64_t>(memory);
  std::vector<uint64_t> sums(threads, 0);
  antiphon::parallel_for(0, threads, 1, [&](int64_t begin, int64_t end) {
    for (int64_t k = begin; k < end; ++k) {
      const int64_t run = words / threads / 4 / 8 * 8;
      const uint64_t* at = from + k * 4 * run;
      uint64_t sum = 0;
#pragma omp simd reduction(+ : sum)
      for (int64_t i = 0; i < run; ++i) {
        sum += at[i] ^ at[i + run] ^ at[i + 2 * run] ^ at[i + 3 * run];
      }
      sums[k] = sum;
    }
  });
  uint64_t total = 0;
  for (const uint64_t sum : sums) {
    total += sum;
  }
  return static_cast<int64_t>(total);
}

// Pin the calling thread's compute threads, this library's and torch's, to a processor each, itself to the first; how many could not
// be. ``share``: see ThreadPool::pin.
int64_t pin_threads(at::IntArrayRef cores, bool share) {
  std::atomic<int64_t> num_failed{antiphon::ThreadPool::here().pin(cores, share)};
#ifdef __linux__
  at::parallel_for(0, at::get_num_threads(), 1, [&](int64_t, int64_t) {
    cpu_set_t set;
    CPU_ZERO(&set);
    const int64_t core = cores[at::get_thread_num() % cores.size()];
    if (core >= 0 && core < CPU_SETSIZE) CPU_SET(core, &set);
    num_failed += sched_setaffinity(0, sizeof(set), &set) != 0;
  });
#endif
  return num_failed;
}

// Rows times bfloat16 weights as checkpoints have them, for processors without bfloat16 arithmetic: weights are read from memory once
// for all rows, and widened in registers for few of them, into a buffer in the nearest cache for more. A row's sum has one order
// whatever the rows beside it: eight lanes, lanes in pairs, the rest.
constexpr int64_t kOutputs = 6, kBufferedRows = 10;

// sums[row][output] of Rows rows of x, ``inputs`` floats each, and Outputs rows of weights. Both numbers are such that the sums and x stay
// in registers.
template <int Rows, int Outputs, typename Weight>
[[gnu::noinline]] void dot(const float* x, const Weight* w, int64_t inputs, float (*sums)[kOutputs]) {
  f32x8 acc[Rows][Outputs] = {};
  int64_t i = 0;
  for (; i + kVector <= inputs; i += kVector) {
    f32x8 v[Rows];
    for (int r = 0; r < Rows; ++r) v[r] = load8(x + r * inputs + i);
    for (int o = 0; o < Outputs; ++o) {
      const f32x8 weights = load8(w + o * inputs + i);
      for (int r = 0; r < Rows; ++r) acc[r][o] = multiply_add(v[r], weights, acc[r][o]);
    }
  }
  for (int r = 0; r < Rows; ++r) {
    for (int o = 0; o < Outputs; ++o) {
      float sum = total(acc[r][o]);
      for (int64_t j = i; j < inputs; ++j) sum = multiply_add(x[r * inputs + j], load(w[o * inputs + j]), sum);
      sums[r][o] = sum;
    }
  }
}

// The same of ``outputs`` rows of weights, Step at a time.
template <int Rows, int Step, typename Weight>
void dots(const float* x, const Weight* w, int64_t inputs, int64_t outputs, float (*sums)[kOutputs]) {
  int64_t o = 0;
  for (; o + Step <= outputs; o += Step) dot<Rows, Step>(x, w + o * inputs, inputs, reinterpret_cast<float(*)[kOutputs]>(&sums[0][o]));
  for (; o < outputs; ++o) dot<Rows, 1>(x, w + o * inputs, inputs, reinterpret_cast<float(*)[kOutputs]>(&sums[0][o]));
}

// x_TI @ weight_OI^T + bias_O: bfloat16, or fp32 where no rounding is wanted.
Tensor row_linear(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias, bool in_fp32) {
  const int64_t rows = x.size(0), inputs = x.size(1), outputs = weight.size(0);
  TORCH_CHECK(x.is_contiguous() && weight.is_contiguous() && weight.size(1) == inputs);
  TORCH_CHECK(x.scalar_type() == at::kBFloat16 && weight.scalar_type() == at::kBFloat16);
  const Tensor out = at::empty({rows, outputs}, x.options().dtype(in_fp32 ? at::kFloat : at::kBFloat16));
  const bf16 *from = data<bf16>(x), *w = data<bf16>(weight), *b = bias.has_value() ? data<bf16>(*bias) : nullptr;
  float* as_fp32 = in_fp32 ? data<float>(out) : nullptr;
  bf16* as_bf16 = in_fp32 ? nullptr : data<bf16>(out);
  std::vector<float> wide(static_cast<size_t>(rows * inputs));
  for (int64_t i = 0; i < rows * inputs; ++i) wide[i] = load(from[i]);
  antiphon::parallel_for(0, (outputs + kOutputs - 1) / kOutputs, 12, [&](int64_t begin, int64_t end) {
    float sums[4][kOutputs];
    std::vector<float> buffer(rows < kBufferedRows ? 0 : static_cast<size_t>(kOutputs * inputs));
    for (int64_t o = begin * kOutputs; o < std::min(outputs, end * kOutputs); o += kOutputs) {
      const int64_t count = std::min(kOutputs, outputs - o);
      const bf16* at = w + o * inputs;
      for (int64_t i = 0; i < (rows < kBufferedRows ? 0 : count * inputs); ++i) buffer[i] = load(at[i]);
      for (int64_t r = 0; r < rows;) {
        const float* row = wide.data() + r * inputs;
        const int64_t taken = rows < kBufferedRows ? std::min<int64_t>(4, rows - r) : std::min<int64_t>(2, rows - r);
        if (rows >= kBufferedRows) {
          taken == 2 ? dots<2, 6>(row, buffer.data(), inputs, count, sums) : dots<1, 6>(row, buffer.data(), inputs, count, sums);
        } else {
          switch (taken) {
            case 4: dots<4, 2>(row, at, inputs, count, sums); break;
            case 3: dots<3, 3>(row, at, inputs, count, sums); break;
            case 2: dots<2, 6>(row, at, inputs, count, sums); break;
            default: dots<1, 6>(row, at, inputs, count, sums);
          }
        }
        for (int64_t k = 0; k < taken; ++k) {
          for (int64_t c = 0; c < count; ++c) {
            const float sum = sums[k][c] + (b == nullptr ? 0.0f : load(b[o + c]));
            const int64_t place = (r + k) * outputs + o + c;
            in_fp32 ? store(as_fp32[place], sum) : store(as_bf16[place], sum);
          }
        }
        r += taken;
      }
    }
  });
  return out;
}

}  // namespace

TORCH_LIBRARY(antiphon, m) {
  m.def("row_linear(Tensor x, Tensor weight, Tensor? bias, bool in_fp32) -> Tensor");
  m.def("rms_norm(Tensor x, Tensor weight, float eps, float shift) -> Tensor");
  m.def("add_rows(Tensor(a!) x, Tensor added) -> ()");
  m.def("add_rms_norm(Tensor(a!) x, Tensor added, Tensor weight, float eps, float shift) -> Tensor");
  m.def(
      "rope_and_cache(Tensor(a!) qkv, Tensor cos, Tensor sin, Tensor positions, Tensor slots, Tensor(b!) k_cache, Tensor(c!) v_cache, "
      "int num_heads, Tensor? q_norm, Tensor? k_norm, float eps, float shift) -> ()");
  m.def("copy_rows(Tensor(a!) to, Tensor source) -> ()");
  m.def("silu_mul(Tensor gate_up) -> Tensor");
  m.def(
      "four_bit_linear(Tensor(a!) out, Tensor x, Tensor codes, Tensor scales, Tensor? lows, int group, int kind) -> ()");
  m.def("large_zeros(int[] sizes, ScalarType dtype) -> Tensor", &large_zeros);
  m.def("populate(Tensor memory, int first, int bytes) -> ()");
  m.def("read_all(Tensor memory) -> int");
  m.def("pin_threads(int[] cores, bool share) -> int", &pin_threads);
}

TORCH_LIBRARY_IMPL(antiphon, CompositeExplicitAutograd, m) {
  m.impl("rms_norm", &rms_norm);
  m.impl("add_rms_norm", &add_rms_norm);
  m.impl("add_rows", &add_rows);
  m.impl("rope_and_cache", &rope_and_cache);
  m.impl("copy_rows", &copy_rows);
  m.impl("silu_mul", &silu_mul);
  m.impl("four_bit_linear", &four_bit_linear);
  m.impl("populate", &populate);
  m.impl("read_all", &read_all);
  m.impl("row_linear", &row_linear);
}
