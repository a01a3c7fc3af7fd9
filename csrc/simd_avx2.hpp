// AVX2 with FMA: eight floats per vector, a 6×16 register tile.
#pragma once

#include <immintrin.h>

#include <cstdint>

namespace rhythm {
namespace {

struct Avx2 {
  using V = __m256;
  static constexpr int lanes = 8;
  static constexpr int tile_rows = 6;

  static V zero() { return _mm256_setzero_ps(); }
  static V set1(float x) { return _mm256_set1_ps(x); }
  static V load(const float* p) { return _mm256_loadu_ps(p); }
  static void store(float* p, V x) { _mm256_storeu_ps(p, x); }
  static V iota() { return _mm256_setr_ps(0, 1, 2, 3, 4, 5, 6, 7); }

  static V add(V a, V b) { return _mm256_add_ps(a, b); }
  static V sub(V a, V b) { return _mm256_sub_ps(a, b); }
  static V mul(V a, V b) { return _mm256_mul_ps(a, b); }
  static V fma(V a, V b, V c) { return _mm256_fmadd_ps(a, b, c); }
  static V div(V a, V b) { return _mm256_div_ps(a, b); }
  static V max(V a, V b) { return _mm256_max_ps(a, b); }  // b where either is NaN
  static V min(V a, V b) { return _mm256_min_ps(a, b); }  // b where either is NaN
  static V where_nonnegative(V d, V x, V other) {
    return _mm256_blendv_ps(other, x, _mm256_cmp_ps(d, zero(), _CMP_GE_OQ));
  }
  static V where_between(V d, V lo, V hi, V x) {
    return _mm256_and_ps(x, _mm256_and_ps(_mm256_cmp_ps(d, lo, _CMP_GE_OQ), _mm256_cmp_ps(d, hi, _CMP_LE_OQ)));
  }
  static float sum(V x) {
    __m128 h = _mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
    h = _mm_add_ps(h, _mm_movehl_ps(h, h));
    return _mm_cvtss_f32(_mm_add_ss(h, _mm_movehdup_ps(h)));
  }
  static float max_of(V x) {
    __m128 h = _mm_max_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
    h = _mm_max_ps(h, _mm_movehl_ps(h, h));
    return _mm_cvtss_f32(_mm_max_ss(h, _mm_movehdup_ps(h)));
  }

  // 2^x; below −126 it is 0, NaN stays NaN. The polynomial is that of simd_avx512.hpp; 2^128 has the bits of infinity.
  static V exp2(V x) {
    const V least = _mm256_min_ps(x, set1(128.0f));
    const V whole = _mm256_round_ps(least, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);
    const V f = sub(least, whole);
    V p = fma(set1(0.00186713005f), f, set1(0.00901703071f));
    p = fma(p, f, set1(0.0557999127f));
    p = fma(p, f, set1(0.240164444f));
    p = fma(p, f, set1(0.693151295f));
    p = fma(p, f, set1(1.0f));
    const __m256i exponent = _mm256_slli_epi32(_mm256_cvttps_epi32(whole), 23);
    p = _mm256_castsi256_ps(_mm256_add_epi32(_mm256_castps_si256(p), exponent));
    const V tiny = _mm256_cmp_ps(x, set1(-126.0f), _CMP_LT_OQ);
    const V nan = _mm256_cmp_ps(x, x, _CMP_UNORD_Q);
    return _mm256_blendv_ps(_mm256_andnot_ps(tiny, p), x, nan);
  }
};

}  // namespace
}  // namespace rhythm
