// Linear attention's own kernels (hot): the causal convolution over a sequence's last inputs, and the gated delta rule with what
// stands around it: vectors of length one, decays, a norm with a gate.
//
// A prompt is computed in chunks of tokens: of a chunk, q, k, v and decays are made once, and a slice of the state's columns stays in
// the nearest cache while all tokens of the chunk pass over it, each reading and writing it once. The form that solves a triangular
// system per chunk (models/attention/delta_rule.py) has as many products in fp32; this one gives every token the very bits that the
// step of decode gives it, so a result depends neither on where a prompt is cut nor on the rows beside it. Columns of a state are
// summed over its rows in order, each in a lane of its own.
// T rows, C channels, W taps, N heads, K key dims, V value dims. All arithmetic is fp32. The torch path is the reference.

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include "elements.h"
#include "thread_pool.h"

#if defined(__AVX512F__) || (defined(__AVX2__) && defined(__FMA__))
#include <immintrin.h>
#endif

#include <algorithm>
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
using antiphon::load;
using antiphon::store;

namespace {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

// The same product and sum wherever it stands: which of them the compiler would join is not left to it.
inline float madd(float a, float b, float c) {
#if defined(__FMA__) || defined(__ARM_FEATURE_FMA)
  return __builtin_fmaf(a, b, c);
#else
  return a * b + c;
#endif
}

// Lanes of one register, each computing what madd computes.
#if defined(__AVX512F__)
constexpr int64_t kLanes = 16;
using Lanes = __m512;
inline Lanes read(const float* at) { return _mm512_loadu_ps(at); }
inline void write(float* at, Lanes v) { _mm512_storeu_ps(at, v); }
inline Lanes all(float v) { return _mm512_set1_ps(v); }
inline Lanes madd(Lanes a, Lanes b, Lanes c) { return _mm512_fmadd_ps(a, b, c); }
inline Lanes times(Lanes a, Lanes b) { return _mm512_mul_ps(a, b); }
inline Lanes minus(Lanes a, Lanes b) { return _mm512_sub_ps(a, b); }
#elif defined(__AVX2__) && defined(__FMA__)
constexpr int64_t kLanes = 8;
using Lanes = __m256;
inline Lanes read(const float* at) { return _mm256_loadu_ps(at); }
inline void write(float* at, Lanes v) { _mm256_storeu_ps(at, v); }
inline Lanes all(float v) { return _mm256_set1_ps(v); }
inline Lanes madd(Lanes a, Lanes b, Lanes c) { return _mm256_fmadd_ps(a, b, c); }
inline Lanes times(Lanes a, Lanes b) { return _mm256_mul_ps(a, b); }
inline Lanes minus(Lanes a, Lanes b) { return _mm256_sub_ps(a, b); }
#else
constexpr int64_t kLanes = 4;
struct Lanes {
  float v[kLanes];
};
template <typename Of>
inline Lanes each(Of of) {
  Lanes out;
  for (int64_t i = 0; i < kLanes; ++i) out.v[i] = of(i);
  return out;
}
inline Lanes read(const float* at) { return each([=](int64_t i) { return at[i]; }); }
inline void write(float* at, Lanes v) { std::memcpy(at, v.v, sizeof v.v); }
inline Lanes all(float v) { return each([=](int64_t) { return v; }); }
inline Lanes madd(Lanes a, Lanes b, Lanes c) { return each([&](int64_t i) { return madd(a.v[i], b.v[i], c.v[i]); }); }
inline Lanes times(Lanes a, Lanes b) { return each([&](int64_t i) { return a.v[i] * b.v[i]; }); }
inline Lanes minus(Lanes a, Lanes b) { return each([&](int64_t i) { return a.v[i] - b.v[i]; }); }
#endif

constexpr int kRegisters = 4;                       // of a slice: two sums each keep both of a core's units for products busy
constexpr int64_t kSlice = kRegisters * kLanes;     // columns of a state that all tokens of a chunk pass over
constexpr int64_t kChunk = 16;                      // tokens of a chunk
constexpr int64_t kChannels = 64;                   // of a convolution, at once

int64_t padded(int64_t columns) { return (columns + kSlice - 1) / kSlice * kSlice; }

inline float sigmoid(float x) {
  const float e = exp_negative(x < 0.0f ? x : -x);
  return (x < 0.0f ? e : 1.0f) / (1.0f + e);
}

// log(1 + exp(x)): by the series of the inverse hyperbolic tangent, whose next term is below 2e-8 of the sum.
inline float softplus(float x) {
  const float y = exp_negative(x < 0.0f ? x : -x), s = y / (2.0f + y), s2 = s * s;
  float p = 1.0f / 13.0f;
  p = p * s2 + 1.0f / 11.0f;
  p = p * s2 + 1.0f / 9.0f;
  p = p * s2 + 1.0f / 7.0f;
  p = p * s2 + 1.0f / 5.0f;
  p = p * s2 + 1.0f / 3.0f;
  p = p * s2 + 1.0f;
  return (x > 0.0f ? x : 0.0f) + 2.0f * s * p;
}

// Where a step's rows find their states: decodes first, one row each, then chunks of four numbers, (first row, rows, read, write).
struct Places {
  int64_t decodes, chunks;
  const int64_t *read, *write, *chunk;

  Places(const Tensor& read_slots, const Tensor& write_slots, at::IntArrayRef chunk_numbers, int64_t rows, int64_t slots)
      : decodes(read_slots.numel()),
        chunks(static_cast<int64_t>(chunk_numbers.size()) / 4),
        read(read_slots.const_data_ptr<int64_t>()),
        write(write_slots.const_data_ptr<int64_t>()),
        chunk(chunk_numbers.data()) {
    TORCH_CHECK(write_slots.numel() == decodes && chunk_numbers.size() % 4 == 0);
    int64_t row = decodes;
    const auto inside = [=](int64_t slot) { return slot >= 0 && slot < slots; };
    for (int64_t i = 0; i < decodes; ++i) TORCH_CHECK(inside(read[i]) && inside(write[i]), "no such state");
    for (int64_t i = 0; i < chunks; ++i) {
      const int64_t* numbers = chunk + 4 * i;
      TORCH_CHECK(numbers[0] == row && numbers[1] > 0 && inside(numbers[2]) && inside(numbers[3]), "no such rows or states");
      row += numbers[1];
    }
    TORCH_CHECK(row == rows, "rows that are in no chunk");
  }

  // run(first row, rows, slot read, slot written) for all, one after another.
  template <typename Run>
  void each(const Run& run) const {
    for (int64_t i = 0; i < decodes; ++i) run(i, 1, read[i], write[i]);
    for (int64_t i = 0; i < chunks; ++i) run(chunk[4 * i], chunk[4 * i + 1], chunk[4 * i + 2], chunk[4 * i + 3]);
  }
};

// ---- the convolution -------------------------------------------------------------------------------------------------------------

// out[c] = bias[c] + sum over taps of inputs[tap][c] weight[tap][c], all from the channel where they are.
template <typename T>
void convolve(const T* const* inputs, const float* weight, int64_t taps, int64_t stride, const float* bias, bool silu, float* out,
              int64_t channels) {
  float sums[kChannels];
  for (int64_t c = 0; c < channels; ++c) sums[c] = bias == nullptr ? 0.0f : bias[c];
  for (int64_t tap = 0; tap < taps; ++tap) {
    const T* input = inputs[tap];
    const float* w = weight + tap * stride;
#pragma omp simd
    for (int64_t c = 0; c < channels; ++c) sums[c] = madd(load(input[c]), w[c], sums[c]);
  }
  if (silu) {
#pragma omp simd
    for (int64_t c = 0; c < channels; ++c) out[c] = sums[c] * sigmoid(sums[c]);
  } else {
    std::copy(sums, sums + channels, out);
  }
}

// The convolution of x_TC by weight_WC, fp32; tails [slots, W - 1, C] hold the inputs before each sequence's rows, and afterwards its last.
Tensor causal_conv(const Tensor& x, const Tensor& weight, const OptionalTensor& bias, const Tensor& tails, const Tensor& read_slots,
                   const Tensor& write_slots, at::IntArrayRef chunks, bool silu) {
  const int64_t rows = x.size(0), width = x.size(1), taps = weight.size(0), tail = taps - 1, stride = x.stride(0);
  TORCH_CHECK(x.stride(1) == 1 && weight.is_contiguous() && weight.size(1) == width && weight.scalar_type() == at::kFloat && taps >= 2);
  TORCH_CHECK(tails.is_contiguous() && tails.size(1) == tail && tails.size(2) == width && tails.scalar_type() == x.scalar_type());
  TORCH_CHECK(!bias.has_value() || (bias->numel() == width && bias->scalar_type() == at::kFloat && bias->is_contiguous()));
  const Places places(read_slots, write_slots, chunks, rows, tails.size(0));
  Tensor out = at::empty({rows, width}, x.options().dtype(at::kFloat));
  dispatch(x, [&](auto tag) {
    using T = decltype(tag);
    const int64_t blocks = (width + kChannels - 1) / kChannels;
    const int64_t grain = std::max<int64_t>(1, 2048 / (rows * taps));
    antiphon::parallel_for(0, blocks, grain, [&](int64_t begin, int64_t end) {
      std::vector<const T*> inputs(taps);
      for (int64_t block = begin; block < end; ++block) {
        const int64_t c = block * kChannels, channels = std::min(kChannels, width - c);
        places.each([&](int64_t first, int64_t count, int64_t from, int64_t to) {
          const T *before = data<T>(tails) + from * tail * width + c, *row = data<T>(x) + first * stride + c;
          const auto input = [=](int64_t i) { return i < 0 ? before + (i + tail) * width : row + i * stride; };
          for (int64_t t = 0; t < count; ++t) {
            for (int64_t tap = 0; tap < taps; ++tap) inputs[tap] = input(t - tail + tap);
            convolve(inputs.data(), data<float>(weight) + c, taps, width, bias.has_value() ? data<float>(*bias) + c : nullptr, silu,
                     data<float>(out) + (first + t) * width + c, channels);
          }
          T* after = data<T>(tails) + to * tail * width + c;
          for (int64_t i = 0; i < tail; ++i) {  // what is read is behind what was written
            const T* last = input(count - tail + i);
            std::copy(last, last + channels, after + i * width);
          }
        });
      }
    });
  });
  return out;
}

// ---- the rule --------------------------------------------------------------------------------------------------------------------

struct Shape {
  int64_t keys, values, decays;  // K, V, and 1 or K decays

  bool by_channel() const { return decays > 1; }
};

// What the rule takes of one head's tokens, side by side: a thread's own memory. v, u and out are padded to whole slices.
struct Tokens {
  std::vector<float> memory;
  float *q, *k, *faded_k, *decay, *v, *out, *beta, *state, *u;
  int64_t columns;

  void fit(const Shape& s, bool has_chunks) {
    columns = padded(s.values);
    const int64_t tokens = has_chunks ? kChunk : 1;
    const int64_t wanted = tokens * (4 * s.keys + 2 * columns + 1) + columns + (has_chunks ? s.keys * columns : 0);
    if (static_cast<int64_t>(memory.size()) < wanted) memory.resize(wanted);
    float* at = memory.data();
    const auto take = [&](int64_t count) { return std::exchange(at, at + count); };
    q = take(tokens * s.keys), k = take(tokens * s.keys), faded_k = take(tokens * s.keys), decay = take(tokens * s.keys);
    v = take(tokens * columns), out = take(tokens * columns), beta = take(tokens), u = take(columns);
    state = take(has_chunks ? s.keys * columns : 0);
  }

  // k times the decay of its token: what is read of a state before it fades.
  void fade(const Shape& s, int64_t token) {
    const float *key = k + token * s.keys, *a = decay + token * s.keys;
    float* to = faded_k + token * s.keys;
#pragma omp simd
    for (int64_t i = 0; i < s.keys; ++i) to[i] = key[i] * (s.by_channel() ? a[i] : a[0]);
  }
};

// One token: S <- a S, u = beta (v - S^T k), S <- S + k u^T, out = S^T q. Rows of the state are read in the order in which they lie.
void step(const Shape& s, Tokens& x, const float* from, float* to) {
  const int64_t values = s.values;
  float* __restrict u = x.u;
  float* __restrict out = x.out;
  std::fill(u, u + values, 0.0f);
  for (int64_t i = 0; i < s.keys; ++i) {
    const float* row = from + i * values;
    const float k = x.faded_k[i];
#pragma omp simd
    for (int64_t j = 0; j < values; ++j) u[j] = madd(row[j], k, u[j]);
  }
  for (int64_t j = 0; j < values; ++j) u[j] = x.beta[0] * (x.v[j] - u[j]);
  std::fill(out, out + values, 0.0f);
  for (int64_t i = 0; i < s.keys; ++i) {
    const float* row = from + i * values;
    float* written = to + i * values;
    const float a = x.decay[s.by_channel() ? i : 0], k = x.k[i], q = x.q[i];
#pragma omp simd
    for (int64_t j = 0; j < values; ++j) {
      const float entry = madd(k, u[j], a * row[j]);
      written[j] = entry;
      out[j] = madd(entry, q, out[j]);
    }
  }
}

// ``count`` tokens over one slice of the state, [K, kSlice]; columns of v and out from ``first`` on.
template <bool ByChannel>
void pass(const Shape& s, Tokens& x, int64_t count, float* slice, int64_t first) {
  Lanes along[kRegisters], out[kRegisters], u[kRegisters];
  for (auto& each : along) each = all(0.0f);
  for (int64_t i = 0; i < s.keys; ++i) {
    const Lanes k = all(x.faded_k[i]);
    for (int r = 0; r < kRegisters; ++r) along[r] = madd(read(slice + i * kSlice + r * kLanes), k, along[r]);
  }
  for (int64_t t = 0; t < count; ++t) {
    const float *k = x.k + t * s.keys, *q = x.q + t * s.keys, *a = x.decay + t * s.keys;
    const float* next = x.faded_k + std::min(t + 1, count - 1) * s.keys;  // of the last token: its sums are not used
    for (int r = 0; r < kRegisters; ++r) {
      u[r] = times(all(x.beta[t]), minus(read(x.v + t * x.columns + first + r * kLanes), along[r]));
      along[r] = out[r] = all(0.0f);
    }
    const Lanes common = all(a[0]);
    for (int64_t i = 0; i < s.keys; ++i) {
      const Lanes ki = all(k[i]), qi = all(q[i]), ni = all(next[i]), ai = ByChannel ? all(a[i]) : common;
      for (int r = 0; r < kRegisters; ++r) {
        float* at = slice + i * kSlice + r * kLanes;
        const Lanes entry = madd(ki, u[r], times(ai, read(at)));
        write(at, entry);
        out[r] = madd(entry, qi, out[r]);
        along[r] = madd(entry, ni, along[r]);
      }
    }
    for (int r = 0; r < kRegisters; ++r) write(x.out + t * x.columns + first + r * kLanes, out[r]);
  }
}

// Consecutive tokens of one head: take(token of the chunk, row) fills in what the rule takes, give(token, row) has what it gives.
template <typename Take, typename Give>
void advance(const Shape& s, Tokens& x, int64_t first, int64_t count, const float* from, float* to, const Take& take, const Give& give) {
  if (count == 1) {
    take(0, first), x.fade(s, 0);
    step(s, x, from, to);
    give(0, first);
    return;
  }
  for (int64_t i = 0; i < s.keys; ++i) {  // slices one behind another, their last columns zeros
    for (int64_t j = 0; j < x.columns; ++j) {
      x.state[j / kSlice * s.keys * kSlice + i * kSlice + j % kSlice] = j < s.values ? from[i * s.values + j] : 0.0f;
    }
  }
  for (int64_t begin = 0; begin < count; begin += kChunk) {
    const int64_t tokens = std::min(kChunk, count - begin);
    for (int64_t t = 0; t < tokens; ++t) {
      take(t, first + begin + t), x.fade(s, t);
      std::fill(x.v + t * x.columns + s.values, x.v + (t + 1) * x.columns, 0.0f);
    }
    for (int64_t slice = 0; slice < x.columns / kSlice; ++slice) {
      float* at = x.state + slice * s.keys * kSlice;
      s.by_channel() ? pass<true>(s, x, tokens, at, slice * kSlice) : pass<false>(s, x, tokens, at, slice * kSlice);
    }
    for (int64_t t = 0; t < tokens; ++t) give(t, first + begin + t);
  }
  for (int64_t i = 0; i < s.keys; ++i) {
    for (int64_t j = 0; j < s.values; ++j) to[i * s.values + j] = x.state[j / kSlice * s.keys * kSlice + i * kSlice + j % kSlice];
  }
}

// All heads of all rows, with states [slots, N, K, V]. take(tokens, token, row, head) and give(...) as above.
template <typename Take, typename Give>
void run_rule(const Shape& s, int64_t heads, const Places& places, const Tensor& states, const Take& take, const Give& give) {
  float* all_states = data<float>(states);
  const int64_t size = s.keys * s.values;
  const auto run = [&](int64_t head, int64_t first, int64_t count, int64_t from, int64_t to) {
    static thread_local Tokens x;
    x.fit(s, count > 1);
    advance(
        s, x, first, count, all_states + (from * heads + head) * size, all_states + (to * heads + head) * size,
        [&](int64_t token, int64_t row) { take(x, token, row, head); }, [&](int64_t token, int64_t row) { give(x, token, row, head); });
  };
  const int64_t grain = std::max<int64_t>(1, 8192 / size);
  antiphon::parallel_for(0, places.decodes * heads, grain, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) run(i % heads, i / heads, 1, places.read[i / heads], places.write[i / heads]);
  });
  if (places.chunks == 0) return;
  antiphon::parallel_for(0, heads, 1, [&](int64_t begin, int64_t end) {
    for (int64_t head = begin; head < end; ++head) {
      for (int64_t i = 0; i < places.chunks; ++i) {
        const int64_t* numbers = places.chunk + 4 * i;
        run(head, numbers[0], numbers[1], numbers[2], numbers[3]);
      }
    }
  });
}

void check_states(const Tensor& states, int64_t heads, const Shape& s) {
  TORCH_CHECK(states.is_contiguous() && states.scalar_type() == at::kFloat && states.dim() == 4);
  TORCH_CHECK(states.size(1) == heads && states.size(2) == s.keys && states.size(3) == s.values);
}

bool is_fp32(const Tensor& t) { return t.is_contiguous() && t.scalar_type() == at::kFloat; }

// The bare rule over fp32 q and k [T, N, K], v [T, N, V], logarithms of decays g [T, N, 1 or K] and beta [T, N]: out [T, N, V].
Tensor delta_rule(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& g, const Tensor& beta, const Tensor& states,
                  const Tensor& read_slots, const Tensor& write_slots, at::IntArrayRef chunks) {
  const int64_t rows = q.size(0), heads = q.size(1);
  const Shape s{q.size(2), v.size(2), g.size(2)};
  TORCH_CHECK(is_fp32(q) && is_fp32(k) && is_fp32(v) && is_fp32(g) && is_fp32(beta) && (s.decays == 1 || s.decays == s.keys));
  TORCH_CHECK(k.sizes() == q.sizes() && v.size(0) == rows && v.size(1) == heads && g.numel() == rows * heads * s.decays);
  TORCH_CHECK(beta.numel() == rows * heads);
  check_states(states, heads, s);
  const Places places(read_slots, write_slots, chunks, rows, states.size(0));
  Tensor out = at::empty(v.sizes(), v.options());
  run_rule(
      s, heads, places, states,
      [&](Tokens& x, int64_t t, int64_t row, int64_t head) {
        const int64_t at = row * heads + head;
        std::copy_n(data<float>(q) + at * s.keys, s.keys, x.q + t * s.keys);
        std::copy_n(data<float>(k) + at * s.keys, s.keys, x.k + t * s.keys);
        std::copy_n(data<float>(v) + at * s.values, s.values, x.v + t * x.columns);
        for (int64_t i = 0; i < s.decays; ++i) x.decay[t * s.keys + i] = exp_negative(data<float>(g)[at * s.decays + i]);
        x.beta[t] = data<float>(beta)[at];
      },
      [&](Tokens& x, int64_t t, int64_t row, int64_t head) {
        std::copy_n(x.out + t * x.columns, s.values, data<float>(out) + (row * heads + head) * s.values);
      });
  return out;
}

// to = x of length ``length``: x length / sqrt(x x + 1e-6).
void scale_to(const float* x, float length, int64_t dims, float* to) {
  float sum = 0.0f;
#pragma omp simd reduction(+ : sum)
  for (int64_t i = 0; i < dims; ++i) sum += x[i] * x[i];
  const float factor = 1.0f / std::sqrt(sum + 1e-6f);
#pragma omp simd
  for (int64_t i = 0; i < dims; ++i) to[i] = x[i] * factor * length;
}

// All of a layer between its projections: from what the convolution gave, qkv_TC in fp32, the gate z [T, N V], beta [T, N] before its
// sigmoid and decays [T, N] or [T, N K] before bias and softplus, to norm(rule) act(z), [T, N V] in z's format.
Tensor gated_delta(const Tensor& qkv, const Tensor& z, const Tensor& beta, const Tensor& decay, const Tensor& bias, const Tensor& rate,
                   const Tensor& norm, const Tensor& states, const Tensor& read_slots, const Tensor& write_slots, at::IntArrayRef chunks,
                   int64_t num_key_heads, double eps, bool by_sigmoid) {
  const int64_t rows = qkv.size(0), heads = rate.numel(), width = qkv.size(1);
  TORCH_CHECK(is_fp32(qkv) && is_fp32(bias) && is_fp32(rate) && is_fp32(norm) && num_key_heads > 0 && heads % num_key_heads == 0);
  const Shape s{states.size(2), norm.numel(), bias.numel() / heads};
  TORCH_CHECK(width == 2 * num_key_heads * s.keys + heads * s.values && (s.decays == 1 || s.decays == s.keys));
  TORCH_CHECK(z.stride(1) == 1 && z.size(0) == rows && z.size(1) == heads * s.values);
  TORCH_CHECK(beta.stride(1) == 1 && beta.size(0) == rows && beta.size(1) == heads && beta.scalar_type() == z.scalar_type());
  TORCH_CHECK(decay.stride(1) == 1 && decay.size(0) == rows && decay.size(1) == heads * s.decays && decay.scalar_type() == z.scalar_type());
  check_states(states, heads, s);
  const Places places(read_slots, write_slots, chunks, rows, states.size(0));
  const float *inputs = data<float>(qkv), *biases = data<float>(bias), *rates = data<float>(rate), *weight = data<float>(norm);
  const float shorter = 1.0f / std::sqrt(static_cast<float>(s.keys)), shift = static_cast<float>(eps);
  const int64_t share = heads / num_key_heads;
  Tensor result = at::empty({rows, heads * s.values}, z.options());
  dispatch(z, [&](auto tag) {
    using T = decltype(tag);
    run_rule(
        s, heads, places, states,
        [&](Tokens& x, int64_t t, int64_t row, int64_t head) {
          const float* q = inputs + row * width + head / share * s.keys;
          scale_to(q, shorter, s.keys, x.q + t * s.keys);
          scale_to(q + num_key_heads * s.keys, 1.0f, s.keys, x.k + t * s.keys);
          std::copy_n(inputs + row * width + 2 * num_key_heads * s.keys + head * s.values, s.values, x.v + t * x.columns);
          const T* raw = data<T>(decay) + row * decay.stride(0) + head * s.decays;
          float* decays = x.decay + t * s.keys;
#pragma omp simd
          for (int64_t i = 0; i < s.decays; ++i) decays[i] = exp_negative(rates[head] * softplus(load(raw[i]) + biases[head * s.decays + i]));
          x.beta[t] = sigmoid(load(data<T>(beta)[row * beta.stride(0) + head]));
        },
        [&](Tokens& x, int64_t t, int64_t row, int64_t head) {
          const float* out = x.out + t * x.columns;
          float sum = 0.0f;
#pragma omp simd reduction(+ : sum)
          for (int64_t j = 0; j < s.values; ++j) sum += out[j] * out[j];
          const float factor = 1.0f / std::sqrt(sum / static_cast<float>(s.values) + shift);
          const T* gate = data<T>(z) + row * z.stride(0) + head * s.values;
          T* to = data<T>(result) + (row * heads + head) * s.values;
#pragma omp simd
          for (int64_t j = 0; j < s.values; ++j) {
            const float g = load(gate[j]), open = sigmoid(g);
            store(to[j], out[j] * factor * weight[j] * (by_sigmoid ? open : g * open));
          }
        });
  });
  return result;
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(antiphon, m) {
  m.def(
      "causal_conv(Tensor x, Tensor weight, Tensor? bias, Tensor(a!) tails, Tensor read_slots, Tensor write_slots, int[] chunks, bool silu) "
      "-> Tensor");
  m.def(
      "delta_rule(Tensor q, Tensor k, Tensor v, Tensor g, Tensor beta, Tensor(a!) states, Tensor read_slots, Tensor write_slots, "
      "int[] chunks) -> Tensor");
  m.def(
      "gated_delta(Tensor qkv, Tensor z, Tensor beta, Tensor decay, Tensor bias, Tensor rate, Tensor norm, Tensor(a!) states, "
      "Tensor read_slots, Tensor write_slots, int[] chunks, int num_key_heads, float eps, bool by_sigmoid) -> Tensor");
}

TORCH_LIBRARY_IMPL(antiphon, CompositeExplicitAutograd, m) {
  m.impl("causal_conv", &causal_conv);
  m.impl("delta_rule", &delta_rule);
  m.impl("gated_delta", &gated_delta);
}
