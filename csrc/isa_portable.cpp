#include "column_sweep.hpp"
#include "simd_portable.hpp"

namespace rhythm {

const Kernels* portable_kernels(DType) {
  static constexpr Kernels kernels = kernels_of<Portable, Fp32Words>("portable");
  return &kernels;
}

}  // namespace rhythm
