// What kernels' elements are, fp32 or bf16 of which all arithmetic is fp32, and exp without a library call, the same bits in every
// kernel. Must not know: what is computed.
#pragma once

#include <ATen/core/Tensor.h>

#include <bit>
#include <cmath>
#include <cstdint>

namespace antiphon {

struct bf16 {
  uint16_t bits;
};

inline float load(float v) { return v; }
inline float load(bf16 v) { return std::bit_cast<float>(static_cast<uint32_t>(v.bits) << 16); }
inline void store(float& to, float v) { to = v; }
inline void store(bf16& to, float v) {
  const uint32_t bits = std::bit_cast<uint32_t>(v);
  const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  // NaN must stay NaN: rounding could carry its mantissa away.
  to.bits = static_cast<uint16_t>((bits & 0x7fffffffu) > 0x7f800000u ? (bits >> 16) | 0x40u : rounded);
}

template <typename T>
T* data(const at::Tensor& t) {
  return static_cast<T*>(const_cast<void*>(t.const_data_ptr()));
}

// body(an element of ``t``'s type).
template <typename Body>
void dispatch(const at::Tensor& t, Body body) {
  TORCH_CHECK(t.device().is_cpu(), "antiphon kernels run on CPU tensors");
  if (t.scalar_type() == at::kFloat) {
    body(float{});
  } else {
    TORCH_CHECK(t.scalar_type() == at::kBFloat16, "antiphon kernels take float32 or bfloat16");
    body(bf16{});
  }
}

// exp(x) / 2^n, of a number or of lanes, where n is x / ln 2 to the nearest: Cephes' polynomial after range reduction.
template <typename V>
inline V exp_over_power(V x, V n) {
  const V r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
  V p = V{} + 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  return p * r * r + r + 1.0f;
}

// exp for arguments <= 0, relative error below 2e-7; 0 below -87.
inline float exp_negative(float x) {
  const float bounded = x < -87.0f ? -87.0f : x;
  const float n = std::nearbyint(bounded * 1.44269504088896341f), p = exp_over_power(bounded, n);
  const float scale = std::bit_cast<float>(static_cast<uint32_t>(static_cast<int32_t>(n) + 127) << 23);
  return x < -87.0f ? 0.0f : p * scale;
}

}  // namespace antiphon
