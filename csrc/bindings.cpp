// The Python module: the op on raw pointers, and the instruction sets that the processor runs.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <map>
#include <optional>

#include "dispatch.hpp"

namespace py = pybind11;
using rhythm::DType, rhythm::Horizon, rhythm::Operand, rhythm::Problem, rhythm::Reduce, rhythm::Sequence;

namespace {

// (address, first element of each sequence, strides of token, head and dim), in elements.
using View = std::tuple<uintptr_t, std::vector<int64_t>, std::array<int64_t, 3>>;

Operand operand(const View& view) {
  const auto& [address, offset, stride] = view;
  return {reinterpret_cast<const void*>(address), offset.data(), stride[0], stride[1], stride[2]};
}

float* floats(uintptr_t address) { return reinterpret_cast<float*>(address); }

void attention_statistics(const std::string& dtype, std::array<int64_t, 3> heads, const std::vector<int64_t>& bounds,
                          const std::vector<int64_t>& prompt_lens, const std::vector<int64_t>& row_bounds,
                          const View& q, const View& k, const std::optional<View>& v, float scale, float softcap,
                          int64_t sliding_window, uintptr_t sinks, const std::vector<int64_t>& windows,
                          const std::vector<std::array<int64_t, 2>>& horizons, const std::string& reduce,
                          const std::pair<uintptr_t, int64_t>& row_weights, uintptr_t given_lse, uintptr_t row_span,
                          uintptr_t waad, uintptr_t fai, uintptr_t lse, const std::map<std::string, uintptr_t>& also,
                          int64_t first, bool prompt_rows, uintptr_t out, int threads) {
  static const std::map<std::string, DType> types = {
      {"float32", DType::float32}, {"float16", DType::float16}, {"bfloat16", DType::bfloat16}};
  static const std::map<std::string, Reduce> reductions = {
      {"mean", Reduce::mean}, {"sum", Reduce::sum}, {"max", Reduce::max}};
  Problem p;
  p.dtype = types.at(dtype);
  p.query_heads = heads[0];
  p.key_heads = heads[1];
  p.head_size = heads[2];
  p.tokens = bounds.back();
  p.q = operand(q);
  p.k = operand(k);
  if (v) p.v = operand(*v);
  p.scale = scale;
  p.softcap = softcap;
  p.sliding_window = sliding_window;
  p.sinks = floats(sinks);
  p.reduce = reductions.at(reduce);
  p.row_weights = floats(row_weights.first);
  p.row_weights_stride = row_weights.second;
  p.given_lse = floats(given_lse);
  p.row_span = floats(row_span);
  p.waad = floats(waad);
  p.fai = floats(fai);
  p.lse = floats(lse);
  const std::map<std::string, float**> answers = {{"max_logit", &p.max_logit},
                                                  {"top1", &p.top1},
                                                  {"entropy", &p.entropy},
                                                  {"first_mass", &p.first_mass},
                                                  {"prompt_mass", &p.prompt_mass}};
  for (const auto& [name, address] : also) *answers.at(name) = floats(address);
  p.first = first;
  p.prompt_rows = prompt_rows;
  p.out = reinterpret_cast<void*>(out);
  std::vector<Horizon> between;
  for (const auto& [lo, hi] : horizons) between.push_back({lo, hi});
  std::vector<Sequence> sequences;
  for (size_t i = 0; i + 1 < bounds.size(); ++i) {
    const int64_t length = bounds[i + 1] - bounds[i], first_row = length - (row_bounds[i + 1] - row_bounds[i]);
    sequences.push_back({bounds[i], length, prompt_lens[i], first_row, row_bounds[i] - first_row, 0});
  }
  const py::gil_scoped_release nogil;
  rhythm::run(p, std::move(sequences), windows, std::move(between), threads);
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "The CPU kernels of rhythm; rhythm.ops.statistics is their public interface.";
  m.attr("to_the_end") = rhythm::to_the_end;
  m.def("available_isas", &rhythm::available_isas, "Instruction sets that this processor runs, the fastest first.");
  m.def("selected_isa", &rhythm::selected_isa,
        "The instruction set in use: the fastest, or the one that RHYTHM_CPU_ISA names.");
  m.def("attention_statistics", &attention_statistics, py::kw_only(), py::arg("dtype"), py::arg("heads"),
        py::arg("bounds"), py::arg("prompt_lens"), py::arg("row_bounds"), py::arg("q"), py::arg("k"), py::arg("v"),
        py::arg("scale"), py::arg("softcap"), py::arg("sliding_window"), py::arg("sinks"), py::arg("windows"),
        py::arg("horizons"), py::arg("reduce"), py::arg("row_weights"), py::arg("given_lse"), py::arg("row_span"),
        py::arg("waad"), py::arg("fai"), py::arg("lse"), py::arg("also"), py::arg("first"), py::arg("prompt_rows"),
        py::arg("out"), py::arg("threads"));
}
