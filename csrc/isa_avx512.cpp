#include "problem.hpp"

#if defined(__AVX512F__) && defined(__AVX512DQ__)
#include "column_sweep.hpp"
#include "simd_avx512.hpp"

namespace rhythm {

const Kernels* avx512_kernels(DType) {
  static constexpr Kernels kernels = kernels_of<Avx512, Fp32Words>("avx512");
  return &kernels;
}

}  // namespace rhythm
#else
const rhythm::Kernels* rhythm::avx512_kernels(DType) { return nullptr; }
#endif
