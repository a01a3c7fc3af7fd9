// The input of an op as pointers, strides and plain numbers, and the tasks it is split into.
#pragma once

#include <cstddef>
#include <cstdint>

namespace rhythm {

enum class DType { float32, float16, bfloat16 };

// One operand. Element (sequence i, token t, head h, d) lies at data + offset[i] + t·token + h·head + d·dim elements.
struct Operand {
  const void* data = nullptr;
  const int64_t* offset = nullptr;
  int64_t token = 0, head = 0, dim = 0;
};

struct Sequence {
  int64_t start;  // first token on the flattened token axis of the statistics
  int64_t length;
  int64_t prompt;       // rows before this one are prompt
  int64_t first_row;    // q and the output have the rows from this one on; never after `prompt`
  int64_t out_start;    // place of row 0 on the token axis of the output, where it is not stored if first_row > 0
  int64_t first_panel;  // index of its first panel of packed keys
};

constexpr int64_t to_the_end = -1;  // a horizon's hi without an upper end

// FAI's, in tokens, both ends in.
struct Horizon {
  int64_t lo, hi;
};

// What the column sweep makes of the weights of the rows within a horizon: their mean is FAI.
enum class Reduce { mean, sum, max };

struct Problem {
  DType dtype = DType::float32;
  int64_t query_heads = 0, key_heads = 0, head_size = 0;
  int64_t tokens = 0, sequences = 0;
  const Sequence* sequence = nullptr;
  Operand q, k, v;  // v.data may be null: no attention output. q's offset is that of its row 0, as in out_start
  float scale = 1.0f;
  float softcap = 0.0f;          // c of score = c·tanh(score / c); 0: none
  float cap_scale = 0;           // with a softcap: scale / c; products become tanh(product·cap_scale), and scale is c
  int64_t sliding_window = 0;    // keys at this distance and beyond are hidden; the number of tokens: none are
  const float* sinks = nullptr;  // [Hq], natural logits; null: none
  const int64_t* windows = nullptr;   // those of waad; several only where bands are visited
  const Horizon* horizons = nullptr;  // those of fai
  int64_t window_count = 0, horizon_count = 0;
  Reduce reduce = Reduce::mean;
  const float* row_weights = nullptr;  // [Hq or 1, T], factors of rows in fai, 0: takes no part; null: all 1
  int64_t row_weights_stride = 0;      // between heads
  bool flat = false;                   // the scale was 0 and is now 1; products become 0 (NaN where one is not finite)
  const float* given_lse = nullptr;    // [Hq, T]; with it and without row_span only bands are visited

  // Outputs, [Hq, T] unless said otherwise. Null: not wanted.
  float* row_span = nullptr;  // Σ_s A[t, s]·(t − s) of response rows; required if no lse is given
  float* waad = nullptr;      // [windows, Hq, T]
  float* fai = nullptr;       // [horizons, Hq, T]
  float* lse = nullptr;
  float* max_logit = nullptr;    // max_s of the scaled, capped score; with prompt_rows of all rows of q
  float* top1 = nullptr;         // max_s A[t, s]
  float* entropy = nullptr;      // −Σ_s A·log A
  float* first_mass = nullptr;   // Σ A over s < first
  float* prompt_mass = nullptr;  // Σ A over the prompt
  int64_t first = 4;
  bool prompt_rows = false;
  void* out = nullptr;  // [rows of q, Hq, D], in the inputs' type

  // Packed copies in 32-bit words (tile.hpp), shared by the query heads of a group.
  float* packed_k = nullptr;
  float* packed_v = nullptr;      // 0 in place of elements that are not finite
  uint8_t* not_finite = nullptr;  // [Hkv, panels]: whether a panel of v has elements that are not finite
  int64_t panels = 0;             // per head, over all sequences

  // [Hq, T], response rows, from the row sweep to the column sweep: A = 2^((product − row_max)·scale·log2 e −
  // row_log2_sum). One number would not do: the fp32 lse of scores beyond 10^7 has no room for the second's digits.
  float* row_max = nullptr;
  float* row_log2_sum = nullptr;

  int64_t group() const { return query_heads / key_heads; }
  // Whether the sliding window hides keys of a sequence of this length.
  bool slides(int64_t length) const { return sliding_window < length; }
  // The first key that row t sees.
  int64_t first_key(int64_t t) const { return t < sliding_window ? 0 : t - sliding_window + 1; }
  // Whether W holds all that row t sees: its WAAD is Σ A·(t − s), since a difference from W would lose digits.
  bool holds(int64_t window, int64_t t) const { return t < window || window >= sliding_window; }
  // Whether anything is wanted of a row besides its statistics.
  bool answers() const { return max_logit || top1 || entropy || first_mass || prompt_mass; }
};

// Rows [row_begin, row_end) of query heads [head_begin, head_end), which share one key head.
struct RowTask {
  int64_t sequence, head_begin, head_end, row_begin, row_end;
};

// Keys [key_begin, key_end) of one query head; with a given lse also the WAADs of rows [key_begin, key_end).
struct ColumnTask {
  int64_t sequence, head, key_begin, key_end;
};

// Key panels [panel_begin, panel_end) of one key head of one sequence.
struct PackTask {
  int64_t sequence, key_head, panel_begin, panel_end;
};

// The kernels of one instruction set for one element type.
struct Kernels {
  const char* name;
  int64_t panel_keys;                                   // keys per packed panel
  int64_t row_chunk, row_blocks;                        // rows per block, blocks per row task
  int64_t (*panel_words)(const Problem&, bool values);  // 32-bit words per packed panel of one head
  int64_t (*workspace_words)(const Problem&);           // scratch memory per thread
  void (*pack)(const Problem&, const PackTask&);
  void (*row_sweep)(const Problem&, const RowTask&, float* workspace);
  void (*column_sweep)(const Problem&, const ColumnTask&, float* workspace);
};

constexpr int64_t column_chunk = 512;  // keys per column task: a multiple of every panel size

const Kernels* portable_kernels(DType);
const Kernels* avx2_kernels(DType);
const Kernels* avx512_kernels(DType);
const Kernels* avx512_bf16_kernels(DType);
const Kernels* neon_kernels(DType);
const Kernels* neon_bf16_kernels(DType);

}  // namespace rhythm
