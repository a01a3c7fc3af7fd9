// Any processor that GCC or Clang compiles for: four floats per vector, by the compilers' vector extension.
#pragma once

#include <cstdint>

namespace rhythm {
namespace {

struct Portable {
  using V = float __attribute__((vector_size(16)));
  using I = int32_t __attribute__((vector_size(16)));
  static constexpr int lanes = 4;
  static constexpr int tile_rows = 6;

  static V zero() { return V{0, 0, 0, 0}; }
  static V set1(float x) { return V{x, x, x, x}; }
  static V load(const float* p) {
    V x;
    __builtin_memcpy(&x, p, sizeof x);
    return x;
  }
  static void store(float* p, V x) { __builtin_memcpy(p, &x, sizeof x); }
  static V iota() { return V{0, 1, 2, 3}; }

  static V add(V a, V b) { return a + b; }
  static V sub(V a, V b) { return a - b; }
  static V mul(V a, V b) { return a * b; }
  static V fma(V a, V b, V c) { return a * b + c; }
  static V div(V a, V b) { return a / b; }
  static V max(V a, V b) { return select(a > b, a, b); }  // b where either is NaN
  static V min(V a, V b) { return select(a < b, a, b); }  // b where either is NaN
  static V where_nonnegative(V d, V x, V other) { return select(d >= zero(), x, other); }
  static V where_between(V d, V lo, V hi, V x) { return select((d >= lo) & (d <= hi), x, zero()); }
  static float sum(V x) { return (x[0] + x[2]) + (x[1] + x[3]); }
  static float max_of(V x) {
    float m = x[0];
    for (int i = 1; i < lanes; ++i) m = x[i] > m ? x[i] : m;
    return m;
  }

  // 2^x; below −126 it is 0, NaN stays NaN. The polynomial is that of simd_avx512.hpp; 2^128 has the bits of infinity.
  static V exp2(V x) {
    const V least = select(x <= set1(128.0f), x, set1(128.0f));
    const V safe = select(least >= set1(-126.0f), least, set1(-126.0f));
    const I truncated = __builtin_convertvector(safe, I);
    const V toward_zero = __builtin_convertvector(truncated, V);
    const I whole = truncated + (toward_zero > safe);  // a true comparison is −1: ⌊x⌋
    const V f = safe - __builtin_convertvector(whole, V);
    V p = fma(set1(0.00186713005f), f, set1(0.00901703071f));
    p = fma(p, f, set1(0.0557999127f));
    p = fma(p, f, set1(0.240164444f));
    p = fma(p, f, set1(0.693151295f));
    p = fma(p, f, set1(1.0f));
    p = (V)((I)p + whole * (1 << 23));
    p = select(x < set1(-126.0f), zero(), p);
    return select(x == x, p, x);
  }

 private:
  static V select(I mask, V a, V b) { return (V)((mask & (I)a) | (~mask & (I)b)); }
};

}  // namespace
}  // namespace rhythm
