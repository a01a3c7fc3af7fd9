// Chooses the instruction set, and runs a problem with it.
#pragma once

#include <string>
#include <vector>

#include "problem.hpp"

namespace rhythm {

// Instruction sets this build has and this processor runs, the fastest first.
std::vector<std::string> available_isas();

// The instruction set in use: the fastest, or the one that the environment variable RHYTHM_CPU_ISA names.
// Throws std::runtime_error if that one is unknown or can't run here.
std::string selected_isa();

// Fills the outputs of `problem`; its windows, horizons, packed_k, packed_v, panels and the sequences' first_panel are set here.
void run(Problem problem, std::vector<Sequence> sequences, std::vector<int64_t> windows, std::vector<Horizon> horizons,
         int threads);

}  // namespace rhythm
