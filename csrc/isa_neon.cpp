#include "problem.hpp"

#if defined(__aarch64__)
#include "column_sweep.hpp"
#include "simd_neon.hpp"

namespace rhythm {

const Kernels* neon_kernels(DType) {
  static constexpr Kernels kernels = kernels_of<Neon, Fp32Words>("neon");
  return &kernels;
}

}  // namespace rhythm
#else
const rhythm::Kernels* rhythm::neon_kernels(DType) { return nullptr; }
#endif
