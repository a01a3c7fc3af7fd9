// AVX-512 (F, BW, DQ, VL): sixteen floats per vector, a 12×32 register tile.
#pragma once

#include <immintrin.h>

#include <cstdint>

namespace rhythm {
namespace {

struct Avx512 {
  using V = __m512;
  static constexpr int lanes = 16;
  static constexpr int tile_rows = 12;

  static V zero() { return _mm512_setzero_ps(); }
  static V set1(float x) { return _mm512_set1_ps(x); }
  static V load(const float* p) { return _mm512_loadu_ps(p); }
  static void store(float* p, V x) { _mm512_storeu_ps(p, x); }
  static V iota() { return _mm512_setr_ps(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15); }

  static V add(V a, V b) { return _mm512_add_ps(a, b); }
  static V sub(V a, V b) { return _mm512_sub_ps(a, b); }
  static V mul(V a, V b) { return _mm512_mul_ps(a, b); }
  static V fma(V a, V b, V c) { return _mm512_fmadd_ps(a, b, c); }
  static V div(V a, V b) { return _mm512_div_ps(a, b); }
  static V max(V a, V b) { return _mm512_max_ps(a, b); }  // b where either is NaN
  static V min(V a, V b) { return _mm512_min_ps(a, b); }  // b where either is NaN
  static V where_nonnegative(V d, V x, V other) {
    return _mm512_mask_blend_ps(_mm512_cmp_ps_mask(d, zero(), _CMP_GE_OQ), other, x);
  }
  static V where_between(V d, V lo, V hi, V x) {
    const __mmask16 above = _mm512_cmp_ps_mask(d, lo, _CMP_GE_OQ);
    return _mm512_maskz_mov_ps(_mm512_mask_cmp_ps_mask(above, d, hi, _CMP_LE_OQ), x);
  }
  static float sum(V x) { return _mm512_reduce_add_ps(x); }
  static float max_of(V x) { return _mm512_reduce_max_ps(x); }

  // 2^x; −inf gives 0, NaN stays NaN. 2^(x − ⌊x⌋) by a minimax polynomial (relative error 9e-8), times 2^⌊x⌋.
  static V exp2(V x) {
    const V f = _mm512_reduce_ps(x, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);
    V p = fma(set1(0.00186713005f), f, set1(0.00901703071f));
    p = fma(p, f, set1(0.0557999127f));
    p = fma(p, f, set1(0.240164444f));
    p = fma(p, f, set1(0.693151295f));
    p = fma(p, f, set1(1.0f));
    return _mm512_scalef_ps(p, x);
  }
};

}  // namespace
}  // namespace rhythm
