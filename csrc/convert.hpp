// Converts elements of the three input types to and from fp32, in loops that the compiler can vectorize.
#pragma once

#include <cstdint>
#include <cstring>

#include "problem.hpp"

namespace rhythm {
namespace {

struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

inline float bits_to_float(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}
inline uint32_t float_to_bits(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  return bits;
}

inline bool is_finite(float x) { return (float_to_bits(x) & 0x7f800000u) != 0x7f800000u; }

inline float to_float(float x) { return x; }
inline float to_float(BFloat16 x) { return bits_to_float(static_cast<uint32_t>(x.bits) << 16); }
inline float to_float(Float16 x) {
  // The exponent is rebiased by a product, which also turns subnormal halves into normal floats.
  const uint32_t magnitude = x.bits & 0x7fffu;
  const uint32_t finite = float_to_bits(bits_to_float(magnitude << 13) * 0x1p112f);
  const uint32_t value = magnitude >= 0x7c00u ? (magnitude << 13) | 0x7f800000u : finite;
  return bits_to_float(value | (static_cast<uint32_t>(x.bits & 0x8000u) << 16));
}

inline void from_float(float x, float& y) { y = x; }
inline void from_float(float x, BFloat16& y) {
  const uint32_t bits = float_to_bits(x);
  const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;  // to nearest, ties to even
  y.bits = static_cast<uint16_t>(x != x ? 0x7fc0u : rounded);
}
inline void from_float(float x, Float16& y) {
  const uint32_t sign = (float_to_bits(x) >> 16) & 0x8000u;
  const float magnitude = bits_to_float(float_to_bits(x) & 0x7fffffffu);
  uint32_t value;
  if (!(magnitude == magnitude)) {
    value = 0x7e00u;
  } else if (magnitude >= 65520.0f) {
    value = 0x7c00u;
  } else if (magnitude < 0x1p-14f) {
    // Subnormal: adding ½ puts the rounding at the last place of a half's subnormals, 2^−24.
    value = float_to_bits(magnitude + 0.5f) - float_to_bits(0.5f);
  } else {
    const uint32_t bits = float_to_bits(magnitude);
    value = (bits - 0x38000000u + 0xfffu + ((bits >> 13) & 1u)) >> 13;
  }
  y.bits = static_cast<uint16_t>(sign | value);
}

// Calls f with a null pointer of the element type of `dtype`.
template <class F>
inline void with_element_type(DType dtype, F&& f) {
  switch (dtype) {
    case DType::float32: return f(static_cast<const float*>(nullptr));
    case DType::float16: return f(static_cast<const Float16*>(nullptr));
    case DType::bfloat16: return f(static_cast<const BFloat16*>(nullptr));
  }
}

// The first element of row (sequence, token, head) of an operand.
template <class T>
inline const T* row_of(const Operand& x, int64_t sequence, int64_t token, int64_t head) {
  return static_cast<const T*>(x.data) + x.offset[sequence] + token * x.token + head * x.head;
}

}  // namespace
}  // namespace rhythm
