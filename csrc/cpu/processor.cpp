#include "processor.h"

#include <cstdint>
#include <cstdlib>
#include <cstring>

#if defined(__x86_64__)
#  include <cpuid.h>
#endif
#if defined(__x86_64__) && defined(__linux__)
#  include <sys/syscall.h>
#  include <unistd.h>
#endif

namespace lrk {
namespace {

using Set = InstructionSet;

#if defined(__x86_64__)

uint64_t enabled_state() {
  uint32_t low, high;
  __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  return static_cast<uint64_t>(high) << 32 | low;
}

// Linux hands out the 8 KiB tile state on request only, per process; threads inherit it.
bool request_tiles() {
#  if defined(__linux__) && defined(SYS_arch_prctl)
  constexpr int kRequestPermission = 0x1023;  // ARCH_REQ_XCOMP_PERM
  constexpr int kTileData = 18;               // XFEATURE_XTILEDATA
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#  else
  return false;
#  endif
}

// An instruction counts only if the operating system saves the registers that it uses.
Set best(Set limit) {
  uint32_t a, b, c, d;
  if (!__get_cpuid(1, &a, &b, &c, &d)) return Set::kGeneric;
  const bool has_xsave = c >> 27 & 1, has_fma = c >> 12 & 1, has_f16c = c >> 29 & 1;
  if (!has_xsave || !has_fma || !has_f16c) return Set::kGeneric;
  const uint64_t state = enabled_state();
  uint32_t b7, c7, d7, a71, x;
  if ((state & 0x6) != 0x6 || !__get_cpuid_count(7, 0, &a, &b7, &c7, &d7)) return Set::kGeneric;
  if (!(b7 >> 5 & 1) || limit < Set::kAvx2) return Set::kGeneric;
  const uint32_t avx512 = 1u << 16 | 1u << 17 | 1u << 30 | 1u << 31;  // F, DQ, BW, VL
  if ((state & 0xe6) != 0xe6 || (b7 & avx512) != avx512 || limit < Set::kAvx512) return Set::kAvx2;
  const uint32_t tiles = 1u << 22 | 1u << 24;  // AMX-BF16, AMX-TILE
  if ((state >> 17 & 3) != 3 || (d7 & tiles) != tiles || limit < Set::kAmx) return Set::kAvx512;
  if (!__get_cpuid_count(7, 1, &a71, &x, &c, &d) || !(a71 >> 5 & 1)) return Set::kAvx512;  // BF16
  return request_tiles() ? Set::kAmx : Set::kAvx512;
}

#else

Set best(Set) { return Set::kGeneric; }

#endif

Set requested() {
  const char* name = std::getenv("LRK_CPU_ISA");
  if (!name) return Set::kAmx;
  if (!std::strcmp(name, "generic")) return Set::kGeneric;
  if (!std::strcmp(name, "avx2")) return Set::kAvx2;
  if (!std::strcmp(name, "avx512")) return Set::kAvx512;
  return Set::kAmx;
}

}  // namespace

InstructionSet instruction_set() { return best(requested()); }

const char* name_of(InstructionSet set) {
  switch (set) {
    case InstructionSet::kAvx2:
      return "avx2";
    case InstructionSet::kAvx512:
      return "avx512";
    case InstructionSet::kAmx:
      return "amx";
    default:
      return "generic";
  }
}

}  // namespace lrk
