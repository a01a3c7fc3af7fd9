#include "dispatch.hpp"

#if defined(__aarch64__) && defined(__linux__)
#include <sys/auxv.h>
#endif

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <exception>
#include <limits>
#include <memory>
#include <mutex>
#include <new>
#include <stdexcept>
#include <thread>

namespace rhythm {
namespace {

struct Isa {
  const char* name;
  const Kernels* (*kernels)(DType);
  bool (*supported)();
};

bool always() { return true; }
#if defined(__x86_64__)
bool has_avx2() { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); }
bool has_avx512() {
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
}
bool has_avx512_bf16() { return has_avx512() && __builtin_cpu_supports("avx512bf16"); }
#else
bool has_avx2() { return false; }
bool has_avx512() { return false; }
bool has_avx512_bf16() { return false; }
#endif

#if defined(__aarch64__) && defined(__linux__)
bool has_neon_bf16() { return getauxval(AT_HWCAP2) & (1u << 14); }  // HWCAP2_BF16, which older headers lack
#else
bool has_neon_bf16() { return false; }
#endif

constexpr Isa isas[] = {
    {"avx512_bf16", avx512_bf16_kernels, has_avx512_bf16},
    {"avx512", avx512_kernels, has_avx512},
    {"avx2", avx2_kernels, has_avx2},
    {"neon_bf16", neon_bf16_kernels, has_neon_bf16},
    {"neon", neon_kernels, always},  // every arm64 processor has it
    {"portable", portable_kernels, always},
};

bool runs(const Isa& isa) { return isa.supported() && isa.kernels(DType::float32) != nullptr; }

const Isa& selected() {
  const char* forced = std::getenv("RHYTHM_CPU_ISA");
  for (const Isa& isa : isas)
    if (runs(isa) && (forced == nullptr || *forced == '\0' || isa.name == std::string(forced))) return isa;
  std::string names;
  for (const std::string& name : available_isas()) names += (names.empty() ? "" : ", ") + name;
  throw std::runtime_error("RHYTHM_CPU_ISA is '" + std::string(forced) + "'; this machine runs " + names);
}

// Joins its threads on every path: destroying an unjoined thread would terminate the process.
struct Joined {
  std::vector<std::thread> threads;
  ~Joined() {
    for (std::thread& thread : threads) thread.join();
  }
};

// Calls work(task index, thread index) for every task, on up to `threads` threads that take the next task when free. They
// are fewer if the system can't start more (limits on memory or processes); this thread always works.
template <class F>
void parallel_for(int64_t tasks, int threads, const F& work) {
  std::atomic<int64_t> next{0};
  std::exception_ptr error;
  std::mutex error_mutex;
  const auto loop = [&](int thread) {
    try {
      for (int64_t i = next++; i < tasks; i = next++) work(i, thread);
    } catch (...) {
      const std::lock_guard<std::mutex> lock(error_mutex);
      error = std::current_exception();
      next = tasks;
    }
  };
  {
    Joined others;
    try {
      for (int i = 1; i < std::min<int64_t>(threads, tasks); ++i) others.threads.emplace_back(loop, i);
    } catch (const std::exception&) {
    }
    loop(0);
  }
  if (error) std::rethrow_exception(error);
}

struct FreeAligned {
  void operator()(float* words) const { ::operator delete(words, std::align_val_t{64}); }
};
using Words = std::unique_ptr<float, FreeAligned>;

Words allocate(int64_t words) {
  return Words(static_cast<float*>(::operator new(static_cast<size_t>(words) * sizeof(float), std::align_val_t{64})));
}

std::vector<PackTask> pack_tasks(const Problem& p, int64_t panel_keys) {
  constexpr int64_t panels = 16;
  std::vector<PackTask> tasks;
  for (int64_t i = 0; i < p.sequences; ++i)
    for (int64_t head = 0; head < p.key_heads; ++head) {
      const int64_t count = (p.sequence[i].length + panel_keys - 1) / panel_keys;
      for (int64_t n = 0; n < count; n += panels) tasks.push_back({i, head, n, std::min(n + panels, count)});
    }
  return tasks;
}

std::vector<RowTask> row_tasks(const Problem& p, const Kernels& kernels) {
  const int64_t heads = std::min(p.group(), kernels.row_blocks / 2);
  const int64_t rows = kernels.row_chunk * (kernels.row_blocks / heads);
  std::vector<RowTask> tasks;
  for (int64_t i = 0; i < p.sequences; ++i) {
    const int64_t length = p.sequence[i].length,
                  first = p.out || p.prompt_rows ? p.sequence[i].first_row : p.sequence[i].prompt;
    for (int64_t group = 0; group < p.query_heads; group += p.group())
      for (int64_t head = group; head < group + p.group(); head += heads)
        for (int64_t t = first; t < length; t += rows)
          tasks.push_back({i, head, std::min(head + heads, group + p.group()), t, std::min(t + rows, length)});
  }
  // The longest rows come first, so that the last task to end is a short one.
  std::stable_sort(tasks.begin(), tasks.end(),
                   [](const RowTask& a, const RowTask& b) { return a.row_end > b.row_end; });
  return tasks;
}

std::vector<ColumnTask> column_tasks(const Problem& p) {
  std::vector<ColumnTask> tasks;
  for (int64_t i = 0; i < p.sequences; ++i)
    for (int64_t key = 0; key < p.sequence[i].length; key += column_chunk)  // of all heads: the row sweep ended here
      for (int64_t head = 0; head < p.query_heads; ++head)
        tasks.push_back({i, head, key, std::min(key + column_chunk, p.sequence[i].length)});
  return tasks;
}

}  // namespace

std::vector<std::string> available_isas() {
  std::vector<std::string> names;
  for (const Isa& isa : isas)
    if (runs(isa)) names.emplace_back(isa.name);
  return names;
}

std::string selected_isa() { return selected().name; }

void run(Problem p, std::vector<Sequence> sequences, std::vector<int64_t> windows, std::vector<Horizon> horizons,
         int threads) {
  const Kernels& kernels = *selected().kernels(p.dtype);
  p.sequences = static_cast<int64_t>(sequences.size());
  for (Sequence& s : sequences) {
    s.first_panel = p.panels;
    p.panels += (s.length + kernels.panel_keys - 1) / kernels.panel_keys;
  }
  p.sequence = sequences.data();
  if (p.panels == 0) return;
  // No distance exceeds the number of tokens; larger limits would only overflow.
  p.sliding_window = std::min(p.sliding_window, p.tokens);
  for (int64_t& window : windows) window = std::min(window, p.sliding_window);
  for (Horizon& horizon : horizons) {
    horizon.lo = std::min(horizon.lo, p.tokens);
    if (horizon.hi != to_the_end) horizon.hi = std::min(horizon.hi, p.tokens);
  }
  p.windows = windows.data();
  p.window_count = static_cast<int64_t>(windows.size());
  p.horizons = horizons.data();
  p.horizon_count = static_cast<int64_t>(horizons.size());
  if (p.scale * 1.44269504f == 0.0f) {
    p.flat = true;
    p.scale = 1.0f;
  }
  if (p.softcap > 0) {
    constexpr float most = std::numeric_limits<float>::max();
    p.cap_scale = std::min(std::max(p.scale / p.softcap, -most), most);
    p.scale = p.softcap;
  }

  const Words keys = allocate(p.key_heads * p.panels * kernels.panel_words(p, false));
  const Words values = allocate(p.v.data ? p.key_heads * p.panels * kernels.panel_words(p, true) : 1);
  p.packed_k = keys.get();
  p.packed_v = values.get();
  std::vector<uint8_t> not_finite(p.v.data ? static_cast<size_t>(p.key_heads * p.panels) : 0);
  p.not_finite = not_finite.data();
  const auto packs = pack_tasks(p, kernels.panel_keys);
  parallel_for(static_cast<int64_t>(packs.size()), threads, [&](int64_t i, int) { kernels.pack(p, packs[i]); });

  const int64_t scratch = kernels.workspace_words(p);
  const Words workspace = allocate(scratch * threads);
  const int64_t per_row = p.row_span ? p.query_heads * p.tokens : 0;
  const Words maxima = allocate(per_row), sums = allocate(per_row);
  p.row_max = maxima.get();
  p.row_log2_sum = sums.get();
  if (p.row_span) {
    const auto rows = row_tasks(p, kernels);
    parallel_for(static_cast<int64_t>(rows.size()), threads,
                 [&](int64_t i, int thread) { kernels.row_sweep(p, rows[i], workspace.get() + thread * scratch); });
  }
  const auto columns = column_tasks(p);
  parallel_for(static_cast<int64_t>(columns.size()), threads,
               [&](int64_t i, int thread) { kernels.column_sweep(p, columns[i], workspace.get() + thread * scratch); });
}

}  // namespace rhythm
