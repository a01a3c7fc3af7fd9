// Packed operands and the register tile that multiplies them.
//
// Operands are 32-bit words. A word holds one fp32, or two bf16 that a single instruction multiplies and adds
// (`Words::per_word`). A packed panel holds `panel` = 2·lanes columns: words[step][panel].
#pragma once

#include <cmath>
#include <cstdint>
#include <limits>
#include <type_traits>

#include "convert.hpp"
#include "problem.hpp"

namespace rhythm {
namespace {

constexpr int key_block = 256;        // keys per step of a row block; their scores fit into the first-level cache
constexpr int row_stride = 256 + 16;  // words between rows of a tile operand; not a power of two

inline void clear(float* words, int64_t count) { std::memset(words, 0, static_cast<size_t>(count) * sizeof(float)); }
// The absolute scale of base-2 exponents. A finite scale stays finite, since a difference of 0 must stay 0.
inline float log2_scale(const Problem& p) {
  const float magnitude = std::fabs(p.scale), scale = magnitude * 1.44269504f;
  return std::isinf(scale) && !std::isinf(magnitude) ? std::numeric_limits<float>::max() : scale;
}
inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
inline int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t most(int64_t a, int64_t b) { return a > b ? a : b; }

struct Fp32Words {
  static constexpr int per_word = 1;
  template <class S>
  static typename S::V dot(typename S::V acc, typename S::V a, typename S::V b) {
    return S::fma(a, b, acc);
  }
  using Element = float;
  // sign: 0, or the sign bit of a float to flip.
  template <class T>
  static Element encode(T x, uint32_t sign) {
    return bits_to_float(float_to_bits(to_float(x)) ^ sign);
  }
  static float decode(Element x) { return x; }
  template <class S>
  static void put_vector(typename S::V x, float* row, int64_t j) {
    S::store(row + j * S::lanes, x);
  }
};

// Two bf16 per word, without the instructions for them.
struct Bf16Pairs {
  static constexpr int per_word = 2;
  using Element = uint16_t;
  template <class T>
  static Element encode(T x, uint32_t sign) {
    BFloat16 y;
    from_float(to_float(x), y);
    return encode(y, sign);
  }
  static Element encode(BFloat16 x, uint32_t sign) { return static_cast<Element>(x.bits ^ (sign >> 16)); }
  static float decode(Element x) { return to_float(BFloat16{x}); }
};

template <class S>
constexpr int panel_of = 2 * S::lanes;

// c[tile_rows][panel] = (accumulate ? c : 0) + a[tile_rows][steps]·b[steps][panel]; rows of a and c are row_stride apart.
template <class S, class Words, bool accumulate>
inline void multiply_tile(const float* a, const float* b, int64_t steps, float* c) {
  using V = typename S::V;
  constexpr int rows = S::tile_rows, lanes = S::lanes;
  V acc[rows][2];
#pragma GCC unroll 12
  for (int r = 0; r < rows; ++r) {
    acc[r][0] = accumulate ? S::load(c + r * row_stride) : S::zero();
    acc[r][1] = accumulate ? S::load(c + r * row_stride + lanes) : S::zero();
  }
  for (int64_t step = 0; step < steps; ++step) {
    const V b0 = S::load(b), b1 = S::load(b + lanes);
#pragma GCC unroll 12
    for (int r = 0; r < rows; ++r) {
      const V x = S::set1(a[r * row_stride]);
      acc[r][0] = Words::template dot<S>(acc[r][0], x, b0);
      acc[r][1] = Words::template dot<S>(acc[r][1], x, b1);
    }
    a += 1;
    b += 2 * lanes;
  }
#pragma GCC unroll 12
  for (int r = 0; r < rows; ++r) {
    S::store(c + r * row_stride, acc[r][0]);
    S::store(c + r * row_stride + lanes, acc[r][1]);
  }
}

// tanh, as x·P(x²) / Q(x²) fitted to |x| ≤ 9, beyond which it is 1 in fp32: relative error 2.5e-7. NaN stays NaN.
template <class S>
inline typename S::V tanh_of(typename S::V x) {
  using V = typename S::V;
  x = S::min(S::set1(9.0f), S::max(S::set1(-9.0f), x));
  const V y = S::mul(x, x);
  V p = S::fma(S::set1(-1.22462708e-11f), y, S::set1(3.0642564e-08f));
  p = S::fma(p, y, S::set1(2.80313252e-05f));
  p = S::fma(p, y, S::set1(0.00386950863f));
  p = S::fma(p, y, S::set1(0.136808574f));
  p = S::fma(p, y, S::set1(1.0f));
  V q = S::fma(S::set1(1.28903616e-06f), y, S::set1(0.000394071481f));
  q = S::fma(q, y, S::set1(0.0272501595f));
  q = S::fma(q, y, S::set1(0.470141888f));
  q = S::fma(q, y, S::set1(1.0f));
  return S::div(S::mul(x, p), q);
}

// Replaces the products of `rows` rows of a tile, `vectors` vectors each, by tanh(product·cap_scale).
template <class S>
inline void cap(float* products, int64_t rows, int64_t vectors, float cap_scale) {
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t j = 0; j < vectors; ++j) {
      float* const at = products + r * row_stride + j * S::lanes;
      S::store(at, tanh_of<S>(S::mul(S::load(at), S::set1(cap_scale))));
    }
}

// Words per packed panel: of keys, one step per word of the head size; of values, in whole panels of columns.
template <class S, class Words>
int64_t panel_words(const Problem& p, bool values) {
  const int64_t keys = ceil_div(p.head_size, Words::per_word) * panel_of<S>;
  return values ? ceil_div(p.head_size, panel_of<S>) * panel_of<S> * (panel_of<S> / Words::per_word) : keys;
}

template <class S, class Words>
const float* key_panel(const Problem& p, const Sequence& s, int64_t key_head, int64_t panel) {
  return p.packed_k + (key_head * p.panels + s.first_panel + panel) * panel_words<S, Words>(p, false);
}

// The values of one sequence and head: [column panel][key word][panel], with all keys of a column panel in sequence.
template <class S, class Words>
float* value_columns(const Problem& p, const Sequence& s, int64_t key_head, int64_t column_panel) {
  const int64_t keys = ceil_div(s.length, panel_of<S>) * panel_of<S>;
  return p.packed_v + (key_head * p.panels + s.first_panel) * panel_words<S, Words>(p, true) +
         column_panel * (keys / Words::per_word) * panel_of<S>;
}

// Encodes `count` elements, `stride` apart, to elements of words, `step` apart.
template <class Words, class T>
inline void encode_row(const T* __restrict row, int64_t stride, int64_t count, uint32_t sign,
                       typename Words::Element* __restrict out, int64_t step) {
  if (stride == 1 && step == 1)
    for (int64_t d = 0; d < count; ++d) out[d] = Words::encode(row[d], sign);
  else
    for (int64_t d = 0; d < count; ++d) out[d * step] = Words::encode(row[d * stride], sign);
}

template <class S, class Words>
void pack(const Problem& p, const PackTask& task) {
  using Element = typename Words::Element;
  constexpr int panel = panel_of<S>, per_word = Words::per_word;
  const Sequence& s = p.sequence[task.sequence];
  const int64_t steps = ceil_div(p.head_size, per_word), columns = ceil_div(p.head_size, panel);
  with_element_type(p.dtype, [&](auto* type) {
    using T = std::remove_const_t<std::remove_pointer_t<decltype(type)>>;
    for (int64_t n = task.panel_begin; n < task.panel_end; ++n) {
      const int64_t keys = least(panel, s.length - n * panel);
      // Keys: [step][key][element of the word].
      float* words = const_cast<float*>(key_panel<S, Words>(p, s, task.key_head, n));
      if (keys < panel || p.head_size % per_word) clear(words, steps * panel);
      for (int64_t j = 0; j < keys; ++j) {
        const T* row = row_of<T>(p.k, task.sequence, n * panel + j, task.key_head);
        for (int e = 0; e < per_word; ++e)
          encode_row<Words>(row + e * p.k.dim, per_word * p.k.dim, (p.head_size - e + per_word - 1) / per_word, 0,
                            reinterpret_cast<Element*>(words) + j * per_word + e, panel * per_word);
      }
      if (p.v.data == nullptr) continue;
      // Values, one column panel after the other: [word of keys][column][element of the word].
      for (int64_t c = 0; c < columns; ++c) {
        words = value_columns<S, Words>(p, s, task.key_head, c) + n * panel / per_word * panel;
        clear(words, panel / per_word * panel);
        const int64_t width = least(panel, p.head_size - c * panel);
        for (int64_t j = 0; j < keys; ++j) {
          const T* row = row_of<T>(p.v, task.sequence, n * panel + j, task.key_head) + c * panel * p.v.dim;
          Element* const packed = reinterpret_cast<Element*>(words + j / per_word * panel) + j % per_word;
          encode_row<Words>(row, p.v.dim, width, 0, packed, per_word);
          bool finite = true;
          for (int64_t d = 0; d < width; ++d) finite &= is_finite(to_float(row[d * p.v.dim]));
          if (finite) continue;
          // A tile would multiply it by the 0 of rows before its key; add_not_finite adds it to the others.
          p.not_finite[task.key_head * p.panels + s.first_panel + n] = 1;
          for (int64_t d = 0; d < width; ++d)
            if (!is_finite(to_float(row[d * p.v.dim]))) packed[d * per_word] = Element{};
        }
      }
    }
  });
}

// `rows` query rows from `row_begin`, as the left operand of a tile; rows beyond them are zero.
template <class S, class Words>
void load_queries(const Problem& p, int64_t sequence, int64_t head, int64_t row_begin, int64_t rows, float* a) {
  using Element = typename Words::Element;
  const int64_t steps = ceil_div(p.head_size, Words::per_word);
  // q takes the sign of the scale, exact in any type, so that the largest product is the largest score.
  const uint32_t sign = p.scale < 0 ? 0x80000000u : 0u;
  with_element_type(p.dtype, [&](auto* type) {
    using T = std::remove_const_t<std::remove_pointer_t<decltype(type)>>;
    for (int64_t r = 0; r < S::tile_rows; ++r) {
      float* words = a + r * row_stride;
      if (r >= rows || p.head_size % Words::per_word) clear(words, steps);
      if (r >= rows) continue;
      const T* row = row_of<T>(p.q, sequence, row_begin + r, head);
      Element* const packed = reinterpret_cast<Element*>(words);
      encode_row<Words>(row, p.q.dim, p.head_size, sign, packed, 1);
      if (p.flat)
        for (int64_t d = 0; d < p.head_size; ++d) packed[d] = Words::encode(to_float(row[d * p.q.dim]) * 0.0f, 0);
    }
  });
}

}  // namespace
}  // namespace rhythm
