// One sweep over the keys for a block of rows: lse, row spans and WAAD, and the attention output where it is wanted.
//
// It is flash attention's online softmax with two sums besides Σ p: Σ p·(t − s), and on the tiles near the diagonal
// Σ p·(W − (t − s)) over t − s < W, since Σ A·min(t − s, W) = W − Σ_{t−s<W} A·(W − (t − s)) for rows that sum to 1.
// In rows t < W no distance exceeds W: their WAAD is Σ A·(t − s), since a difference from a large W would lose digits.
// Exponents are differences of products, scaled: the largest is exactly 0, however large the scale.
// With a sliding window only panels that some row of a block sees are visited. A sink joins Σ p at the end; rows of A then
// sum to m = Σ p / (Σ p + sink) and WAAD is m·W − ….
#pragma once

#include <cmath>

#include "tile.hpp"

namespace rhythm {
namespace {

// The running softmax of one row. Each lane has its own partial sums until the end.
template <class S>
struct Row {
  typename S::V sum;           // Σ p
  typename S::V distance_sum;  // Σ p·(t − s)
  typename S::V window_sum;    // Σ p·(W − (t − s)) over the window
  float max;                   // the largest product, unscaled
};

template <class S>
constexpr int64_t tile_words = S::tile_rows * row_stride;

template <class S>
constexpr int64_t row_words = S::tile_rows * int64_t{sizeof(Row<S>) / sizeof(float)};

constexpr int64_t sweep_blocks = 16;  // row blocks that share a pass over the keys

// Scratch memory per thread: scores, probabilities as words, and for each row block its queries, output and states.
template <class S, class Words>
int64_t workspace_words(const Problem& p) {
  return 2 * tile_words<S> + sweep_blocks * ((p.out ? 2 : 1) * tile_words<S> + row_words<S>);
}

// One online-softmax step for row t over the scores of `vectors` vectors of keys from `key`.
// Returns the factor by which the previous sums were rescaled. near: some keys may lie above the diagonal or within the
// window. values: probabilities are written to `words`.
template <class S, class Words, bool near, bool values>
inline float online_softmax_step(Row<S>& row, float* score, float* words, int vectors, int64_t t, int64_t key,
                                 float scale, float window) {
  using V = typename S::V;
  const V step = S::set1(static_cast<float>(S::lanes));
  const V first = S::sub(S::set1(static_cast<float>(t - key)), S::iota());
  V largest = S::set1(-INFINITY), distance = first;
  for (int j = 0; j < vectors; ++j) {
    V x = S::load(score + j * S::lanes);
    if (near) {
      x = S::where_nonnegative(distance, x, S::set1(-INFINITY));
      S::store(score + j * S::lanes, x);
      distance = S::sub(distance, step);
    }
    largest = S::max(largest, x);
  }
  float shrink = 1.0f;
  const float candidate = S::max_of(largest);
  if (candidate > row.max) {
    shrink = row.max == -INFINITY ? 0.0f : std::exp2((row.max - candidate) * scale);
    row.max = candidate;
    const V factor = S::set1(shrink);
    row.sum = S::mul(row.sum, factor);
    row.distance_sum = S::mul(row.distance_sum, factor);
    row.window_sum = S::mul(row.window_sum, factor);
  }
  // While every score so far is −inf any finite reference will do; the probabilities are 0.
  const V reference = S::set1(row.max == -INFINITY ? 0.0f : row.max), scales = S::set1(scale);
  V sum = row.sum, distance_sum = row.distance_sum;
  distance = first;
  for (int j = 0; j < vectors; ++j) {
    const V p = S::exp2(S::mul(S::sub(S::load(score + j * S::lanes), reference), scales));
    sum = S::add(sum, p);
    distance_sum = S::fma(p, distance, distance_sum);
    if (near) row.window_sum = S::fma(p, S::max(S::sub(S::set1(window), distance), S::zero()), row.window_sum);
    if (values) Words::template put_vector<S>(p, words, j);
    distance = S::sub(distance, step);
  }
  row.sum = sum;
  row.distance_sum = distance_sum;
  return shrink;
}

// What divides the sums of a finished row: A = 2^((product − max)·scale·log2 e − log2_total).
struct Denominator {
  float total, max, log2_total, lse;  // total: relative to the row's largest score; infinite if the sink outweighs all
  bool defined;                       // else a score is NaN or +inf, or all are −inf and there is no sink
};

template <class S>
Denominator denominator_of(const Problem& p, int64_t head, const Row<S>& row, float sum) {
  const float largest = row.max * std::fabs(p.scale), sink = p.sinks ? p.sinks[head] : -INFINITY;
  if (sink == -INFINITY) return {sum, row.max, std::log2(sum), largest + std::log(sum), sum > 0 && is_finite(largest)};
  constexpr float log2_e = 1.44269504f;
  if (row.max == -INFINITY) return {1.0f, 0.0f, sink * log2_e, sink, sum == 0 && is_finite(sink)};
  const bool defined = sum > 0 && is_finite(largest) && is_finite(sink);
  const float above = sink - largest, total = sum + std::exp(above);
  if (above <= 0) return {total, row.max, std::log2(total), largest + std::log(total), defined};
  const float rest = std::log1p(sum * std::exp(-above));
  return {total, row.max, (above + rest) * log2_e, sink + rest, defined};
}

// Writes the statistics and the output of a finished row.
template <class S>
void finish_row(const Problem& p, const Sequence& s, int64_t head, int64_t t, const Row<S>& row, const float* output) {
  const int64_t at = head * p.tokens + s.start + t;
  const float sum = S::sum(row.sum);
  const Denominator by = denominator_of<S>(p, head, row, sum);
  bool defined = by.defined;
  if (t >= s.prompt) {
    // Where a given lse is not finite, the row is undefined.
    if (p.given_lse) defined = defined && is_finite(p.given_lse[at]);
    const float held = p.sinks ? static_cast<float>(p.window) * (sum / by.total) : static_cast<float>(p.window);
    p.row_span[at] = defined ? S::sum(row.distance_sum) / by.total : NAN;
    p.waad[at] = !defined              ? NAN
                 : p.window_holds(t) ? S::sum(row.distance_sum) / by.total
                                       : held - S::sum(row.window_sum) / by.total;
    p.lse[at] = defined ? by.lse : NAN;
    p.row_max[at] = by.max;
    p.row_log2_sum[at] = defined ? by.log2_total : NAN;
  }
  if (p.out == nullptr) return;
  with_element_type(p.dtype, [&](auto* type) {
    using T = std::remove_const_t<std::remove_pointer_t<decltype(type)>>;
    T* out = static_cast<T*>(p.out) + ((s.out_start + t) * p.query_heads + head) * p.head_size;
    for (int64_t d = 0; d < p.head_size; ++d) from_float(defined ? output[d] / by.total : NAN, out[d]);
  });
}

// Adds the products with elements of v that are not finite to the output of `count` rows from t0, for `keys` keys from
// `key`. Packed values hold 0 in their place, so that they don't reach rows before their key. words: the rows'
// probabilities.
template <class S, class Words>
void add_not_finite(const Problem& p, const RowTask& task, int64_t key_head, int64_t t0, int64_t count, int64_t key,
                    int64_t keys, const float* words, float* output) {
  constexpr int panel = panel_of<S>;
  const Sequence& s = p.sequence[task.sequence];
  const uint8_t* flags = p.not_finite + key_head * p.panels + s.first_panel + key / panel;
  for (int64_t n = 0; n * panel < keys; ++n) {
    if (!flags[n]) continue;
    with_element_type(p.dtype, [&](auto* type) {
      using T = std::remove_const_t<std::remove_pointer_t<decltype(type)>>;
      for (int64_t j = n * panel; j < least((n + 1) * panel, keys); ++j) {
        const T* value = row_of<T>(p.v, task.sequence, key + j, key_head);
        for (int64_t d = 0; d < p.head_size; ++d) {
          const float x = to_float(value[d * p.v.dim]);
          if (is_finite(x)) continue;
          for (int64_t r = most(0, key + j - t0); r < least(count, key + j + p.sliding_window - t0); ++r) {
            const auto* row = reinterpret_cast<const typename Words::Element*>(words + r * row_stride);
            output[r * row_stride + d] += Words::decode(row[j]) * x;
          }
        }
      }
    });
  }
}

template <class S, class Words, bool values>
void row_sweep(const Problem& p, const RowTask& task, float* workspace) {
  constexpr int rows = S::tile_rows, panel = panel_of<S>, per_word = Words::per_word;
  const Sequence& s = p.sequence[task.sequence];
  const int64_t key_head = task.head_begin / p.group();
  const int64_t steps = ceil_div(p.head_size, per_word), columns = ceil_div(p.head_size, panel);
  const int64_t per_head = ceil_div(task.row_end - task.row_begin, rows);
  const int64_t blocks = per_head * (task.head_end - task.head_begin);
  const float scale = log2_scale(p), window = static_cast<float>(p.window);
  const auto first_panel_key = [&](int64_t t) { return p.first_key(t) / panel * panel; };

  float* const score = workspace;
  float* const words = score + tile_words<S>;
  float* const queries = words + tile_words<S>;
  float* const outputs = queries + sweep_blocks * tile_words<S>;
  Row<S>* const states = reinterpret_cast<Row<S>*>(values ? outputs + sweep_blocks * tile_words<S> : outputs);

  const auto head_of = [&](int64_t b) { return task.head_begin + b / per_head; };
  const auto first_row = [&](int64_t b) { return task.row_begin + b % per_head * rows; };
  const auto row_count = [&](int64_t b) { return least(rows, task.row_end - first_row(b)); };

  for (int64_t b = 0; b < blocks; ++b) {
    load_queries<S, Words>(p, task.sequence, head_of(b), first_row(b), row_count(b), queries + b * tile_words<S>);
    for (int r = 0; r < rows; ++r) states[b * rows + r] = Row<S>{S::zero(), S::zero(), S::zero(), -INFINITY};
    if (values)
      for (int64_t i = 0; i < tile_words<S>; ++i) outputs[b * tile_words<S> + i] = 0.0f;
  }

  for (int64_t block_key = first_panel_key(task.row_begin); block_key < task.row_end; block_key += key_block) {
    for (int64_t b = 0; b < blocks; ++b) {
      const int64_t t0 = first_row(b), count = row_count(b), key = most(block_key, first_panel_key(t0));
      const int64_t keys = least(block_key + key_block, t0 + count) - key;
      if (keys <= 0) continue;
      for (int64_t n = 0; n * panel < keys; ++n)
        multiply_tile<S, Words, false>(queries + b * tile_words<S>,
                                       key_panel<S, Words>(p, s, key_head, key / panel + n), steps, score + n * panel);
      const int vectors = static_cast<int>(ceil_div(keys, S::lanes));
      if (p.softcap > 0) cap<S>(score, count, vectors, p.cap_scale);
      const bool near = key + keys > t0 - p.window + 1;
      float* const output = outputs + b * tile_words<S>;
      for (int64_t r = 0; r < count; ++r) {
        Row<S>& row = states[b * rows + r];
        float* const line = score + r * row_stride;
        float* const weights = words + r * row_stride;
        const int64_t t = t0 + r;
        // Beyond the sliding window: a few keys of the first panels.
        for (int64_t j = 0; j < least(p.first_key(t) - key, vectors * S::lanes); ++j) line[j] = -INFINITY;
        const float shrink =
            near ? online_softmax_step<S, Words, true, values>(row, line, weights, vectors, t, key, scale, window)
                 : online_softmax_step<S, Words, false, values>(row, line, weights, vectors, t, key, scale, window);
        if (values && shrink != 1.0f)
          for (int64_t d = 0; d < columns * panel; ++d) output[r * row_stride + d] *= shrink;
      }
      if (!values) continue;
      for (int64_t c = 0; c < columns; ++c)
        multiply_tile<S, Words, true>(words, value_columns<S, Words>(p, s, key_head, c) + key / per_word * panel,
                                      ceil_div(vectors * S::lanes, per_word), output + c * panel);
      add_not_finite<S, Words>(p, task, key_head, t0, count, key, keys, words, output);
    }
  }

  for (int64_t b = 0; b < blocks; ++b)
    for (int64_t r = 0; r < row_count(b); ++r)
      finish_row<S>(p, s, head_of(b), first_row(b) + r, states[b * rows + r],
                    outputs + b * tile_words<S> + r * row_stride);
}

template <class S, class Words>
void sweep_rows(const Problem& p, const RowTask& task, float* workspace) {
  if (p.out)
    row_sweep<S, Words, true>(p, task, workspace);
  else
    row_sweep<S, Words, false>(p, task, workspace);
}

}  // namespace
}  // namespace rhythm
