// Draws a token per row from logits (hot): temperature, top-k, top-p, min-p, one uniform number per row, without sorting the vocabulary;
// and leaves of logits what a grammar allows, read from its packed bits.
//
// Weights e = exp((logit - max) / temperature) are positive floats, whose bits order as they do: a histogram over the leading bits
// finds the bucket that a cut falls into, and only that bucket is sorted. A row's token depends on its own row alone.
// R rows, V vocabulary. The torch path in worker/sampler.py is the reference.

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <vector>

#include "elements.h"
#include "thread_pool.h"

using antiphon::exp_negative;

namespace {

using at::Tensor;

constexpr int kShift = 20;                     // a bucket: sign, exponent and three bits of mantissa
constexpr int64_t kBuckets = (127 << 3) + 1;  // weights are at most 1

inline int64_t bucket_of(float weight) { return std::bit_cast<uint32_t>(weight) >> kShift; }

struct Row {
  std::vector<float> weights;
  std::vector<int64_t> counts;
  std::vector<double> masses;
  std::vector<int32_t> members;

  // Weights of one bucket, largest first, equal ones in order of their index.
  void sort_bucket(int64_t bucket) {
    members.clear();
    for (size_t i = 0; i < weights.size(); ++i) {
      if (bucket_of(weights[i]) == bucket) members.push_back(static_cast<int32_t>(i));
    }
    std::stable_sort(members.begin(), members.end(), [&](int32_t a, int32_t b) { return weights[a] > weights[b]; });
  }

  void count() {
    counts.assign(kBuckets, 0);
    masses.assign(kBuckets, 0.0);
    for (const float w : weights) {
      const int64_t bucket = bucket_of(w);
      ++counts[bucket];
      masses[bucket] += w;
    }
  }

  // Zero what is below the k-th largest weight.
  void keep_largest(int64_t k) {
    count();
    int64_t bucket = kBuckets - 1;
    for (; bucket > 0 && counts[bucket] < k; --bucket) k -= counts[bucket];
    sort_bucket(bucket);
    const float least = weights[members[std::min<int64_t>(k, members.size()) - 1]];
    for (float& w : weights) w = w < least ? 0.0f : w;
  }

  // Zero what is not in the smallest set of largest weights that holds ``share`` of the mass.
  void keep_mass(double share) {
    count();
    double total = 0.0;
    for (const double mass : masses) total += mass;
    double left = share * total;  // a weight stays while the larger ones hold less than this
    int64_t bucket = kBuckets - 1;
    for (; bucket > 0 && masses[bucket] < left; --bucket) left -= masses[bucket];
    sort_bucket(bucket);
    size_t kept = 0;
    for (; kept < members.size() && left > 0.0; ++kept) left -= weights[members[kept]];
    for (size_t i = kept; i < members.size(); ++i) weights[members[i]] = 0.0f;
    for (float& w : weights) w = bucket_of(w) < bucket ? 0.0f : w;
  }

  int64_t draw(const float* logits, int64_t vocabulary, float temperature, int64_t top_k, double top_p, float min_p, double uniform) {
    weights.resize(vocabulary);
    float best = logits[0];
#pragma omp simd reduction(max : best)
    for (int64_t i = 0; i < vocabulary; ++i) best = logits[i] > best ? logits[i] : best;
    const float inverse = 1.0f / temperature;
    float* w = weights.data();
#pragma omp simd
    for (int64_t i = 0; i < vocabulary; ++i) w[i] = exp_negative((logits[i] - best) * inverse);
    if (top_k > 0 && top_k < vocabulary) keep_largest(top_k);
    if (top_p < 1.0) keep_mass(top_p);
    if (min_p > 0.0f) {
#pragma omp simd
      for (int64_t i = 0; i < vocabulary; ++i) w[i] = w[i] < min_p ? 0.0f : w[i];
    }
    double total = 0.0;
    for (int64_t i = 0; i < vocabulary; ++i) total += w[i];
    const double point = uniform * total;
    double passed = 0.0;
    int64_t last = 0;
    for (int64_t i = 0; i < vocabulary; ++i) {
      if (w[i] == 0.0f) continue;
      passed += w[i];
      if (passed > point) return i;
      last = i;
    }
    return last;  // rounding at the very end of the distribution
  }
};

inline bool is_plain(const Tensor& logits) { return logits.is_contiguous() && logits.scalar_type() == at::kFloat && logits.device().is_cpu(); }

// Tokens of the given rows of logits_RV (fp32): settings_S4 (fp64) holds temperature, top-p, min-p and the uniform number.
// A row from R on is one of ``changed``, which stand apart so that nobody copies the batch to add them.
Tensor draw(const Tensor& logits, at::TensorList changed, const Tensor& rows, const Tensor& settings, const Tensor& top_k) {
  const int64_t vocabulary = logits.size(1), count = rows.numel(), unchanged = logits.size(0);
  TORCH_CHECK(is_plain(logits) && settings.is_contiguous());
  for (const Tensor& each : changed) TORCH_CHECK(is_plain(each) && each.numel() == vocabulary);
  const int64_t *row = rows.const_data_ptr<int64_t>(), *k = top_k.const_data_ptr<int64_t>();
  const double* s = settings.const_data_ptr<double>();
  Tensor out = at::empty({count}, rows.options());
  int64_t* to = out.data_ptr<int64_t>();
  antiphon::parallel_for(0, count, 1, [&](int64_t begin, int64_t end) {
    static thread_local Row state;
    for (int64_t i = begin; i < end; ++i) {
      const float* from = row[i] < unchanged ? logits.const_data_ptr<float>() + row[i] * vocabulary
                                             : changed[row[i] - unchanged].const_data_ptr<float>();
      to[i] = state.draw(from, vocabulary, static_cast<float>(s[4 * i]), k[i], s[4 * i + 1], static_cast<float>(s[4 * i + 2]),
                         s[4 * i + 3]);
    }
  });
  return out;
}

// A copy of logits_V (fp32) with -inf where a token's bit is 0. Bits: lowest first, of bytes in order. Of what a grammar allows, most
// words are all ones (inside a string) or all zeros (outside): those are only copied or filled.
Tensor keep_allowed(const Tensor& logits, const Tensor& bits) {
  constexpr int64_t kWord = 32;
  constexpr float kNever = -std::numeric_limits<float>::infinity();
  static_assert(std::endian::native == std::endian::little, "bytes are read as words");
  const int64_t vocabulary = logits.numel();
  TORCH_CHECK(is_plain(logits) && bits.is_contiguous() && bits.scalar_type() == at::kByte && 8 * bits.numel() >= vocabulary);
  Tensor out = at::empty({vocabulary}, logits.options());
  const float* from = logits.const_data_ptr<float>();
  const uint8_t* bytes = bits.const_data_ptr<uint8_t>();
  float* to = out.data_ptr<float>();
  int64_t at = 0;
  for (; at + kWord <= vocabulary; at += kWord) {
    uint32_t word;
    std::memcpy(&word, bytes + at / 8, sizeof word);
    if (word == 0) {
      std::fill_n(to + at, kWord, kNever);
    } else if (word == ~uint32_t{0}) {
      std::memcpy(to + at, from + at, kWord * sizeof(float));
    } else {
#pragma omp simd
      for (int32_t i = 0; i < kWord; ++i) to[at + i] = (word >> i) & 1u ? from[at + i] : kNever;
    }
  }
  for (; at < vocabulary; ++at) to[at] = (bytes[at / 8] >> (at % 8)) & 1u ? from[at] : kNever;
  return out;
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(antiphon, m) {
  m.def("draw(Tensor logits, Tensor[] changed, Tensor rows, Tensor settings, Tensor top_k) -> Tensor");
  m.def("keep_allowed(Tensor logits, Tensor bits) -> Tensor");
}

TORCH_LIBRARY_IMPL(antiphon, CompositeExplicitAutograd, m) {
  m.impl("draw", &draw);
  m.impl("keep_allowed", &keep_allowed);
}
