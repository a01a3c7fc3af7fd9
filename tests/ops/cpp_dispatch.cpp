// A C++ caller of torch.ops.rhythm, as another project would have it: through the dispatcher, without Python or rhythm's headers.
// Arguments are filled by name from the op's schema, so arguments that a later version adds keep their defaults.

#include <map>
#include <string>

#include <ATen/core/Tensor.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/library.h>

namespace {

torch::jit::Stack call(const char* op, const std::map<std::string, c10::IValue>& arguments) {
  const auto handle = c10::Dispatcher::singleton().findSchemaOrThrow(op, "");
  torch::jit::Stack stack;
  size_t used = 0;
  for (const auto& argument : handle.schema().arguments()) {
    const auto given = arguments.find(argument.name());
    if (given != arguments.end()) {
      stack.push_back(given->second);
      ++used;
    } else {
      TORCH_CHECK(argument.default_value().has_value(), op, " needs the argument ", argument.name());
      stack.push_back(*argument.default_value());
    }
  }
  TORCH_CHECK(used == arguments.size(), op, " lacks an argument that was given");
  handle.callBoxed(stack);
  return stack;
}

// (span, waad, fai, lse) of packed q [T, Hq, D] and k [T, Hkv, D], horizon (lo, hi).
std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> statistics(const at::Tensor& q, const at::Tensor& k,
                                                                      const at::Tensor& cu_seqlens,
                                                                      const at::Tensor& prompt_lens, double scale,
                                                                      int64_t window, int64_t lo,
                                                                      std::optional<int64_t> hi) {
  const auto results = call("rhythm::attention_statistics", {{"q", q},
                                                             {"k", k},
                                                             {"cu_seqlens", cu_seqlens},
                                                             {"prompt_lens", prompt_lens},
                                                             {"scale", scale},
                                                             {"window", window},
                                                             {"horizon_lo", lo},
                                                             {"horizon_hi", hi},
                                                             {"lse", c10::IValue()},
                                                             {"span", true},
                                                             {"backend", "auto"}});
  return {results[0].toTensor(), results[1].toTensor(), results[2].toTensor(), results[3].toTensor()};
}

// Asks for the op without its tensors.
at::Tensor incomplete(const at::Tensor& q) { return call("rhythm::attention_statistics", {{"q", q}})[0].toTensor(); }

}  // namespace

TORCH_LIBRARY(rhythm_cpp_caller, library) {
  library.def(
      "statistics(Tensor q, Tensor k, Tensor cu_seqlens, Tensor prompt_lens, float scale, int window, int lo, "
      "int? hi) -> (Tensor, Tensor, Tensor, Tensor)",
      statistics);
  library.def("incomplete(Tensor q) -> Tensor", incomplete);
}
