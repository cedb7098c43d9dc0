// The choice of a kernel table for this processor.
#include "kernel_table.h"
#include "processor.h"

namespace lrk {
namespace {

const KernelTable* choose() {
  const InstructionSet best = instruction_set();
  const KernelTable* table = nullptr;
  if (best == InstructionSet::kAmx) table = amx_table();
  if (!table && best >= InstructionSet::kAvx512) table = avx512_table();
  if (!table && best >= InstructionSet::kAvx2) table = avx2_table();
  return table ? table : generic_table();
}

}  // namespace

const KernelTable& kernel_table() {
  static const KernelTable* const table = choose();
  return *table;
}

}  // namespace lrk
