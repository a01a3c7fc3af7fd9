// One sweep over the keys for a block of rows: lse, row spans and WAAD, and the attention output where it is wanted.
//
// It is flash attention's online softmax with two sums besides Σ p: Σ p·(t − s), and on the tiles near the diagonal
// Σ p·(W − (t − s)) over t − s < W, since Σ A·min(t − s, W) = W − Σ_{t−s<W} A·(W − (t − s)) for rows that sum to 1.
// In rows t < W no distance exceeds W: their WAAD is Σ A·(t − s), since a difference from a large W would lose digits.
// Exponents are differences of products, scaled: the largest is exactly 0, however large the scale.
// With a sliding window only panels that some row of a block sees are visited. A sink joins Σ p at the end; rows of A then
// sum to m = Σ p / (Σ p + sink) and WAAD is m·W − ….
// On request: the entropy, by one more sum, Σ p·log p; the mass of the first keys, which is Σ p as it was after them.
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

// What the answers on request need of one row besides.
template <class S>
struct More {
  typename S::V log_sum;  // Σ p·log2 p
  struct Mass {           // of the keys before a limit, relative to the largest product there was then
    typename S::V sum;
    float max;
  } mass[2];  // before p.first, and of the prompt
};

template <class S>
constexpr int64_t tile_words = S::tile_rows * row_stride;

template <class S>
constexpr int64_t row_words = S::tile_rows * int64_t{(sizeof(Row<S>) + sizeof(More<S>)) / sizeof(float)};

constexpr int64_t sweep_blocks = 16;  // row blocks that share a pass over the keys

// Scratch memory per thread of the row sweep: scores, probabilities as words, and for each row block its queries, output
// and states.
template <class S>
int64_t row_sweep_words(const Problem& p) {
  return 2 * tile_words<S> + sweep_blocks * ((p.out ? 2 : 1) * tile_words<S> + row_words<S>);
}

// One online-softmax step for row t over the scores of `vectors` vectors of keys from `key`.
// Returns the factor by which the previous sums were rescaled. near: some keys may lie above the diagonal or within the
// window. values: probabilities are written to `words`. logs: `log_sum`, Σ p·log2 p, is kept too.
template <class S, class Words, bool near, bool values, bool logs>
inline float online_softmax_step(Row<S>& row, typename S::V& log_sum, float* score, float* words, int vectors,
                                 int64_t t, int64_t key, float scale, float window) {
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
    const float before = row.max;
    shrink = row.max == -INFINITY ? 0.0f : std::exp2((row.max - candidate) * scale);
    row.max = candidate;
    const V factor = S::set1(shrink);
    if (logs) {
      // Each log2 p falls by as much. Where that is beyond 1000 the factor is 0: the limit keeps 0 from meeting an infinity.
      const float fall = shrink == 0.0f ? -1000.0f : (before - candidate) * scale;
      log_sum = S::mul(S::fma(S::set1(fall), row.sum, log_sum), factor);
    }
    row.sum = S::mul(row.sum, factor);
    row.distance_sum = S::mul(row.distance_sum, factor);
    row.window_sum = S::mul(row.window_sum, factor);
  }
  // While every score so far is −inf any finite reference will do; the probabilities are 0.
  const V reference = S::set1(row.max == -INFINITY ? 0.0f : row.max), scales = S::set1(scale);
  V sum = row.sum, distance_sum = row.distance_sum, logs_of_p = logs ? log_sum : S::zero();
  distance = first;
  for (int j = 0; j < vectors; ++j) {
    const V log_p = S::mul(S::sub(S::load(score + j * S::lanes), reference), scales);
    const V p = S::exp2(log_p);
    if (logs) logs_of_p = S::fma(p, S::max(log_p, S::set1(-1000.0f)), logs_of_p);  // 0·−∞ would be NaN
    sum = S::add(sum, p);
    distance_sum = S::fma(p, distance, distance_sum);
    if (near) row.window_sum = S::fma(p, S::max(S::sub(S::set1(window), distance), S::zero()), row.window_sum);
    if (values) Words::template put_vector<S>(p, words, j);
    distance = S::sub(distance, step);
  }
  row.sum = sum;
  row.distance_sum = distance_sum;
  if (logs) log_sum = logs_of_p;
  return shrink;
}

// Σ p over the first `count` scores of a row.
template <class S>
typename S::V first_sum(const float* score, int64_t count, float max, float scale) {
  using V = typename S::V;
  const V reference = S::set1(max == -INFINITY ? 0.0f : max), scales = S::set1(scale);
  V sum = S::zero();
  for (int64_t j = 0; j < count; j += S::lanes) {
    const V p = S::exp2(S::mul(S::sub(S::load(score + j), reference), scales));
    sum = S::add(sum, S::where_between(S::iota(), S::zero(), S::set1(static_cast<float>(count - 1 - j)), p));
  }
  return sum;
}

// Keeps the mass before `limit`, after a step over `keys` keys from `key`: the sum so far while all of them lie before it.
// earlier, shrink: the row's sum before the step, and the factor by which the step rescaled it.
template <class S>
void keep_mass(typename More<S>::Mass& mass, int64_t limit, const Row<S>& row, typename S::V earlier, float shrink,
               const float* score, int64_t key, int64_t keys, float scale) {
  if (key >= limit) return;
  mass.max = row.max;
  mass.sum = key + keys <= limit
                 ? row.sum
                 : S::add(S::mul(earlier, S::set1(shrink)), first_sum<S>(score, limit - key, row.max, scale));
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

// Writes what was asked for of a finished row: of a response row all, of one of the prompt its largest score.
template <class S>
void finish_answers(const Problem& p, const Sequence& s, int64_t at, int64_t t, const Row<S>& row, const More<S>& more,
                    float sum, float total, bool defined) {
  const bool response = t >= s.prompt;
  const float largest = row.max * std::fabs(p.scale);
  if (p.max_logit && (response || p.prompt_rows)) p.max_logit[at] = defined ? largest : NAN;
  if (!response) return;
  // A = p·top, log A = log p + log_top.
  const bool given = p.given_lse != nullptr;
  const float log_top = given ? largest - p.given_lse[at] : -std::log(total);
  const float top = row.max == -INFINITY ? 0.0f : given ? std::exp(log_top) : 1.0f / total;
  const auto answer = [&](float* to, float value) {
    if (to) to[at] = !defined ? NAN : top == 0.0f ? 0.0f : value;
  };
  const auto mass = [&](const typename More<S>::Mass& kept) {
    const float shrink = std::exp2((kept.max - row.max) * log2_scale(p));
    return kept.max == -INFINITY ? 0.0f : top * (S::sum(kept.sum) * shrink);
  };
  answer(p.top1, top);
  answer(p.entropy, -top * (S::sum(more.log_sum) * 0.693147181f + sum * log_top));
  answer(p.first_mass, mass(more.mass[0]));
  answer(p.prompt_mass, mass(more.mass[1]));
}

// Writes the statistics and the output of a finished row.
template <class S>
void finish_row(const Problem& p, const Sequence& s, int64_t head, int64_t t, const Row<S>& row, const More<S>& more,
                const float* output) {
  const int64_t at = head * p.tokens + s.start + t;
  const float sum = S::sum(row.sum);
  const Denominator by = denominator_of<S>(p, head, row, sum);
  bool defined = by.defined;
  if (t >= s.prompt) {
    // Where a given lse is not finite, the row is undefined.
    if (p.given_lse) defined = defined && is_finite(p.given_lse[at]);
    const float window = static_cast<float>(p.windows[0]);
    const float held = p.sinks ? window * (sum / by.total) : window;
    p.row_span[at] = defined ? S::sum(row.distance_sum) / by.total : NAN;
    p.waad[at] = !defined                   ? NAN
                 : p.holds(p.windows[0], t) ? S::sum(row.distance_sum) / by.total
                                            : held - S::sum(row.window_sum) / by.total;
    p.lse[at] = defined ? by.lse : NAN;
    p.row_max[at] = by.max;
    p.row_log2_sum[at] = defined ? by.log2_total : NAN;
  }
  if (p.answers()) finish_answers<S>(p, s, at, t, row, more, sum, by.total, defined);
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

template <class S, class Words, bool values, bool logs>
void row_sweep(const Problem& p, const RowTask& task, float* workspace) {
  constexpr int rows = S::tile_rows, panel = panel_of<S>, per_word = Words::per_word;
  const Sequence& s = p.sequence[task.sequence];
  const int64_t key_head = task.head_begin / p.group();
  const int64_t steps = ceil_div(p.head_size, per_word), columns = ceil_div(p.head_size, panel);
  const int64_t per_head = ceil_div(task.row_end - task.row_begin, rows);
  const int64_t blocks = per_head * (task.head_end - task.head_begin);
  const float scale = log2_scale(p), window = static_cast<float>(p.windows[0]);
  const auto first_panel_key = [&](int64_t t) { return p.first_key(t) / panel * panel; };

  float* const score = workspace;
  float* const words = score + tile_words<S>;
  float* const queries = words + tile_words<S>;
  float* const outputs = queries + sweep_blocks * tile_words<S>;
  Row<S>* const states = reinterpret_cast<Row<S>*>(values ? outputs + sweep_blocks * tile_words<S> : outputs);
  More<S>* const mores = reinterpret_cast<More<S>*>(states + sweep_blocks * rows);
  const bool masses = p.first_mass || p.prompt_mass;

  const auto head_of = [&](int64_t b) { return task.head_begin + b / per_head; };
  const auto first_row = [&](int64_t b) { return task.row_begin + b % per_head * rows; };
  const auto row_count = [&](int64_t b) { return least(rows, task.row_end - first_row(b)); };

  for (int64_t b = 0; b < blocks; ++b) {
    load_queries<S, Words>(p, task.sequence, head_of(b), first_row(b), row_count(b), queries + b * tile_words<S>);
    for (int r = 0; r < rows; ++r) {
      states[b * rows + r] = Row<S>{S::zero(), S::zero(), S::zero(), -INFINITY};
      mores[b * rows + r] = More<S>{S::zero(), {{S::zero(), -INFINITY}, {S::zero(), -INFINITY}}};
    }
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
      const bool near = key + keys > t0 - p.windows[0] + 1;
      float* const output = outputs + b * tile_words<S>;
      for (int64_t r = 0; r < count; ++r) {
        Row<S>& row = states[b * rows + r];
        float* const line = score + r * row_stride;
        float* const weights = words + r * row_stride;
        const int64_t t = t0 + r;
        // Beyond the sliding window: a few keys of the first panels.
        for (int64_t j = 0; j < least(p.first_key(t) - key, vectors * S::lanes); ++j) line[j] = -INFINITY;
        More<S>& more = mores[b * rows + r];
        const typename S::V earlier = row.sum;
        const float shrink = near ? online_softmax_step<S, Words, true, values, logs>(row, more.log_sum, line, weights,
                                                                                      vectors, t, key, scale, window)
                                  : online_softmax_step<S, Words, false, values, logs>(row, more.log_sum, line, weights,
                                                                                       vectors, t, key, scale, window);
        if (masses) {
          keep_mass<S>(more.mass[0], p.first, row, earlier, shrink, line, key, keys, scale);
          keep_mass<S>(more.mass[1], s.prompt, row, earlier, shrink, line, key, keys, scale);
        }
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
      finish_row<S>(p, s, head_of(b), first_row(b) + r, states[b * rows + r], mores[b * rows + r],
                    outputs + b * tile_words<S> + r * row_stride);
}

template <class S, class Words>
void sweep_rows(const Problem& p, const RowTask& task, float* workspace) {
  const auto sweep = p.out ? (p.entropy ? row_sweep<S, Words, true, true> : row_sweep<S, Words, true, false>)
                           : (p.entropy ? row_sweep<S, Words, false, true> : row_sweep<S, Words, false, false>);
  sweep(p, task, workspace);
}

}  // namespace
}  // namespace rhythm
