// A 64-bit hash of a row's bytes, once per instruction set. The including file defines LRK_ISA (a
// namespace), LRK_TARGET (the attribute that enables the instructions, may be empty) and LRK_W
// (32-bit words in a register). Hashes of different instruction sets differ.

namespace lrk {
namespace LRK_ISA {

typedef uint32_t HashU __attribute__((vector_size(4 * LRK_W)));
typedef uint16_t HashH __attribute__((vector_size(4 * LRK_W)));

// Halves change places before the product, which carries bits up alone: without that two flipped
// signs would cancel.
LRK_TARGET static inline HashU mix(HashU acc, HashU word) {
  HashH halves = {};
  for (int i = 0; i < 2 * LRK_W; ++i) halves[i] = static_cast<uint16_t>(i ^ 1);
  return (HashU)__builtin_shuffle((HashH)(acc ^ word), halves) * 2654435761u;
}

LRK_TARGET static uint64_t row_hash(const void* row, int64_t bytes) {
  constexpr int64_t kRegister = 4 * LRK_W;
  const char* p = static_cast<const char*>(row);
  HashU acc[4];
  for (int j = 0; j < 4; ++j) acc[j] = HashU{} + 2246822519u * static_cast<uint32_t>(j + 1);
  int64_t i = 0;
  for (; i + 4 * kRegister <= bytes; i += 4 * kRegister) {
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) {
      HashU word;
      __builtin_memcpy(&word, p + i + j * kRegister, sizeof(word));
      acc[j] = mix(acc[j], word);
    }
  }
  for (; i < bytes; i += kRegister) {
    HashU word = {};
    const int64_t count = bytes - i < kRegister ? bytes - i : kRegister;
    __builtin_memcpy(&word, p + i, static_cast<size_t>(count));
    acc[0] = mix(acc[0], word);
  }
  HashU all = acc[0];
  for (int j = 1; j < 4; ++j) all = mix(all, acc[j]);
  uint64_t lanes[LRK_W / 2];
  __builtin_memcpy(lanes, &all, sizeof(lanes));
  uint64_t hash = 0;
  for (const uint64_t lane : lanes) {
    hash = (hash ^ lane) * 0x9e3779b97f4a7c15u;
    hash ^= hash >> 29;
  }
  return hash;
}

}  // namespace LRK_ISA
}  // namespace lrk

#undef LRK_ISA
#undef LRK_TARGET
#undef LRK_W
