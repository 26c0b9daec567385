// What kernels on Intel's matrix units (AMX, bfloat16) share: tile set-up, conversions, an exponential (hot).
//
// A tile is 16 rows of 64 bytes. C(16x16 fp32) += A(16 rows x 32 bf16) * B(16 pairs of rows x 16 columns, pairs interleaved).
// Products of one tile are summed in a fixed order, so a row's result depends neither on the rows beside it nor on threads.

#pragma once

#include <ATen/core/Tensor.h>
#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <cstdint>
#include <cstring>
#include <new>

namespace antiphon {

using at::Tensor;
using bits16 = uint16_t;  // a bfloat16's bits

constexpr int64_t kLanes = 16;  // fp32 values in a register, rows and columns of a tile
constexpr int64_t kDepth = 32;  // bf16 values in a register and in a row of a tile
constexpr int64_t kTile = kLanes * kDepth;

inline int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Ask the kernel for the tile registers; false where the processor has none.
inline bool enable_tiles() {
  constexpr int kRequestPermission = 0x1023, kTileData = 18;
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
}

// The compiler's tile intrinsics do not say which memory they touch: order ordinary writes before tile loads and tile stores
// before ordinary reads.
inline void order_memory() { asm volatile("" ::: "memory"); }

// Shapes of the eight tile registers of this thread: rows by register, all 64 bytes wide.
struct TileShapes {
  uint8_t palette = 1, start = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {};
  uint8_t rows[16] = {};

  explicit TileShapes(std::initializer_list<int> each) {
    int i = 0;
    for (const int count : each) {
      row_bytes[i] = 64;
      rows[i++] = static_cast<uint8_t>(count);
    }
  }
  // Written out: the compiler's own intrinsic claims to read eight of the bytes only.
  void load() const { asm volatile("ldtilecfg %0" ::"m"(*this)); }
};
static_assert(sizeof(TileShapes) == 64);

inline __m512 widen(__m256i v) { return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(v), 16)); }
inline __m512 load16(const bits16* p) { return widen(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))); }
inline __m512 load16(const bits16* p, __mmask16 m) { return widen(_mm256_maskz_loadu_epi16(m, p)); }
inline __m256i narrow(__m512 v) { return (__m256i)_mm512_cvtneps_pbh(v); }
inline void store16(bits16* p, __m512 v) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), narrow(v)); }
inline void store16(bits16* p, __m512 v, __mmask16 m) { _mm256_mask_storeu_epi16(p, m, narrow(v)); }
inline __mmask16 first_lanes(int64_t count) { return static_cast<__mmask16>(count >= 16 ? 0xffff : (1u << count) - 1u); }

// 2^x, relative error below 3e-7; 0 below -150, NaN stays NaN.
inline __m512 exp2(__m512 x) {
  x = _mm512_max_ps(_mm512_set1_ps(-150.0f), x);  // the second operand where one is NaN
  const __m512 n = _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  const __m512 f = _mm512_sub_ps(x, n);
  __m512 p = _mm512_set1_ps(1.5403530e-4f);
  p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(1.3333558e-3f));
  p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(9.6181291e-3f));
  p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(5.5504109e-2f));
  p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(2.4022651e-1f));
  p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(6.9314718e-1f));
  p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(1.0f));
  return _mm512_scalef_ps(p, n);
}

constexpr float kLog2E = 1.44269504088896341f;

// x * sigmoid(x)
inline __m512 silu(__m512 x) {
  const __m512 e = exp2(_mm512_mul_ps(x, _mm512_set1_ps(-kLog2E)));
  const __m512 d = _mm512_add_ps(_mm512_set1_ps(1.0f), e);
  const __m512 r = _mm512_rcp14_ps(d);
  const __m512 refined = _mm512_mul_ps(r, _mm512_fnmadd_ps(d, r, _mm512_set1_ps(2.0f)));
  // d is infinite where x is very negative: its reciprocal is 0, and the step after it would be 0 * inf.
  const __mmask16 finite = _mm512_cmp_ps_mask(d, _mm512_set1_ps(3e38f), _CMP_NGT_UQ);
  return _mm512_mul_ps(x, _mm512_maskz_mov_ps(finite, refined));
}

inline bits16* data16(const Tensor& t) { return static_cast<bits16*>(const_cast<void*>(t.const_data_ptr())); }

}  // namespace antiphon
