#include "problem.hpp"

#if defined(__AVX2__) && defined(__FMA__)
#include "column_sweep.hpp"
#include "simd_avx2.hpp"

namespace rhythm {

const Kernels* avx2_kernels(DType) {
  static constexpr Kernels kernels = kernels_of<Avx2, Fp32Words>("avx2");
  return &kernels;
}

}  // namespace rhythm
#else
const rhythm::Kernels* rhythm::avx2_kernels(DType) { return nullptr; }
#endif
