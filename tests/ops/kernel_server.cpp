// The CPU kernels as a process of their own: reads calls from stdin and writes results to stdout. So kernels that were
// compiled for another processor take the ops' tests in an emulator; kernels_elsewhere.py is the other end.
//
// A call is the instruction set to force ("": none) and the arguments of rhythm._C.attention_statistics, or nothing after
// a 0. A reply is an error ("": none), the names of the instruction sets, the one in use, and the outputs.
#include <cstdio>
#include <cstdlib>
#include <exception>
#include <string>
#include <utility>
#include <vector>

#include "../../csrc/dispatch.hpp"

using rhythm::Horizon, rhythm::Operand, rhythm::Problem, rhythm::Sequence;

namespace {

void read(void* to, size_t count) {
  if (std::fread(to, 1, count, stdin) != count) std::exit(0);  // the caller has gone
}

template <class T>
T one() {
  T x;
  read(&x, sizeof x);
  return x;
}

int64_t number() { return one<int64_t>(); }

// Their number comes first.
template <class T>
std::vector<T> many() {
  std::vector<T> all(static_cast<size_t>(number()));
  read(all.data(), all.size() * sizeof(T));
  return all;
}

std::string text() {
  const std::vector<char> letters = many<char>();
  return {letters.begin(), letters.end()};
}

// A block of memory that an argument pointed to.
struct Block {
  std::vector<char> bytes = many<char>();
  template <class T = float>
  T* data() {
    return bytes.empty() ? nullptr : reinterpret_cast<T*>(bytes.data());
  }
};

struct View {
  Block block;
  std::vector<int64_t> offset = many<int64_t>(), stride = many<int64_t>();
  Operand operand() { return {block.data<void>(), offset.data(), stride[0], stride[1], stride[2]}; }
};

void write(const void* bytes, size_t count) { std::fwrite(bytes, 1, count, stdout); }

void write(const std::string& words) {
  const int64_t count = static_cast<int64_t>(words.size());
  write(&count, sizeof count);
  write(words.data(), words.size());
}

// What a call names, in the order in which it comes.
struct Call {
  int64_t dtype = number(), reduce = number(), first = number(), prompt_rows = number(), threads = number();
  std::vector<int64_t> heads = many<int64_t>(), bounds = many<int64_t>(), prompt_lens = many<int64_t>(),
                       row_bounds = many<int64_t>(), windows = many<int64_t>(), horizons = many<int64_t>();
  int64_t sliding_window = number(), row_weights_stride = number();
  float scale = one<float>(), softcap = one<float>();
  View q, k, v;
  Block sinks, row_weights, given_lse;
  Block row_span, waad, fai, lse, max_logit, top1, entropy, first_mass, prompt_mass, out;

  std::vector<Block*> outputs() {
    return {&row_span, &waad, &fai, &lse, &max_logit, &top1, &entropy, &first_mass, &prompt_mass, &out};
  }

  void run() {
    Problem p;
    p.dtype = static_cast<rhythm::DType>(dtype);
    p.reduce = static_cast<rhythm::Reduce>(reduce);
    p.query_heads = heads[0];
    p.key_heads = heads[1];
    p.head_size = heads[2];
    p.tokens = bounds.back();
    p.q = q.operand();
    p.k = k.operand();
    p.v = v.operand();
    p.scale = scale;
    p.softcap = softcap;
    p.sliding_window = sliding_window;
    p.sinks = sinks.data();
    p.row_weights = row_weights.data();
    p.row_weights_stride = row_weights_stride;
    p.given_lse = given_lse.data();
    p.row_span = row_span.data();
    p.waad = waad.data();
    p.fai = fai.data();
    p.lse = lse.data();
    p.max_logit = max_logit.data();
    p.top1 = top1.data();
    p.entropy = entropy.data();
    p.first_mass = first_mass.data();
    p.prompt_mass = prompt_mass.data();
    p.first = first;
    p.prompt_rows = prompt_rows != 0;
    p.out = out.data<void>();
    std::vector<Horizon> between;
    for (size_t i = 0; i < horizons.size(); i += 2) between.push_back({horizons[i], horizons[i + 1]});
    std::vector<Sequence> sequences;
    for (size_t i = 0; i + 1 < bounds.size(); ++i) {
      const int64_t length = bounds[i + 1] - bounds[i], first_row = length - (row_bounds[i + 1] - row_bounds[i]);
      sequences.push_back({bounds[i], length, prompt_lens[i], first_row, row_bounds[i] - first_row, 0});
    }
    rhythm::run(p, std::move(sequences), windows, std::move(between), static_cast<int>(threads));
  }
};

}  // namespace

int main() {
  while (true) {
    setenv("RHYTHM_CPU_ISA", text().c_str(), 1);
    std::string error, names, selected;
    std::vector<Call> calls(static_cast<size_t>(number()));
    for (const std::string& name : rhythm::available_isas()) names += (names.empty() ? "" : " ") + name;
    try {
      selected = rhythm::selected_isa();
      for (Call& call : calls) call.run();
    } catch (const std::exception& trouble) {
      error = trouble.what();
    }
    write(error);
    write(names);
    write(selected);
    for (Call& call : calls)
      for (const Block* block : call.outputs()) write(block->bytes.data(), block->bytes.size());
    std::fflush(stdout);
  }
}
