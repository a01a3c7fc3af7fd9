#include "problem.hpp"

#if defined(__aarch64__) && defined(__linux__) && defined(__ARM_FEATURE_BF16_VECTOR_ARITHMETIC)
#include "column_sweep.hpp"
#include "simd_neon.hpp"

namespace rhythm {
namespace {

// BFDOT multiplies pairs and adds both products to an fp32 sum.
struct Bf16Words : Bf16Pairs {
  template <class S>
  static float32x4_t dot(float32x4_t acc, float32x4_t a, float32x4_t b) {
    return vbfdotq_f32(acc, vreinterpretq_bf16_f32(a), vreinterpretq_bf16_f32(b));
  }
  template <class S>
  static void put_vector(float32x4_t x, float* row, int64_t j) {
    vst1_bf16(reinterpret_cast<bfloat16_t*>(row) + j * 4, vcvt_bf16_f32(x));
  }
};

}  // namespace

const Kernels* neon_bf16_kernels(DType dtype) {
  static constexpr Kernels kernels = kernels_of<Neon, Bf16Words>("neon_bf16");
  return dtype == DType::bfloat16 ? &kernels : neon_kernels(dtype);
}

}  // namespace rhythm
#else
const rhythm::Kernels* rhythm::neon_bf16_kernels(DType) { return nullptr; }
#endif
