// FAI for known weights, key-stationary: a task owns keys and visits the rows whose horizon reaches them. For a lse
// that came from outside, tasks also compute the WAAD of their rows, from the keys within the window. No sum is shared
// between tasks, so results don't depend on their order.
#pragma once

#include <cmath>

#include "row_sweep.hpp"

namespace rhythm {
namespace {

// Whether any key of a vector lies at a distance within [lo, hi] from the row; the first key lies at `distance`.
template <class S>
inline bool touches(float distance, float lo, float hi) {
  return distance >= lo && distance - static_cast<float>(S::lanes - 1) <= hi;
}

// What turns products of one row into weights: A = 2^((product − max)·scale − log2_sum).
struct RowWeights {
  float max, scale, log2_sum;
  template <class S>
  typename S::V of(typename S::V product) const {
    return S::exp2(S::fma(S::sub(product, S::set1(max)), S::set1(scale), S::set1(-log2_sum)));
  }
};

// Adds the weights of one row for one panel of keys to the column sums. inside: all keys are within the horizon.
template <class S, bool inside>
inline void add_columns(const float* product, float* columns, RowWeights weights, float distance, float lo, float hi) {
  using V = typename S::V;
  for (int half = 0; half < 2; ++half) {
    const int at = half * S::lanes;
    const float first = distance - static_cast<float>(at);
    if (!inside && !touches<S>(first, lo, hi)) continue;
    V x = weights.of<S>(S::load(product + at));
    if (!inside) x = S::where_between(S::sub(S::set1(first), S::iota()), S::set1(lo), S::set1(hi), x);
    S::store(columns + at, S::add(S::load(columns + at), x));
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
    sum = S::add(sum, S::where_between(d, S::zero(), S::set1(window - 1.0f), S::mul(x, whole ? d : S::sub(S::set1(window), d))));
  }
  return sum;
}

template <class S, class Words>
void column_sweep(const Problem& p, const ColumnTask& task, float* workspace) {
  constexpr int rows = S::tile_rows, panel = panel_of<S>;
  const Sequence& s = p.sequence[task.sequence];
  const int64_t key_head = task.head / p.group(), steps = ceil_div(p.head_size, Words::per_word);
  const float scale = log2_scale(p);
  const bool open = p.horizon_hi == to_the_end, with_window = p.row_span == nullptr;
  const int64_t last_row = s.length - 1;
  // Rows beyond the sliding window count in the mean, but their weights are 0.
  const int64_t hi = least(open ? last_row : least(p.horizon_hi, last_row), p.sliding_window - 1);
  const int64_t key_begin = task.key_begin, key_end = task.key_end;
  const int64_t at = task.head * p.tokens + s.start;
  float* const waad = p.waad + at;
  // A window that holds all that rows see: W − Σ A·(W − d) would lose the digits that W takes, so WAAD is Σ A·d.
  const bool whole = p.window_holds(last_row);
  const int64_t window = least(p.window, s.length);
  // Where a given lse is not finite, the row is undefined.
  const auto weights_of = [&](int64_t t) {
    if (!with_window) return RowWeights{p.row_max[at + t], scale, p.row_log2_sum[at + t]};
    const float given = p.given_lse[at + t];
    return RowWeights{0.0f, scale, is_finite(given) ? given * 1.44269504f : NAN};
  };
  float* const queries = workspace;
  float* const score = workspace + tile_words<S>;
  float columns[column_chunk];
  for (int64_t i = 0; i < column_chunk; ++i) columns[i] = 0.0f;

  // Rows whose horizon reaches a key of this task, and with a given lse the task's own rows as well.
  int64_t row_begin = most(s.prompt, key_begin + p.horizon_lo);
  int64_t row_end = p.horizon_lo <= hi ? least(last_row, key_end - 1 + hi) + 1 : 0;
  if (with_window) {
    row_begin = most(s.prompt, key_begin);
    row_end = most(row_end, key_end);
  }
  for (int64_t t0 = row_begin; t0 < row_end; t0 += rows) {
    const int64_t count = least(rows, row_end - t0), t1 = t0 + count - 1;
    const int64_t band_begin = most(key_begin, t0 - hi), band_end = least(key_end, t1 - p.horizon_lo + 1);
    const int64_t own = with_window ? least(count, key_end - t0) : 0;  // rows whose WAAD this task computes
    int64_t first = band_begin, last = band_end;
    if (own > 0) {
      const int64_t window_begin = most(0, t0 - window + 1), window_end = t0 + own;
      first = band_begin < band_end ? least(band_begin, window_begin) : window_begin;
      last = most(window_end, band_begin < band_end ? band_end : window_end);
    }
    if (first >= last) continue;
    load_queries<S, Words>(p, task.sequence, task.head, t0, count, queries);
    typename S::V window_sums[rows];
    for (int r = 0; r < rows; ++r) window_sums[r] = S::zero();
    for (int64_t n = first / panel; n * panel < last; ++n) {
      const int64_t key = n * panel;
      multiply_tile<S, Words, false>(queries, key_panel<S, Words>(p, s, key_head, n), steps, score);
      if (p.softcap > 0) cap<S>(score, count, 2, p.cap_scale);
      if (key < band_end && key + panel > band_begin) {
        const bool inside = t0 - (key + panel - 1) >= p.horizon_lo && t1 - key <= hi;
        for (int64_t r = 0; r < count; ++r) {
          const RowWeights weights = weights_of(t0 + r);
          const float distance = static_cast<float>(t0 + r - key);
          const float* line = score + r * row_stride;
          float* const sums = columns + (key - key_begin);
          if (inside)
            add_columns<S, true>(line, sums, weights, distance, 0, 0);
          else
            add_columns<S, false>(line, sums, weights, distance, static_cast<float>(p.horizon_lo), static_cast<float>(hi));
        }
      }
      if (key < t0 + own && key + panel > t0 - window + 1)
        for (int64_t r = 0; r < own; ++r) {
          const auto sum = whole ? window_sum<S, true> : window_sum<S, false>;
          window_sums[r] = S::add(window_sums[r], sum(score + r * row_stride, weights_of(t0 + r),
                                                      static_cast<float>(t0 + r - key), static_cast<float>(window)));
        }
    }
    for (int64_t r = 0; r < own; ++r) {
      const float given = p.given_lse[at + t0 + r];
      // Rows of A sum to 1, or with a sink to 1 − exp(sink − lse).
      const float held = p.sinks ? static_cast<float>(window) * -std::expm1(p.sinks[task.head] - given)
                                 : static_cast<float>(window);
      waad[t0 + r] = whole ? S::sum(window_sums[r]) : held - S::sum(window_sums[r]);
      p.lse[at + t0 + r] = is_finite(given) ? given : NAN;
    }
  }

  float* const fai = p.fai + at;
  for (int64_t key = key_begin; key < key_end; ++key) {
    const int64_t from = most(s.prompt, key + p.horizon_lo), to = open ? last_row : least(last_row, key + p.horizon_hi);
    if (from <= to) fai[key] = columns[key - key_begin] / static_cast<float>(to - from + 1);
  }
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
