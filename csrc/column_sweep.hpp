// FAI for known weights, or another sum or the largest of a key's weights, key-stationary: a task owns keys and visits the
// rows whose horizons reach them. For a lse that came from outside, tasks also compute the WAADs of their rows, from the keys
// within the windows. No sum is shared between tasks, so results don't depend on their order.
#pragma once

#include <algorithm>
#include <cmath>

#include "row_sweep.hpp"

namespace rhythm {
namespace {

// Whether any key of a vector lies at a distance within [lo, hi] from the row; the first key lies at `distance`.
template <class S>
inline bool touches(float distance, float lo, float hi) {
  return distance >= lo && distance - static_cast<float>(S::lanes - 1) <= hi;
}

// What turns products of one row into weights: A = 2^((product − max)·scale − log2_sum). factor: the row's own weight.
struct RowWeights {
  float max, scale, log2_sum, factor;
  template <class S>
  typename S::V of(typename S::V product) const {
    return S::exp2(S::fma(S::sub(product, S::set1(max)), S::set1(scale), S::set1(-log2_sum)));
  }
};

// Adds the weights of one row for one panel of keys to the column sums, or puts them into the largest ones. inside: all keys
// are within the horizon.
template <class S, bool inside, bool largest>
inline void add_columns(const float* product, float* columns, RowWeights weights, float distance, float lo, float hi) {
  using V = typename S::V;
  const V factor = S::set1(weights.factor);
  for (int half = 0; half < 2; ++half) {
    const int at = half * S::lanes;
    const float first = distance - static_cast<float>(at);
    if (!inside && !touches<S>(first, lo, hi)) continue;
    const V x = weights.of<S>(S::load(product + at)), before = S::load(columns + at);
    const V d = S::sub(S::set1(first), S::iota());
    V after;
    if (largest) {
      // NaN stays in either: max takes its second operand then, and the square of a NaN is not ≥ 0.
      const V weighed = S::mul(x, factor);
      after = S::where_nonnegative(S::mul(weighed, weighed), S::max(weighed, before), weighed);
      if (!inside) {
        after = S::where_nonnegative(S::sub(d, S::set1(lo)), after, before);
        after = S::where_nonnegative(S::sub(S::set1(hi), d), after, before);
      }
    } else {
      // The product before the mask: a factor that is NaN stays within the horizon.
      after = inside ? S::fma(x, factor, before)
                     : S::add(before, S::where_between(d, S::set1(lo), S::set1(hi), S::mul(x, factor)));
    }
    S::store(columns + at, after);
  }
}

// Σ_{0 ≤ t−s < W} A[t, s]·(W − (t − s)) over one panel of keys; Σ A[t, s]·(t − s) where W is the whole sequence.
template <class S, bool whole>
inline typename S::V window_sum(const float* product, RowWeights weights, float distance, float window) {
  using V = typename S::V;
  V sum = S::zero();
  for (int half = 0; half < 2; ++half) {
    const int at = half * S::lanes;
    const float first = distance - static_cast<float>(at);
    if (!touches<S>(first, 0.0f, window - 1.0f)) continue;
    const V d = S::sub(S::set1(first), S::iota());
    const V x = weights.of<S>(S::load(product + at));
    sum = S::add(
        sum, S::where_between(d, S::zero(), S::set1(window - 1.0f), S::mul(x, whole ? d : S::sub(S::set1(window), d))));
  }
  return sum;
}

// A horizon as one task sees it: sums of its keys, and distances at which rows count that see them.
struct ColumnBand {
  float* columns;
  int64_t lo, hi;
};

// Scratch memory per thread of either sweep; that of a column task ends with its bands' sums and its windows' sums of a tile.
template <class S, class Words>
int64_t workspace_words(const Problem& p) {
  const int64_t bands = p.horizon_count * int64_t{column_chunk + sizeof(ColumnBand) / sizeof(float)};
  const int64_t columns = 2 * tile_words<S> + bands + p.window_count * S::tile_rows * S::lanes;
  return ceil_div(most(row_sweep_words<S>(p), columns), 16) * 16;
}

template <class S, class Words, bool largest>
void sweep_columns(const Problem& p, const ColumnTask& task, float* workspace) {
  constexpr int rows = S::tile_rows, panel = panel_of<S>;
  const Sequence& s = p.sequence[task.sequence];
  const int64_t key_head = task.head / p.group(), steps = ceil_div(p.head_size, Words::per_word);
  const float scale = log2_scale(p);
  const bool with_window = p.row_span == nullptr && p.window_count > 0;
  const int64_t last_row = s.length - 1;
  const int64_t key_begin = task.key_begin, key_end = task.key_end;
  const int64_t at = task.head * p.tokens + s.start, of_all_heads = p.query_heads * p.tokens;
  const float* const row_weights = p.row_weights ? p.row_weights + task.head * p.row_weights_stride + s.start : nullptr;
  // Where a given lse is not finite, the row is undefined.
  const auto weights_of = [&](int64_t t) {
    const float factor = row_weights ? row_weights[t] : 1.0f;
    if (p.row_span) return RowWeights{p.row_max[at + t], scale, p.row_log2_sum[at + t], factor};
    const float given = p.given_lse[at + t];
    return RowWeights{0.0f, scale, is_finite(given) ? given * 1.44269504f : NAN, factor};
  };
  float* const queries = workspace;
  float* const score = workspace + tile_words<S>;
  using V = typename S::V;
  V* const window_sums = reinterpret_cast<V*>(score + tile_words<S>);  // [windows][rows]
  float* const columns = reinterpret_cast<float*>(window_sums + p.window_count * rows);
  ColumnBand* const bands = reinterpret_cast<ColumnBand*>(columns + p.horizon_count * column_chunk);

  // Rows whose horizons reach a key of this task, and with a given lse the task's own rows as well.
  int64_t row_begin = with_window ? most(s.prompt, key_begin) : s.length, row_end = with_window ? key_end : 0;
  for (int64_t i = 0; i < p.horizon_count; ++i) {
    const Horizon& horizon = p.horizons[i];
    // Rows beyond the sliding window count in the mean, but their weights are 0.
    const int64_t hi = least(horizon.hi == to_the_end ? last_row : least(horizon.hi, last_row), p.sliding_window - 1);
    bands[i] = {columns + i * column_chunk, horizon.lo, hi};
    std::fill_n(columns + i * column_chunk, ceil_div(key_end - key_begin, panel) * panel, largest ? -INFINITY : 0.0f);
    if (horizon.lo > hi) continue;
    row_begin = least(row_begin, most(s.prompt, key_begin + horizon.lo));
    row_end = most(row_end, least(last_row, key_end - 1 + hi) + 1);
  }
  for (int64_t t0 = row_begin; t0 < row_end; t0 += rows) {
    const int64_t count = least(rows, row_end - t0), t1 = t0 + count - 1;
    const int64_t own = with_window ? least(count, key_end - t0) : 0;  // rows whose WAADs this task computes
    const auto begin_of = [&](const ColumnBand& band) { return most(key_begin, t0 - band.hi); };
    const auto end_of = [&](const ColumnBand& band) {
      return band.lo > band.hi ? 0 : least(key_end, t1 - band.lo + 1);
    };
    int64_t first = s.length, last = 0;
    for (int64_t i = 0; i < p.horizon_count; ++i) {
      if (begin_of(bands[i]) >= end_of(bands[i])) continue;
      first = least(first, begin_of(bands[i]));
      last = most(last, end_of(bands[i]));
    }
    for (int64_t i = 0; own > 0 && i < p.window_count; ++i) {
      first = least(first, most(0, t0 - p.windows[i] + 1));
      last = most(last, t0 + own);
    }
    if (first >= last) continue;
    load_queries<S, Words>(p, task.sequence, task.head, t0, count, queries);
    for (int64_t i = 0; i < p.window_count * rows; ++i) window_sums[i] = S::zero();
    for (int64_t n = first / panel; n * panel < last; ++n) {
      const int64_t key = n * panel;
      const auto in_band = [&](const ColumnBand& band) { return key < end_of(band) && key + panel > begin_of(band); };
      const auto in_window = [&](int64_t window) { return own > 0 && key < t0 + own && key + panel > t0 - window + 1; };
      bool wanted = false;
      for (int64_t i = 0; i < p.horizon_count; ++i) wanted |= in_band(bands[i]);
      for (int64_t i = 0; i < p.window_count; ++i) wanted |= in_window(p.windows[i]);
      if (!wanted) continue;
      multiply_tile<S, Words, false>(queries, key_panel<S, Words>(p, s, key_head, n), steps, score);
      if (p.softcap > 0) cap<S>(score, count, 2, p.cap_scale);
      for (int64_t i = 0; i < p.horizon_count; ++i) {
        const ColumnBand& band = bands[i];
        if (!in_band(band)) continue;
        const bool inside = t0 - (key + panel - 1) >= band.lo && t1 - key <= band.hi;
        float* const sums = band.columns + (key - key_begin);
        const float lo = static_cast<float>(band.lo), hi = static_cast<float>(band.hi);
        for (int64_t r = 0; r < count; ++r) {
          const RowWeights weights = weights_of(t0 + r);
          if (weights.factor == 0.0f) continue;
          const float distance = static_cast<float>(t0 + r - key);
          const float* line = score + r * row_stride;
          if (inside)
            add_columns<S, true, largest>(line, sums, weights, distance, 0, 0);
          else
            add_columns<S, false, largest>(line, sums, weights, distance, lo, hi);
        }
      }
      for (int64_t i = 0; i < p.window_count; ++i) {
        if (!in_window(p.windows[i])) continue;
        const auto sum = p.holds(p.windows[i], last_row) ? window_sum<S, true> : window_sum<S, false>;
        const float window = static_cast<float>(least(p.windows[i], s.length));
        for (int64_t r = 0; r < own; ++r)
          window_sums[i * rows + r] = S::add(window_sums[i * rows + r], sum(score + r * row_stride, weights_of(t0 + r),
                                                                            static_cast<float>(t0 + r - key), window));
      }
    }
    for (int64_t r = 0; r < own; ++r) {
      const float given = p.given_lse[at + t0 + r];
      // Rows of A sum to 1, or with a sink to 1 − exp(sink − lse).
      const float mass = p.sinks ? -std::expm1(p.sinks[task.head] - given) : 1.0f;
      for (int64_t i = 0; i < p.window_count; ++i) {
        const int64_t window = least(p.windows[i], s.length);
        const float sum = S::sum(window_sums[i * rows + r]);
        // In a window that holds all that rows see, W − Σ A·(W − d) would lose the digits that W takes: WAAD is Σ A·d.
        const bool whole = p.holds(p.windows[i], last_row);
        p.waad[i * of_all_heads + at + t0 + r] = whole ? sum : static_cast<float>(window) * mass - sum;
      }
      p.lse[at + t0 + r] = is_finite(given) ? given : NAN;
    }
  }

  for (int64_t i = 0; i < p.horizon_count; ++i) {
    float* const fai = p.fai + i * of_all_heads + at;
    for (int64_t key = key_begin; key < key_end; ++key) {
      const float sum = bands[i].columns[key - key_begin];
      const int64_t from = most(s.prompt, key + p.horizons[i].lo);
      const int64_t to = p.horizons[i].hi == to_the_end ? last_row : least(last_row, key + p.horizons[i].hi);
      if (p.reduce != Reduce::mean)
        fai[key] = sum;
      else if (from <= to)
        fai[key] = sum / static_cast<float>(to - from + 1);
    }
  }
}

template <class S, class Words>
void column_sweep(const Problem& p, const ColumnTask& task, float* workspace) {
  if (p.reduce == Reduce::max)
    sweep_columns<S, Words, true>(p, task, workspace);
  else
    sweep_columns<S, Words, false>(p, task, workspace);
}

// The kernels of one instruction set and word type.
template <class S, class Words>
constexpr Kernels kernels_of(const char* name) {
  return Kernels{name,
                 panel_of<S>,
                 S::tile_rows,
                 sweep_blocks,
                 &panel_words<S, Words>,
                 &workspace_words<S, Words>,
                 &pack<S, Words>,
                 &sweep_rows<S, Words>,
                 &column_sweep<S, Words>};
}

}  // namespace
}  // namespace rhythm
