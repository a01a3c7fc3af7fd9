// NEON of arm64: four floats per vector, a 10×8 register tile.
#pragma once

#include <arm_neon.h>

#include <cstdint>

namespace rhythm {
namespace {

struct Neon {
  using V = float32x4_t;
  static constexpr int lanes = 4;
  static constexpr int tile_rows = 10;  // 20 sums, 2 vectors of the panel and 10 words of the rows: more would spill

  static V zero() { return vdupq_n_f32(0.0f); }
  static V set1(float x) { return vdupq_n_f32(x); }
  static V load(const float* p) { return vld1q_f32(p); }
  static void store(float* p, V x) { vst1q_f32(p, x); }
  static V iota() { return V{0, 1, 2, 3}; }

  static V add(V a, V b) { return vaddq_f32(a, b); }
  static V sub(V a, V b) { return vsubq_f32(a, b); }
  static V mul(V a, V b) { return vmulq_f32(a, b); }
  static V fma(V a, V b, V c) { return vfmaq_f32(c, a, b); }
  static V div(V a, V b) { return vdivq_f32(a, b); }
  // vmaxq_f32 and vminq_f32 would be NaN where either is.
  static V max(V a, V b) { return vbslq_f32(vcgtq_f32(a, b), a, b); }  // b where either is NaN
  static V min(V a, V b) { return vbslq_f32(vcltq_f32(a, b), a, b); }  // b where either is NaN
  static V where_nonnegative(V d, V x, V other) { return vbslq_f32(vcgezq_f32(d), x, other); }
  static V where_between(V d, V lo, V hi, V x) { return keep(vandq_u32(vcgeq_f32(d, lo), vcleq_f32(d, hi)), x); }
  static float sum(V x) { return vaddvq_f32(x); }
  static float max_of(V x) { return vmaxvq_f32(x); }

  // 2^x; below −126 it is 0, NaN stays NaN. The polynomial is that of simd_avx512.hpp; 2^128 has the bits of infinity.
  static V exp2(V x) {
    const V least = vminq_f32(x, set1(128.0f));  // NaN where x is, and so is f; its exponent is then 0, so it stays NaN
    const V whole = vrndmq_f32(least);
    const V f = sub(least, whole);
    V p = fma(set1(0.00186713005f), f, set1(0.00901703071f));
    p = fma(p, f, set1(0.0557999127f));
    p = fma(p, f, set1(0.240164444f));
    p = fma(p, f, set1(0.693151295f));
    p = fma(p, f, set1(1.0f));
    const int32x4_t exponent = vshlq_n_s32(vcvtq_s32_f32(whole), 23);
    p = vreinterpretq_f32_s32(vaddq_s32(vreinterpretq_s32_f32(p), exponent));
    return keep(vmvnq_u32(vcltq_f32(x, set1(-126.0f))), p);
  }

 private:
  // x where the mask is set, else 0.
  static V keep(uint32x4_t mask, V x) { return vreinterpretq_f32_u32(vandq_u32(mask, vreinterpretq_u32_f32(x))); }
};

}  // namespace
}  // namespace rhythm
