// Instruction sets that kernels are compiled for, and which of them this host can run.
#pragma once

namespace engine {

enum Isa : int { kScalar = 0, kAvx2 = 1, kAvx512 = 2, kIsaCount = 3 };

const char* isa_name(int isa);
int isa_from_name(const char* name);  // -1 if unknown
int host_isa();                       // best one that this host runs
const char* isa_missing(int isa);     // "" if the host has it, else the CPU feature that is missing

}  // namespace engine
