#include "problem.hpp"

#if defined(__AVX512F__) && defined(__AVX512DQ__) && defined(__AVX512BF16__)
#include "column_sweep.hpp"
#include "simd_avx512.hpp"

namespace rhythm {
namespace {

// vdpbf16ps multiplies pairs and adds both products to an fp32 sum.
struct Bf16Words : Bf16Pairs {
  template <class S>
  static __m512 dot(__m512 acc, __m512 a, __m512 b) {
    return _mm512_dpbf16_ps(acc, (__m512bh)a, (__m512bh)b);
  }
  template <class S>
  static void put_vector(__m512 x, float* row, int64_t j) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(row) + j, (__m256i)_mm512_cvtneps_pbh(x));
  }
};

}  // namespace

const Kernels* avx512_bf16_kernels(DType dtype) {
  static constexpr Kernels kernels = kernels_of<Avx512, Bf16Words>("avx512_bf16");
  return dtype == DType::bfloat16 ? &kernels : avx512_kernels(dtype);
}

}  // namespace rhythm
#else
const rhythm::Kernels* rhythm::avx512_bf16_kernels(DType) { return nullptr; }
#endif
