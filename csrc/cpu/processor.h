// Which instruction set the CPU kernels may use here. Framework-free: both modules have it.
#pragma once

namespace lrk {

// Each has all that the ones before it have.
enum class InstructionSet { kGeneric, kAvx2, kAvx512, kAmx };

// The best one that this processor, its operating system and the environment variable LRK_CPU_ISA
// (generic, avx2, avx512, amx) allow. With amx the process is granted tile registers.
InstructionSet instruction_set();

const char* name_of(InstructionSet set);

}  // namespace lrk
