// exp without a library call, the same bits in every kernel. Must not know: what is weighed by it.
#pragma once

#include <bit>
#include <cmath>
#include <cstdint>

namespace antiphon {

// exp for arguments <= 0, relative error below 2e-7 (Cephes' polynomial after range reduction); 0 below -87.
inline float exp_negative(float x) {
  const float bounded = x < -87.0f ? -87.0f : x;
  const float n = std::nearbyint(bounded * 1.44269504088896341f);
  const float r = (bounded - n * 0.693359375f) + n * 2.12194440e-4f;
  float p = 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  const float scale = std::bit_cast<float>(static_cast<uint32_t>(static_cast<int32_t>(n) + 127) << 23);
  return x < -87.0f ? 0.0f : p * scale;
}

}  // namespace antiphon
