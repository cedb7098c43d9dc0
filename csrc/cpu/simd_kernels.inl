// The primitives of kernel_table.h, written once on the compiler's vector types and compiled once
// per instruction set. The including file defines
//   LRK_ISA     a namespace name
//   LRK_TARGET  the function attribute that enables the instructions (may be empty)
//   LRK_W       floats in a register: 4, 8 or 16
//   LRK_ISA_NAME  a string
// and, where they exist, LRK_HAS_AVX2, LRK_HAS_AVX512 and LRK_HAS_AVX512_BF16. Attributes sit on
// every function, never on the file, so that no inline function of a shared header is compiled for
// a newer processor than the one at hand. No lambdas: they would not inherit the attribute.

#include <cstdint>
#include <cstring>
#include <type_traits>

#include "../philox.h"
#include "coded.h"
#include "kernel_table.h"

#if defined(LRK_HAS_AVX2) || defined(LRK_HAS_AVX512)
#  include <immintrin.h>
#elif defined(__aarch64__)
#  include <arm_neon.h>
#endif

#define LRK_FN LRK_TARGET static
#define LRK_INLINE LRK_TARGET __attribute__((always_inline)) static inline

namespace lrk {
namespace LRK_ISA {

constexpr int kWidth = LRK_W;
typedef float VecF __attribute__((vector_size(4 * LRK_W)));
typedef uint32_t VecU __attribute__((vector_size(4 * LRK_W)));
typedef int32_t VecI __attribute__((vector_size(4 * LRK_W)));
typedef uint16_t VecH __attribute__((vector_size(2 * LRK_W)));
typedef uint64_t VecQ __attribute__((vector_size(4 * LRK_W)));

// Tags for 16-bit storage; float stands for itself.
struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

LRK_INLINE VecF splat(float value) { return value - VecF{}; }

// a b + c, rounded once where the processor can. Which products and sums a compiler fuses by itself
// differs from loop to loop, and a row would feel which loop it was in: these files are compiled
// with -ffp-contract=off.
LRK_INLINE VecF mul_add(VecF a, VecF b, VecF c) {
#if LRK_W == 16
  return (VecF)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif LRK_W == 8
  return (VecF)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#elif defined(__aarch64__)
  return (VecF)vfmaq_f32((float32x4_t)c, (float32x4_t)a, (float32x4_t)b);
#else
  return a * b + c;
#endif
}

template <typename V, typename T>
LRK_INLINE V load_raw(const T* p) {
  V v;
  __builtin_memcpy(&v, p, sizeof(V));
  return v;
}

template <typename V, typename T>
LRK_INLINE void store_raw(T* p, V v) {
  __builtin_memcpy(p, &v, sizeof(V));
}

template <typename V, typename T>
LRK_INLINE V load_part_raw(const T* p, int64_t n) {
  V v = {};
  __builtin_memcpy(&v, p, static_cast<size_t>(n) * sizeof(T));
  return v;
}

LRK_INLINE VecF select(VecI mask, VecF a, VecF b) {
  return (VecF)(((VecI)a & mask) | ((VecI)b & ~mask));
}
LRK_INLINE VecU select(VecI mask, VecU a, VecU b) { return (a & (VecU)mask) | (b & ~(VecU)mask); }

LRK_INLINE VecF widen(VecF v, float) { return v; }

LRK_INLINE VecU zero_extend(VecH h) {
  // GCC splits the plain vector conversion into halves.
#if defined(LRK_HAS_AVX512)
  return (VecU)_mm512_cvtepu16_epi32((__m256i)h);
#elif defined(LRK_HAS_AVX2)
  return (VecU)_mm256_cvtepu16_epi32((__m128i)h);
#else
  return __builtin_convertvector(h, VecU);
#endif
}

// Words below 2^16.
LRK_INLINE VecH cut(VecU u) {
#if defined(LRK_HAS_AVX2)
  const __m256i halves = _mm256_packus_epi32((__m256i)u, (__m256i)u);
  return (VecH)_mm256_castsi256_si128(_mm256_permute4x64_epi64(halves, 0x08));
#else
  return __builtin_convertvector(u, VecH);
#endif
}

LRK_INLINE VecF widen(VecH h, BFloat16) { return (VecF)(zero_extend(h) << 16); }

LRK_INLINE VecF widen(VecH h, Float16) {
#if defined(LRK_HAS_AVX512)
  return (VecF)_mm512_cvtph_ps((__m256i)h);
#elif defined(LRK_HAS_AVX2)
  return (VecF)_mm256_cvtph_ps((__m128i)h);
#else
  // Shift the exponent and mantissa into place, then rebias by a multiplication, which also
  // normalises subnormals; infinities and NaN get the full exponent back.
  const VecU u = __builtin_convertvector(h, VecU);
  const VecU sign = (u & 0x8000u) << 16;
  const VecF scaled = (VecF)((u & 0x7fffu) << 13) * 0x1p112f;
  const VecI special = (VecI)((u & 0x7c00u) == 0x7c00u);
  return (VecF)(((VecU)scaled | ((VecU)special & 0x7f800000u)) | sign);
#endif
}

LRK_INLINE VecF narrow(VecF v, float) { return v; }

LRK_INLINE VecH narrow(VecF v, BFloat16) {
#if defined(LRK_HAS_AVX512_BF16)
  return (VecH)_mm512_cvtneps_pbh((__m512)v);  // takes subnormals as zero, as the tiles do
#else
  const VecU u = (VecU)v;
  const VecU rounded = (u + 0x7fffu + ((u >> 16) & 1u)) >> 16;
  return cut(select((VecI)(v != v), (u >> 16) | 0x40u, rounded));
#endif
}

LRK_INLINE VecH narrow(VecF v, Float16) {
#if defined(LRK_HAS_AVX512)
  return (VecH)_mm512_cvtps_ph((__m512)v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#elif defined(LRK_HAS_AVX2)
  return (VecH)_mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#else
  const VecU sign = (VecU)v & 0x80000000u;
  const VecU u = (VecU)v ^ sign;
  const VecU odd = (u >> 13) & 1u;
  const VecU normal = (u - 0x38000000u + 0xfffu + odd) >> 13;
  // Below 2^-14 the addition of 0.5 rounds at the right bit and leaves it at the bottom.
  const VecU subnormal = (VecU)((VecF)u + 0.5f) - 0x3f000000u;
  const VecU special = select((VecI)(u > 0x7f800000u), (u & 0) + 0x7e00u, (u & 0) + 0x7c00u);
  VecU result = select((VecI)(u < 0x38800000u), subnormal, normal);
  result = select((VecI)(u >= 0x47800000u), special, result);
  return __builtin_convertvector(result | (sign >> 16), VecH);
#endif
}

template <typename T>
struct Raw {
  typedef VecH type;
};
template <>
struct Raw<float> {
  typedef VecF type;
};

template <typename T>
LRK_INLINE VecF load(const T* p) {
  return widen(load_raw<typename Raw<T>::type>(p), T{});
}
template <typename T>
LRK_INLINE VecF load_part(const T* p, int64_t n) {
  return widen(load_part_raw<typename Raw<T>::type>(p, n), T{});
}
template <typename T>
LRK_INLINE void store(T* p, VecF v) {
  store_raw(p, narrow(v, T{}));
}
template <typename T>
LRK_INLINE void store_part(T* p, VecF v, int64_t n) {
  const typename Raw<T>::type raw = narrow(v, T{});
  __builtin_memcpy(p, &raw, static_cast<size_t>(n) * sizeof(T));
}

template <typename T>
LRK_INLINE void store_one(T* p, float v) {
  store_part(p, splat(v), 1);
}

// ---- dropout ------------------------------------------------------------------------------------

// Words of 2 * kWidth consecutive columns of one row, starting at a multiple of 4.
struct Words {
  VecU lo;  // the first kWidth columns
  VecU hi;
};

#if defined(LRK_HAS_AVX512) || defined(LRK_HAS_AVX2)

LRK_INLINE VecQ multiply_low_words(VecQ a, uint32_t b) {
#  if defined(LRK_HAS_AVX512)
  return (VecQ)_mm512_mul_epu32((__m512i)a, _mm512_set1_epi64(b));
#  else
  return (VecQ)_mm256_mul_epu32((__m256i)a, _mm256_set1_epi64x(b));
#  endif
}

LRK_INLINE Words draw(const Dropout& dropout, int64_t row, int64_t col) {
  // One counter per 64-bit lane. The product reads only the low word of a lane, so high words may
  // hold anything until the end and the low half of a product needs no masking. Lanes are ordered
  // so that the final 64-bit unpack, which works within 128 bits, yields columns in order.
#  if defined(LRK_HAS_AVX512)
  const VecQ lane = {0, 4, 1, 5, 2, 6, 3, 7};
#  else
  const VecQ lane = {0, 2, 1, 3};
#  endif
  const VecQ zero = {};
  VecQ c0 = lane + static_cast<uint64_t>(col >> 2);
  VecQ c1 = zero + static_cast<uint32_t>(row);
  VecQ c2 = zero, c3 = zero;
  uint32_t key0 = dropout.key0, key1 = dropout.key1;
#  pragma GCC unroll 10
  for (int round = 0; round < kPhiloxRounds; ++round) {
    const VecQ product0 = multiply_low_words(c0, kPhiloxMul0);
    const VecQ product1 = multiply_low_words(c2, kPhiloxMul1);
    c0 = (product1 >> 32) ^ c1 ^ (zero + key0);
    c2 = (product0 >> 32) ^ c3 ^ (zero + key1);
    c1 = product1;
    c3 = product0;
    key0 += kPhiloxWeyl0;
    key1 += kPhiloxWeyl1;
  }
  const VecQ w01 = (c0 & 0xffffffffu) | (c1 << 32);
  const VecQ w23 = (c2 & 0xffffffffu) | (c3 << 32);
#  if defined(LRK_HAS_AVX512)
  return {(VecU)_mm512_unpacklo_epi64((__m512i)w01, (__m512i)w23),
          (VecU)_mm512_unpackhi_epi64((__m512i)w01, (__m512i)w23)};
#  else
  return {(VecU)_mm256_unpacklo_epi64((__m256i)w01, (__m256i)w23),
          (VecU)_mm256_unpackhi_epi64((__m256i)w01, (__m256i)w23)};
#  endif
}

#else

LRK_INLINE Words draw(const Dropout& dropout, int64_t row, int64_t col) {
  uint32_t words[2 * kWidth];
  for (int i = 0; i < kWidth / 2; ++i) {
    const PhiloxWords four =
        philox_words(dropout.key0, dropout.key1, static_cast<uint32_t>((col >> 2) + i),
                     static_cast<uint32_t>(row));
    __builtin_memcpy(words + 4 * i, four.word, sizeof(four.word));
  }
  return {load_raw<VecU>(words), load_raw<VecU>(words + kWidth)};
}

#endif

LRK_INLINE VecI kept(VecU words, const Dropout& dropout) {
  return (VecI)(words >= dropout.threshold);
}

LRK_FN void keep_mask(uint8_t* dst, int64_t dst_stride, int64_t rows, int64_t cols,
                      const Dropout& dropout, int64_t row) {
  for (int64_t i = 0; i < rows; ++i) {
    uint8_t* out = dst + i * dst_stride;
    for (int64_t j = 0; j < cols; j += 2 * kWidth) {
      const Words words = draw(dropout, row + i, j);
      int32_t keep[2 * kWidth];
      store_raw(keep, kept(words.lo, dropout));
      store_raw(keep + kWidth, kept(words.hi, dropout));
      const int64_t n = cols - j < 2 * kWidth ? cols - j : 2 * kWidth;
      for (int64_t k = 0; k < n; ++k) out[j + k] = static_cast<uint8_t>(keep[k] & 1);
    }
  }
}

// ---- staging ------------------------------------------------------------------------------------

// One register's worth of a row: load, mask, gate. Plain copies between equal types stay exact,
// NaN payloads and subnormals included, except where the hardware conversion flushes subnormals.
template <typename Dst, typename Src>
LRK_INLINE void stage_vector(Dst* dst, const Src* src, int64_t n, const VecI* keep,
                             const float* col_scale) {
  const bool whole = n >= kWidth;
  VecF v = whole ? load(src) : load_part(src, n);
  if (keep) v = (VecF)((VecI)v & *keep);
  if (col_scale) v = v * (whole ? load(col_scale) : load_part(col_scale, n));
  if (whole) {
    store(dst, v);
  } else {
    store_part(dst, v, n);
  }
}

template <typename Dst, typename Src>
LRK_INLINE void stage_row(Dst* dst, const Src* src, const Source& s, int64_t row) {
  for (int64_t j = 0; j < s.cols; j += 2 * kWidth) {
    VecI keep[2];
    if (s.dropout) {
      const Words words = draw(*s.dropout, row, s.col + j);
      keep[0] = kept(words.lo, *s.dropout);
      keep[1] = kept(words.hi, *s.dropout);
    }
#pragma GCC unroll 2
    for (int half = 0; half < 2; ++half) {
      const int64_t at = j + half * kWidth, n = s.cols - at;
      if (n <= 0) break;
      stage_vector(dst + at, src + at, n, s.dropout ? &keep[half] : nullptr,
                   s.col_scale ? s.col_scale + at : nullptr);
    }
  }
}

// Rows of narrow columns lie far apart, where no processor fetches them of its own accord: those to
// come are asked for. Past the last row that does nothing.
constexpr int64_t kRowsAhead = 8;

template <typename Dst, typename Src>
LRK_INLINE void convert_row(Dst* dst, const Src* src, int64_t cols) {
  int64_t j = 0;
  for (; j + kWidth <= cols; j += kWidth) store(dst + j, load(src + j));
  if (j < cols) store_part(dst + j, load_part(src + j, cols - j), cols - j);
}

template <typename Dst, typename Src>
LRK_FN void stage_rows(Dst* dst, int64_t stride, const Source& s) {
  const Src* src = static_cast<const Src*>(s.data);
  const bool plain = !s.dropout && !s.col_scale;
  for (int64_t i = 0; i < s.rows; ++i) {
    Dst* to = dst + i * stride;
    const Src* from = src + i * s.stride;
    __builtin_prefetch(from + kRowsAhead * s.stride);
    if (plain) {
      convert_row(to, from, s.cols);
    } else {
      stage_row(to, from, s, s.row + i);
    }
    if (s.padded_cols > s.cols) {
      __builtin_memset(to + s.cols, 0, static_cast<size_t>(s.padded_cols - s.cols) * sizeof(Dst));
    }
  }
}

LRK_FN void transpose(uint32_t* dst, int64_t dst_stride, const uint32_t* src, int64_t src_stride,
                      int64_t rows, int64_t cols);

// ---- coded weights ------------------------------------------------------------------------------

constexpr bool is_bfloat16(BFloat16) { return true; }
template <typename T>
constexpr bool is_bfloat16(T) {
  return false;
}

LRK_INLINE VecF round_to(VecF v, float) { return v; }
LRK_INLINE VecF round_to(VecF v, BFloat16) {  // by integers: the hardware takes subnormals as zero
  const VecU u = (VecU)v;                     // of a NaN, one with few bits: see one_nan
  return (VecF)((u + 0x7fffu + ((u >> 16) & 1u)) & 0xffff0000u);
}
LRK_INLINE VecF round_to(VecF v, Float16) { return widen(narrow(v, Float16{}), Float16{}); }

// A NaN's bits as those that rounding by integers keeps.
LRK_INLINE float one_nan(float v) { return v == v ? v : __builtin_nanf(""); }

// e4m3fn: sign, 4 bits of exponent with bias 7, 3 bits; no infinities. Shifted, its bits are those
// of a float16 2^8 times as small.
LRK_INLINE VecF from_float8(VecH bytes) {
  const VecH magnitude = bytes & 0x7f;
  const VecH nan = (VecH)(magnitude == 0x7f) & 0x7e00;
  return widen((VecH)((bytes & 0x80) << 8 | magnitude << 7 | nan), Float16{}) * 256.0f;
}

LRK_INLINE float stored_scale(const Coded& w, int64_t block) {
  const uint8_t* bytes = static_cast<const uint8_t*>(w.scale);
  switch (w.scales) {
    case Scales::kFloat32:
      return static_cast<const float*>(w.scale)[block];
    case Scales::kNested: {
      const float product = w.map[bytes[block]] * w.nested[block >> w.nested_shift];
      return product + w.offset;
    }
    case Scales::kExponent: {
      const uint32_t e = bytes[block];
      const uint32_t bits = e == 0 ? 0x400000u : e == 255 ? 0x7fc00000u : e << 23;
      float value;
      __builtin_memcpy(&value, &bits, sizeof(value));
      return value;
    }
    case Scales::kFloat8:
      return from_float8(VecH{} + bytes[block])[0] / w.offset;
  }
  return 0.0f;
}

// The scales of `count` blocks, `step` apart.
LRK_FN void block_scales(float* out, const Coded& w, int64_t block, int64_t count, int64_t step) {
  for (int64_t i = 0; i < count; ++i) out[i] = one_nan(stored_scale(w, block + i * step));
}
LRK_INLINE float block_scale(const Coded& w, int64_t block) {
  float scale;
  block_scales(&scale, w, block, 1, 1);
  return scale;
}
LRK_INLINE float block_zero(const Coded& w, int64_t block) {
  return w.zeros ? static_cast<float>(w.zeros[block]) : 0.0f;
}

// The values that the 16 nibbles have under one scale.
struct Book {
  float value[16];
};

// 4-bit codes `flat` to flat + n, all under one scale.
template <typename Dst>
LRK_INLINE void look_up(Dst* dst, const Book& book, const Coded& w, int64_t flat, int64_t n) {
  const uint8_t* data = w.data;
  const bool high_first = w.codes == Codes::kHighNibbleFirst;
  int64_t j = 0;
#if defined(LRK_HAS_AVX2) || defined(LRK_HAS_AVX512)
  if (flat % 2 && n > 0) {
    store_one(dst, book.value[high_first ? data[flat / 2] & 15 : data[flat / 2] >> 4]);
    j = 1;
  }
  const __m256i high = _mm256_setr_epi32(4, 0, 12, 8, 20, 16, 28, 24);
  const __m256i low = _mm256_setr_epi32(0, 4, 8, 12, 16, 20, 24, 28);
  const __m256i shifts = high_first ? high : low;
#  if defined(LRK_HAS_AVX512)
  const __m512 values = _mm512_loadu_ps(book.value);
  const __m512i wide_shifts = _mm512_inserti64x4(_mm512_castsi256_si512(shifts), shifts, 1);
#  else
  const __m256 first = _mm256_loadu_ps(book.value), second = _mm256_loadu_ps(book.value + 8);
#  endif
  for (; j + kWidth <= n; j += kWidth) {
    int32_t words[2] = {};
    __builtin_memcpy(words, data + (flat + j) / 2, kWidth / 2);
#  if defined(LRK_HAS_AVX512)
    // An index is the low 4 bits of a lane.
    const __m512i codes =
        _mm512_srlv_epi32(_mm512_inserti64x4(_mm512_castsi256_si512(_mm256_set1_epi32(words[0])),
                                             _mm256_set1_epi32(words[1]), 1),
                          wide_shifts);
    store(dst + j, (VecF)_mm512_permutexvar_ps(codes, values));
#  else
    // An index is the low 3 bits of a lane, and the fourth chooses.
    const __m256i codes = _mm256_srlv_epi32(_mm256_set1_epi32(words[0]), shifts);
    const __m256 value = _mm256_blendv_ps(_mm256_permutevar8x32_ps(first, codes),
                                          _mm256_permutevar8x32_ps(second, codes),
                                          _mm256_castsi256_ps(_mm256_slli_epi32(codes, 28)));
    store(dst + j, (VecF)value);
#  endif
  }
#endif
  for (; j < n; ++j) {
    const bool high_nibble = ((flat + j) % 2 == 0) == high_first;
    const uint8_t byte = data[(flat + j) / 2];
    store_one(dst + j, book.value[high_nibble ? byte >> 4 : byte & 15]);
  }
}

// ---- 32 codes of bfloat16 values at a time ------------------------------------------------------

#if defined(LRK_HAS_AVX2) || defined(LRK_HAS_AVX512)

// The 16 values' lower and upper bytes, twice.
struct ByteBook {
  __m256i lower, upper;
};

// Of the two codes of a byte, in 16 bits: where the lower nibble goes, and where the upper.
struct NibbleOrder {
  __m256i lower, upper;
};

LRK_INLINE NibbleOrder nibble_order(const Coded& w) {
  const __m256i first = _mm256_set1_epi16(0x000f), second = _mm256_set1_epi16(0x0f00);
  const bool high_first = w.codes == Codes::kHighNibbleFirst;
  return {high_first ? second : first, high_first ? first : second};
}

LRK_INLINE ByteBook byte_book(const Coded& w, float zero, float scale) {
  const __m256i both_bytes =  // of the upper halves of four words: the lower ones, and the upper
      _mm256_setr_epi8(2, 6, 10, 14, 3, 7, 11, 15, 2, 6, 10, 14, 3, 7, 11, 15, 2, 6, 10, 14, 3, 7,
                       11, 15, 2, 6, 10, 14, 3, 7, 11, 15);
  __m256i bytes[2];
#  pragma GCC unroll 2
  for (int v = 0; v < 2; ++v) {
    const __m256 value = _mm256_sub_ps(_mm256_loadu_ps(w.book + 8 * v), _mm256_set1_ps(zero));
    const __m256i u = _mm256_castps_si256(_mm256_mul_ps(value, _mm256_set1_ps(scale)));
    const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(u, 16), _mm256_set1_epi32(1));
    const __m256i half = _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff));
    bytes[v] = _mm256_shuffle_epi8(_mm256_add_epi32(u, half), both_bytes);
  }
  const __m256i pairs = _mm256_unpacklo_epi32(bytes[0], bytes[1]);
  return {_mm256_permutevar8x32_epi32(pairs, _mm256_setr_epi32(0, 4, 1, 5, 0, 4, 1, 5)),
          _mm256_permutevar8x32_epi32(pairs, _mm256_setr_epi32(2, 6, 3, 7, 2, 6, 3, 7))};
}

// Codes 0 to 3, 8 to 11 | 4 to 7, 12 to 15 as bfloat16, and those 16 on.
struct Words32 {
  __m256i first, second;
};

LRK_INLINE Words32 look_up_32(const ByteBook& book, const uint8_t* data, const NibbleOrder& order) {
  const __m256i each_twice = _mm256_setr_epi8(0, 0, 1, 1, 4, 4, 5, 5, 8, 8, 9, 9, 12, 12, 13, 13, 2,
                                              2, 3, 3, 6, 6, 7, 7, 10, 10, 11, 11, 14, 14, 15, 15);
  const __m256i bytes = _mm256_shuffle_epi8(
      _mm256_broadcastsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(data))),
      each_twice);
  const __m256i codes = _mm256_or_si256(_mm256_and_si256(bytes, order.lower),
                                        _mm256_and_si256(_mm256_srli_epi16(bytes, 4), order.upper));
  const __m256i lower = _mm256_shuffle_epi8(book.lower, codes);
  const __m256i upper = _mm256_shuffle_epi8(book.upper, codes);
  return {_mm256_unpacklo_epi8(lower, upper), _mm256_unpackhi_epi8(lower, upper)};
}

LRK_INLINE void widen_32(VecF* to, const Words32& words) {
#  if defined(LRK_HAS_AVX512)
  to[0] = widen((VecH)_mm256_permute4x64_epi64(words.first, 0xd8), BFloat16{});
  to[1] = widen((VecH)_mm256_permute4x64_epi64(words.second, 0xd8), BFloat16{});
#  else
  const __m256i zero = _mm256_setzero_si256();
  to[0] = (VecF)_mm256_unpacklo_epi16(zero, words.first);
  to[1] = (VecF)_mm256_unpackhi_epi16(zero, words.first);
  to[2] = (VecF)_mm256_unpacklo_epi16(zero, words.second);
  to[3] = (VecF)_mm256_unpackhi_epi16(zero, words.second);
#  endif
}

LRK_INLINE void store_32(BFloat16* dst, const Words32& words) {
  __m256i* to = reinterpret_cast<__m256i*>(dst);
  _mm256_storeu_si256(to, _mm256_permute4x64_epi64(words.first, 0xd8));
  _mm256_storeu_si256(to + 1, _mm256_permute4x64_epi64(words.second, 0xd8));
}

#else

struct ByteBook {
  float value[16];
};

typedef bool NibbleOrder;  // whether the upper nibble comes first

LRK_INLINE NibbleOrder nibble_order(const Coded& w) { return w.codes == Codes::kHighNibbleFirst; }

LRK_INLINE ByteBook byte_book(const Coded& w, float zero, float scale) {
  ByteBook book;
  for (int v = 0; v < 16; v += kWidth) {
    store(book.value + v, round_to((load(w.book + v) - splat(zero)) * splat(scale), BFloat16{}));
  }
  return book;
}

struct Words32 {
  float value[32];
};

LRK_INLINE Words32 look_up_32(const ByteBook& book, const uint8_t* data, NibbleOrder high_first) {
  Words32 words;
  for (int j = 0; j < 16; ++j) {
    const float high = book.value[data[j] >> 4], low = book.value[data[j] & 15];
    words.value[2 * j] = high_first ? high : low;
    words.value[2 * j + 1] = high_first ? low : high;
  }
  return words;
}

LRK_INLINE void widen_32(VecF* to, const Words32& words) {
  for (int v = 0; v < 32 / kWidth; ++v) to[v] = load(words.value + v * kWidth);
}

LRK_INLINE void store_32(BFloat16* dst, const Words32& words) {
  for (int v = 0; v < 32; v += kWidth) store(dst + v, load(words.value + v));
}

#endif

LRK_INLINE void store_32(float* dst, const Words32& words) {
  VecF values[32 / kWidth];
  widen_32(values, words);
#pragma GCC unroll 8
  for (int v = 0; v < 32 / kWidth; ++v) store(dst + v * kWidth, values[v]);
}

// The first block of a row, of those of a weight that is read in place.
LRK_INLINE int64_t first_block(const Coded& w, int64_t row) {
  return w.run ? row * (w.cols / w.run) : row / w.block_rows * w.grid;
}

// Bytes to 32-bit lanes, as signed as they are. GCC splits the plain vector conversion into halves.
template <typename To, typename Bytes>
LRK_INLINE To widen_bytes(Bytes bytes) {
#if defined(LRK_HAS_AVX2) || defined(LRK_HAS_AVX512)
  __m128i raw = _mm_setzero_si128();
  __builtin_memcpy(&raw, &bytes, sizeof(bytes));
  const bool is_signed = std::is_same<To, VecI>::value;
#  if defined(LRK_HAS_AVX512)
  return (To)(is_signed ? _mm512_cvtepi8_epi32(raw) : _mm512_cvtepu8_epi32(raw));
#  else
  return (To)(is_signed ? _mm256_cvtepi8_epi32(raw) : _mm256_cvtepu8_epi32(raw));
#  endif
#else
  return __builtin_convertvector(bytes, To);
#endif
}

// Bytes to 16-bit lanes.
template <typename Bytes>
LRK_INLINE VecH halves(Bytes bytes) {
#if defined(LRK_HAS_AVX512)
  return (VecH)_mm256_cvtepu8_epi16((__m128i)bytes);
#elif defined(LRK_HAS_AVX2)
  __m128i raw = _mm_setzero_si128();
  __builtin_memcpy(&raw, &bytes, sizeof(bytes));
  return (VecH)_mm_cvtepu8_epi16(raw);
#else
  return __builtin_convertvector(bytes, VecH);
#endif
}

enum class Bytes { kInt8, kFloat8, kNibble };

// n values of bytes, rounded to T: int8 or float8 times `scale`, or the nibble `shift` bits up
// times `scale` less `least`.
template <typename T, Bytes Kind, typename Dst>
LRK_INLINE void decode_bytes(Dst* dst, const uint8_t* from, int64_t n, float scale,
                             float least = 0.0f, int shift = 0) {
  typedef int8_t Signed __attribute__((vector_size(LRK_W)));
  typedef uint8_t Unsigned __attribute__((vector_size(LRK_W)));
  for (int64_t j = 0; j < n; j += kWidth) {
    const int64_t count = n - j < kWidth ? n - j : kWidth;
    const Unsigned bytes =
        count == kWidth ? load_raw<Unsigned>(from + j) : load_part_raw<Unsigned>(from + j, count);
    VecF value;
    if (Kind == Bytes::kInt8) {
      value = __builtin_convertvector(widen_bytes<VecI>((Signed)bytes), VecF) * splat(scale);
    } else if (Kind == Bytes::kFloat8) {
      value = from_float8(halves(bytes)) * splat(scale);
    } else {
      const VecU code = widen_bytes<VecU>(bytes) >> static_cast<uint32_t>(shift) & 15u;
      value = __builtin_convertvector((VecI)code, VecF) * splat(scale) - splat(least);
    }
    if (!std::is_same<T, Dst>::value) value = round_to(value, T{});  // else the store rounds
    if (count == kWidth) {
      store(dst + j, value);
    } else {
      store_part(dst + j, value, count);
    }
  }
}

LRK_INLINE float half_at(const uint8_t* p) {
  return one_nan(load_part(reinterpret_cast<const Float16*>(p), 1)[0]);
}

// Elements `at` to at + n of the 32 whose number is `block`, in records of a GGUF file.
template <typename T, typename Dst>
LRK_INLINE void decode_record(Dst* dst, const Coded& w, int64_t block, int64_t at, int64_t n) {
  if (w.codes == Codes::kQ8_0) {
    const uint8_t* record = w.data + block * 34;
    return decode_bytes<T, Bytes::kInt8>(dst, record + 2 + at, n, half_at(record));
  }
  // A half d and a half m, for 8 blocks 6 bits of each, and 32 bytes for two blocks.
  const uint8_t* record = w.data + block / 8 * 144;
  const uint8_t* six = record + 4;
  const int b = static_cast<int>(block % 8), shift = b % 2 * 4;
  int scale = six[b % 4] & 63, least = six[b % 4 + 4] & 63;
  if (b >= 4) {
    scale = (six[b + 4] & 15) | (six[b - 4] >> 6 << 4);
    least = six[b + 4] >> 4 | six[b] >> 6 << 4;
  }
  const float d = half_at(record) * static_cast<float>(scale);
  const float m = half_at(record + 2) * static_cast<float>(least);
  decode_bytes<T, Bytes::kNibble>(dst, record + 16 + b / 2 * 32 + at, n, d, m, shift);
}

// One row's piece, where each column has a block of its own.
template <typename T, typename Dst>
LRK_FN void decode_grouped_row(Dst* dst, const Coded& w, int64_t row, int64_t col, int64_t cols) {
  for (int64_t j = 0; j < cols; ++j) {
    const int64_t flat = row * w.cols + col + j, block = row * w.grid + w.groups[col + j];
    const bool high = (flat % 2 == 0) == (w.codes == Codes::kHighNibbleFirst);
    const uint8_t byte = w.data[flat / 2];
    const float zero = block_zero(w, block);
    const float value = (w.book[high ? byte >> 4 : byte & 15] - zero) * block_scale(w, block);
    store_one(dst + j, round_to(splat(value), T{})[0]);
  }
}

template <typename T, typename Dst>
LRK_FN void decode_row(Dst* dst, const Coded& w, int64_t row, int64_t col, int64_t cols) {
  if (w.groups) return decode_grouped_row<T>(dst, w, row, col, cols);
  const int64_t flat = row * w.cols + col;
  const int64_t size = w.run ? w.run : w.block_cols, at = w.run ? flat : col;
  int64_t block = at / size + (w.run ? 0 : row / w.block_rows * w.grid);
  int64_t n = size - at % size;
  for (int64_t j = 0; j < cols; j += n, n = size, ++block) {
    if (n > cols - j) n = cols - j;
    if (in_records(w.codes)) {
      decode_record<T>(dst + j, w, block, (flat + j) % size, n);
      continue;
    }
    const float scale = block_scale(w, block);
    if (w.codes == Codes::kInt8) {
      decode_bytes<T, Bytes::kInt8>(dst + j, w.data + flat + j, n, scale);
      continue;
    }
    if (w.codes == Codes::kFloat8) {
      decode_bytes<T, Bytes::kFloat8>(dst + j, w.data + flat + j, n, scale);
      continue;
    }
    const float zero = block_zero(w, block);
    int64_t done = 0;
    if (is_bfloat16(T{}) && n >= 32 && (flat + j) % 2 == 0) {
      const ByteBook book = byte_book(w, zero, scale);
      const NibbleOrder order = nibble_order(w);
      for (; done + 32 <= n; done += 32) {
        store_32(dst + j + done, look_up_32(book, w.data + (flat + j + done) / 2, order));
      }
      if (done == n) continue;
    }
    Book book;
#pragma GCC unroll 4
    for (int v = 0; v < 16; v += kWidth) {
      store(book.value + v, round_to((load(w.book + v) - splat(zero)) * splat(scale), T{}));
    }
    look_up(dst + j + done, book, w, flat + j + done, n - done);
  }
}

// Codes in words: kWidth rows of W lie beside each other in memory. They are decoded a column at a
// time, with a row a lane, and turned.
template <typename T, typename Dst>
LRK_FN void decode_words(Dst* dst, int64_t stride, const Source& s) {
  const Coded& w = *static_cast<const Coded*>(s.data);
  const uint32_t* words = reinterpret_cast<const uint32_t*>(w.data);
  const float* scales = static_cast<const float*>(w.scale);
  const bool down = w.codes == Codes::kWordsDown;
  for (int64_t i = 0; i < s.rows; i += kWidth) {
    const int64_t row = s.row + i, rows = s.rows - i < kWidth ? s.rows - i : kWidth;
    int64_t across[kWidth];
    VecU shifts = {};
    for (int64_t lane = 0; lane < rows; ++lane) {
      across[lane] = (row + lane) / 8;
      const uint32_t r = static_cast<uint32_t>((row + lane) % 8);
      shifts[lane] = 4 * (r / 2 + r % 2 * 4);
    }
    VecF scale = {}, zero = {};
    int64_t known = -1;
    for (int64_t j = 0; j < s.cols; j += kWidth) {
      const int64_t cols = s.cols - j < kWidth ? s.cols - j : kWidth;
      float tile[kWidth * kWidth] = {}, turned[kWidth * kWidth];
      for (int64_t c = 0; c < cols; ++c) {
        const int64_t k = s.col + j + c, group = w.groups ? w.groups[k] : k / w.block_cols;
        if (group != known) {
          known = group;
          scale = load_part(scales + group * w.rows + row, rows);
          scale = select((VecI)(scale == scale), scale, splat(__builtin_nanf("")));
          const uint8_t* zeros = w.zeros + group * w.rows + row;
          for (int64_t lane = 0; lane < rows; ++lane) zero[lane] = static_cast<float>(zeros[lane]);
        }
        VecU code;
        if (down) {
          code = load_part_raw<VecU>(words + k / 8 * w.rows + row, rows) >>
                 static_cast<uint32_t>(4 * (k % 8));
        } else {
          uint32_t lanes[kWidth] = {};
          const uint32_t* line = words + k * (w.rows / 8);
          for (int64_t lane = 0; lane < rows; ++lane) lanes[lane] = line[across[lane]];
          code = load_raw<VecU>(lanes) >> shifts;
        }
        const VecF value = __builtin_convertvector((VecI)(code & 15u), VecF);
        store(tile + c * kWidth, round_to((value - zero) * scale, T{}));
      }
      transpose(reinterpret_cast<uint32_t*>(turned), kWidth,
                reinterpret_cast<const uint32_t*>(tile), kWidth, kWidth, kWidth);
      for (int64_t r = 0; r < rows; ++r) {
        Dst* to = dst + (i + r) * stride + j;
        if (cols == kWidth) {
          store(to, load(turned + r * kWidth));
        } else {
          store_part(to, load(turned + r * kWidth), cols);
        }
      }
    }
  }
}

template <typename T, typename Dst>
LRK_FN void decode_rows(Dst* dst, int64_t stride, const Source& s) {
  const Coded& w = *static_cast<const Coded*>(s.data);
  if (in_words(w.codes)) {
    decode_words<T>(dst, stride, s);
  } else {
    const bool nibbles = w.codes <= Codes::kLowNibbleFirst;
    for (int64_t i = 0; i < s.rows; ++i) {
      // No hardware guesses where a row's piece begins.
      const int64_t ahead = (s.row + i + kRowsAhead) * w.cols + s.col;
      __builtin_prefetch(w.data + (nibbles ? ahead / 2 : ahead));
      decode_row<T>(dst + i * stride, w, s.row + i, s.col, s.cols);
    }
  }
  if (s.padded_cols == s.cols) return;
  for (int64_t i = 0; i < s.rows; ++i) {
    __builtin_memset(dst + i * stride + s.cols, 0,
                     static_cast<size_t>(s.padded_cols - s.cols) * sizeof(Dst));
  }
}

template <typename Dst>
LRK_FN void stage_coded(Dst* dst, int64_t stride, const Source& s) {
  switch (static_cast<const Coded*>(s.data)->value) {
    case Dtype::kBFloat16:
      return decode_rows<BFloat16>(dst, stride, s);
    case Dtype::kFloat16:
      return decode_rows<Float16>(dst, stride, s);
    default:
      return decode_rows<float>(dst, stride, s);
  }
}

template <typename Dst>
LRK_FN void stage_any(Dst* dst, int64_t stride, const Source& s) {
  switch (s.dtype) {
    case Dtype::kCoded:
      return stage_coded(dst, stride, s);
    case Dtype::kFloat32:
      return stage_rows<Dst, float>(dst, stride, s);
    case Dtype::kBFloat16:
      return stage_rows<Dst, BFloat16>(dst, stride, s);
    case Dtype::kFloat16:
      return stage_rows<Dst, Float16>(dst, stride, s);
  }
}

LRK_FN void stage_float(float* dst, int64_t stride, const Source& s) { stage_any(dst, stride, s); }

LRK_FN void stage_bfloat16(uint16_t* dst, int64_t stride, const Source& s) {
  stage_any(reinterpret_cast<BFloat16*>(dst), stride, s);
}

// ---- block product by FMA -----------------------------------------------------------------------

// Rows and panels of C held in registers: 16 accumulators of AVX-512's 32, 8 of AVX2's 16.
constexpr int kVecsPerPanel = static_cast<int>(kPanel) / kWidth;
constexpr int kTileRows = LRK_W == 16 ? 8 : (LRK_W == 8 ? 4 : 2);
constexpr int kTilePanels = LRK_W == 16 ? 2 : 1;

template <int Rows, int Panels>
LRK_INLINE void multiply_tile(const BlockProduct<float>& b, int64_t row, int64_t panel) {
  constexpr int kVecs = Panels * kVecsPerPanel;
  const float* l = b.l + row * b.l_stride;
  const float* g = b.g + panel * b.panel_stride;
  VecF acc[Rows][kVecs] = {};
  for (int64_t k = 0; k < b.depth; ++k) {
    VecF right[kVecs];
#pragma GCC unroll 8
    for (int v = 0; v < kVecs; ++v) {
      right[v] = load(g + k * b.g_stride + (v / kVecsPerPanel) * b.panel_stride +
                      (v % kVecsPerPanel) * kWidth);
    }
#pragma GCC unroll 16
    for (int i = 0; i < Rows; ++i) {
      const VecF left = splat(l[i * b.l_stride + k]);
#pragma GCC unroll 8
      for (int v = 0; v < kVecs; ++v) acc[i][v] = mul_add(left, right[v], acc[i][v]);
    }
  }
  float* c = b.c + row * b.c_stride + panel * kPanel;
#pragma GCC unroll 16
  for (int i = 0; i < Rows; ++i) {
#pragma GCC unroll 8
    for (int v = 0; v < kVecs; ++v) {
      float* out = c + i * b.c_stride + v * kWidth;
      store(out, b.accumulate ? load(out) + acc[i][v] : acc[i][v]);
    }
  }
}

template <int Panels>
LRK_FN void multiply_rows(const BlockProduct<float>& b, int64_t panel) {
  int64_t row = 0;
  for (; row + kTileRows <= b.rows; row += kTileRows) {
    multiply_tile<kTileRows, Panels>(b, row, panel);
  }
  if (kTileRows > 4 && row + 4 <= b.rows) {
    multiply_tile<4, Panels>(b, row, panel);
    row += 4;
  }
  if (kTileRows > 2 && row + 2 <= b.rows) {
    multiply_tile<2, Panels>(b, row, panel);
    row += 2;
  }
  if (row < b.rows) multiply_tile<1, Panels>(b, row, panel);
}

LRK_FN void multiply_float(const BlockProduct<float>& b) {
  int64_t panel = 0;
  for (; panel + kTilePanels <= b.panels; panel += kTilePanels) {
    multiply_rows<kTilePanels>(b, panel);
  }
  for (; panel < b.panels; ++panel) multiply_rows<1>(b, panel);
}

// ---- rows in, rows out --------------------------------------------------------------------------

#if defined(LRK_HAS_AVX512)

// 16 x 16 words, all rows there or not; those past the edge are neither read nor written.
template <bool AllRows>
LRK_INLINE void transpose_16(uint32_t* dst, int64_t dst_stride, const uint32_t* src,
                             int64_t src_stride, int rows, int cols) {
  const __mmask16 in = static_cast<__mmask16>((1u << cols) - 1u);
  const __mmask16 out = static_cast<__mmask16>((1u << rows) - 1u);
  __m512i a[16], b[16];
#  pragma GCC unroll 16
  for (int i = 0; i < 16; ++i) {
    a[i] = AllRows || i < rows ? _mm512_maskz_loadu_epi32(in, src + i * src_stride)
                               : _mm512_setzero_si512();
  }
#  pragma GCC unroll 8
  for (int i = 0; i < 16; i += 2) {
    b[i] = _mm512_unpacklo_epi32(a[i], a[i + 1]);
    b[i + 1] = _mm512_unpackhi_epi32(a[i], a[i + 1]);
  }
#  pragma GCC unroll 4
  for (int i = 0; i < 16; i += 4) {
    a[i] = _mm512_unpacklo_epi64(b[i], b[i + 2]);
    a[i + 1] = _mm512_unpackhi_epi64(b[i], b[i + 2]);
    a[i + 2] = _mm512_unpacklo_epi64(b[i + 1], b[i + 3]);
    a[i + 3] = _mm512_unpackhi_epi64(b[i + 1], b[i + 3]);
  }
  // a[4 g + j] now holds, in 128-bit lane q, rows 4 g .. 4 g + 3 of column 4 q + j.
#  pragma GCC unroll 4
  for (int j = 0; j < 4; ++j) {
    const __m512i lo01 = _mm512_shuffle_i32x4(a[j], a[4 + j], 0x44);
    const __m512i hi01 = _mm512_shuffle_i32x4(a[j], a[4 + j], 0xee);
    const __m512i lo23 = _mm512_shuffle_i32x4(a[8 + j], a[12 + j], 0x44);
    const __m512i hi23 = _mm512_shuffle_i32x4(a[8 + j], a[12 + j], 0xee);
    b[j] = _mm512_shuffle_i32x4(lo01, lo23, 0x88);
    b[4 + j] = _mm512_shuffle_i32x4(lo01, lo23, 0xdd);
    b[8 + j] = _mm512_shuffle_i32x4(hi01, hi23, 0x88);
    b[12 + j] = _mm512_shuffle_i32x4(hi01, hi23, 0xdd);
  }
#  pragma GCC unroll 16
  for (int i = 0; i < 16; ++i) {
    if (i >= cols) break;
    if (AllRows) {
      _mm512_storeu_si512(dst + i * dst_stride, b[i]);
    } else {
      _mm512_mask_storeu_epi32(dst + i * dst_stride, out, b[i]);
    }
  }
}

LRK_FN void transpose(uint32_t* dst, int64_t dst_stride, const uint32_t* src, int64_t src_stride,
                      int64_t rows, int64_t cols) {
  for (int64_t i = 0; i < rows; i += 16) {
    const int m = rows - i < 16 ? static_cast<int>(rows - i) : 16;
    for (int64_t j = 0; j < cols; j += 16) {
      const int n = cols - j < 16 ? static_cast<int>(cols - j) : 16;
      uint32_t* to = dst + j * dst_stride + i;
      const uint32_t* from = src + i * src_stride + j;
      if (m == 16) {
        transpose_16<true>(to, dst_stride, from, src_stride, 16, n);
      } else {
        transpose_16<false>(to, dst_stride, from, src_stride, m, n);
      }
    }
  }
}

#else

#  if defined(LRK_HAS_AVX2)

// 8 x 8 words.
LRK_INLINE void transpose_8(uint32_t* dst, int64_t dst_stride, const uint32_t* src,
                            int64_t src_stride) {
  __m256 a[8], b[8];
#    pragma GCC unroll 8
  for (int i = 0; i < 8; ++i) {
    __builtin_prefetch(src + (i + kRowsAhead) * src_stride);
    a[i] = _mm256_loadu_ps((const float*)(src + i * src_stride));
  }
#    pragma GCC unroll 4
  for (int i = 0; i < 8; i += 2) {
    b[i] = _mm256_unpacklo_ps(a[i], a[i + 1]);
    b[i + 1] = _mm256_unpackhi_ps(a[i], a[i + 1]);
  }
#    pragma GCC unroll 2
  for (int i = 0; i < 8; i += 4) {
    a[i] = _mm256_shuffle_ps(b[i], b[i + 2], 0x44);
    a[i + 1] = _mm256_shuffle_ps(b[i], b[i + 2], 0xee);
    a[i + 2] = _mm256_shuffle_ps(b[i + 1], b[i + 3], 0x44);
    a[i + 3] = _mm256_shuffle_ps(b[i + 1], b[i + 3], 0xee);
  }
  // a[4 g + j] now holds, in 128-bit lane q, rows 4 g .. 4 g + 3 of column 4 q + j.
#    pragma GCC unroll 4
  for (int j = 0; j < 4; ++j) {
    b[j] = _mm256_permute2f128_ps(a[j], a[4 + j], 0x20);
    b[4 + j] = _mm256_permute2f128_ps(a[j], a[4 + j], 0x31);
  }
#    pragma GCC unroll 8
  for (int i = 0; i < 8; ++i) _mm256_storeu_ps((float*)(dst + i * dst_stride), b[i]);
}

#  endif

LRK_FN void transpose(uint32_t* dst, int64_t dst_stride, const uint32_t* src, int64_t src_stride,
                      int64_t rows, int64_t cols) {
  for (int64_t i = 0; i < rows; i += 8) {
    const int64_t end = rows - i < 8 ? rows : i + 8;
    int64_t j = 0;
#  if defined(LRK_HAS_AVX2)
    for (; end == i + 8 && j + 8 <= cols; j += 8) {
      transpose_8(dst + j * dst_stride + i, dst_stride, src + i * src_stride + j, src_stride);
    }
#  endif
    for (; j < cols; ++j) {
      for (int64_t k = i; k < end; ++k) dst[j * dst_stride + k] = src[k * src_stride + j];
    }
  }
}

#endif

template <typename T>
LRK_FN void store_typed(T* dst, int64_t dst_stride, const float* src, int64_t src_stride,
                        int64_t rows, int64_t cols, float scale) {
  for (int64_t i = 0; i < rows; ++i) {
    const float* in = src + i * src_stride;
    T* out = dst + i * dst_stride;
    int64_t j = 0;
    for (; j + kWidth <= cols; j += kWidth) store(out + j, load(in + j) * scale);
    if (j < cols) store_part(out + j, load_part(in + j, cols - j) * scale, cols - j);
  }
}

LRK_FN void store_rows(void* dst, Dtype dtype, int64_t dst_stride, const float* src,
                       int64_t src_stride, int64_t rows, int64_t cols, float scale) {
  switch (dtype) {
    case Dtype::kFloat32:
      return store_typed(static_cast<float*>(dst), dst_stride, src, src_stride, rows, cols, scale);
    case Dtype::kBFloat16:
      return store_typed(static_cast<BFloat16*>(dst), dst_stride, src, src_stride, rows, cols,
                         scale);
    case Dtype::kCoded:
      return;  // it is staged first
    case Dtype::kFloat16:
      return store_typed(static_cast<Float16*>(dst), dst_stride, src, src_stride, rows, cols,
                         scale);
  }
}

// `Vecs` whole registers. All loads come before all stores: at a row stride of 4 KiB a load looks
// to the processor like a repeat of the store one row up, and waits for it.
template <int Vecs, typename T>
LRK_INLINE void add_whole(T* dst, const float* src, float scale, const VecI* keep) {
  VecF sum[Vecs];
#pragma GCC unroll 8
  for (int v = 0; v < Vecs; ++v) {
    VecF correction = load(src + v * kWidth);
    if (keep) correction = (VecF)((VecI)correction & keep[v]);
    sum[v] = mul_add(splat(scale), correction, load(dst + v * kWidth));
  }
#pragma GCC unroll 8
  for (int v = 0; v < Vecs; ++v) store(dst + v * kWidth, sum[v]);
}

// Fewer columns than a register; src is padded to whole panels, so reading past n is safe there.
template <typename T>
LRK_INLINE void add_part(T* dst, const float* src, int64_t n, float scale, const VecI* keep) {
  VecF correction = load(src);
  if (keep) correction = (VecF)((VecI)correction & *keep);
  store_part(dst, mul_add(splat(scale), correction, load_part(dst, n)), n);
}

template <typename T>
LRK_FN void add_typed(T* dst, int64_t dst_stride, const float* src, int64_t src_stride,
                      int64_t rows, int64_t cols, float scale, const Dropout* dropout, int64_t row,
                      int64_t col) {
  for (int64_t i = 0; i < rows; ++i) {
    const float* in = src + i * src_stride;
    T* out = dst + i * dst_stride;
    int64_t j = 0;
    if (dropout) {
      for (; j < cols; j += 2 * kWidth) {
        const Words words = draw(*dropout, row + i, col + j);
        const VecI keep[2] = {kept(words.lo, *dropout), kept(words.hi, *dropout)};
        const int64_t n = cols - j;
        if (n >= 2 * kWidth) {
          add_whole<2>(out + j, in + j, scale, keep);
        } else if (n >= kWidth) {
          add_whole<1>(out + j, in + j, scale, keep);
          if (n > kWidth) {
            add_part(out + j + kWidth, in + j + kWidth, n - kWidth, scale, keep + 1);
          }
        } else {
          add_part(out + j, in + j, n, scale, keep);
        }
      }
    } else {
      for (; j + 8 * kWidth <= cols; j += 8 * kWidth) {
        add_whole<8>(out + j, in + j, scale, nullptr);
      }
      for (; j + kWidth <= cols; j += kWidth) add_whole<1>(out + j, in + j, scale, nullptr);
      if (j < cols) add_part(out + j, in + j, cols - j, scale, nullptr);
    }
  }
}

LRK_FN void add_rows(void* dst, Dtype dtype, int64_t dst_stride, const float* src,
                     int64_t src_stride, int64_t rows, int64_t cols, float scale,
                     const Dropout* dropout, int64_t row, int64_t col) {
  switch (dtype) {
    case Dtype::kFloat32:
      return add_typed(static_cast<float*>(dst), dst_stride, src, src_stride, rows, cols, scale,
                       dropout, row, col);
    case Dtype::kBFloat16:
      return add_typed(static_cast<BFloat16*>(dst), dst_stride, src, src_stride, rows, cols, scale,
                       dropout, row, col);
    case Dtype::kCoded:
      return;  // it is staged first
    case Dtype::kFloat16:
      return add_typed(static_cast<Float16*>(dst), dst_stride, src, src_stride, rows, cols, scale,
                       dropout, row, col);
  }
}

// ---- column scales ------------------------------------------------------------------------------

template <typename T>
LRK_FN void scale_columns_typed(T* dst, int64_t dst_stride, const T* src, int64_t src_stride,
                                int64_t rows, int64_t cols, const float* scale, const float* bias) {
  const int64_t whole = cols / kWidth * kWidth, rest = cols - whole;
  for (int64_t i = 0; i < rows; ++i) {
    const T* in = src + i * src_stride;
    T* out = dst + i * dst_stride;
    for (int64_t j = 0; j < whole; j += kWidth) {
      VecF value = load(in + j);
      if (scale) value *= load(scale + j);
      if (bias) value += load(bias + j);
      store(out + j, value);
    }
    if (rest) {
      VecF value = load_part(in + whole, rest);
      if (scale) value *= load_part(scale + whole, rest);
      if (bias) value += load_part(bias + whole, rest);
      store_part(out + whole, value, rest);
    }
  }
}

// One row: dst = scale ∘ src over `Vecs` registers, inner += src * u, each where it is wanted; all
// loads before all stores.
template <int Vecs, typename T>
LRK_INLINE void scale_grad_whole(T* dst, const T* src, const T* u, const float* scale,
                                 float* inner) {
  VecF value[Vecs], product[Vecs];
#pragma GCC unroll 8
  for (int v = 0; v < Vecs; ++v) {
    value[v] = load(src + v * kWidth);
    if (u) product[v] = mul_add(value[v], load(u + v * kWidth), load(inner + v * kWidth));
  }
#pragma GCC unroll 8
  for (int v = 0; v < Vecs; ++v) {
    if (dst) store(dst + v * kWidth, load(scale + v * kWidth) * value[v]);
    if (u) store(inner + v * kWidth, product[v]);
  }
}

template <typename T>
LRK_FN void scale_grad_typed(T* dst, int64_t dst_stride, const T* src, int64_t src_stride,
                             const T* u, int64_t u_stride, int64_t rows, int64_t cols,
                             const float* scale, float* inner) {
  for (int64_t i = 0; i < rows; ++i) {
    const T* in = src + i * src_stride;
    const T* other = u ? u + i * u_stride : nullptr;
    T* out = dst ? dst + i * dst_stride : nullptr;
    int64_t j = 0;
    for (; j + 4 * kWidth <= cols; j += 4 * kWidth) {
      scale_grad_whole<4>(out ? out + j : nullptr, in + j, other ? other + j : nullptr, scale + j,
                          inner + j);
    }
    for (; j + kWidth <= cols; j += kWidth) {
      scale_grad_whole<1>(out ? out + j : nullptr, in + j, other ? other + j : nullptr, scale + j,
                          inner + j);
    }
    if (j < cols) {
      const int64_t n = cols - j;
      const VecF value = load_part(in + j, n);
      if (out) store_part(out + j, load_part(scale + j, n) * value, n);
      if (u) {
        const VecF product = mul_add(value, load_part(other + j, n), load_part(inner + j, n));
        store_part(inner + j, product, n);
      }
    }
  }
}

LRK_FN void scale_columns(void* dst, Dtype dtype, int64_t dst_stride, const void* src,
                          int64_t src_stride, int64_t rows, int64_t cols, const float* scale,
                          const float* bias) {
  switch (dtype) {
    case Dtype::kFloat32:
      return scale_columns_typed(static_cast<float*>(dst), dst_stride,
                                 static_cast<const float*>(src), src_stride, rows, cols, scale,
                                 bias);
    case Dtype::kBFloat16:
      return scale_columns_typed(static_cast<BFloat16*>(dst), dst_stride,
                                 static_cast<const BFloat16*>(src), src_stride, rows, cols, scale,
                                 bias);
    case Dtype::kCoded:
      return;  // it is staged first
    case Dtype::kFloat16:
      return scale_columns_typed(static_cast<Float16*>(dst), dst_stride,
                                 static_cast<const Float16*>(src), src_stride, rows, cols, scale,
                                 bias);
  }
}

LRK_FN void scale_grad(void* dst, Dtype dtype, int64_t dst_stride, const void* src,
                       int64_t src_stride, const void* u, int64_t u_stride, int64_t rows,
                       int64_t cols, const float* scale, float* inner) {
  switch (dtype) {
    case Dtype::kFloat32:
      return scale_grad_typed(static_cast<float*>(dst), dst_stride, static_cast<const float*>(src),
                              src_stride, static_cast<const float*>(u), u_stride, rows, cols, scale,
                              inner);
    case Dtype::kBFloat16:
      return scale_grad_typed(static_cast<BFloat16*>(dst), dst_stride,
                              static_cast<const BFloat16*>(src), src_stride,
                              static_cast<const BFloat16*>(u), u_stride, rows, cols, scale, inner);
    case Dtype::kCoded:
      return;  // it is staged first
    case Dtype::kFloat16:
      return scale_grad_typed(static_cast<Float16*>(dst), dst_stride,
                              static_cast<const Float16*>(src), src_stride,
                              static_cast<const Float16*>(u), u_stride, rows, cols, scale, inner);
  }
}

// ---- products with a factor read once -----------------------------------------------------------

// Halves added to each other until one float is left.
LRK_INLINE float lane_sum(VecF v) {
  typedef float Lanes4 __attribute__((vector_size(16)));
#if LRK_W > 4
  typedef float Lanes8 __attribute__((vector_size(32)));
#endif
#if LRK_W == 16
  Lanes8 eights[2];
  __builtin_memcpy(eights, &v, sizeof(v));
  const Lanes8 eight = eights[0] + eights[1];
#elif LRK_W == 8
  const Lanes8 eight = v;
#endif
#if LRK_W > 4
  Lanes4 fours[2];
  __builtin_memcpy(fours, &eight, sizeof(eight));
  const Lanes4 four = fours[0] + fours[1];
#else
  const Lanes4 four = v;
#endif
  return (four[0] + four[2]) + (four[1] + four[3]);
}

template <int Rows, int Ranks, typename T>
LRK_INLINE void add_dots(VecF (&acc)[Rows][Ranks], const float* const* x, const T* factor,
                         int64_t factor_stride, int64_t cols) {
  int64_t k = 0;
  for (; k + kWidth <= cols; k += kWidth) {
    VecF left[Rows];
#pragma GCC unroll 4
    for (int i = 0; i < Rows; ++i) left[i] = load(x[i] + k);
#pragma GCC unroll 8
    for (int r = 0; r < Ranks; ++r) {
      const T* at = factor + r * factor_stride + k;
      // The rows after these come next, and no hardware guesses where a row a page away begins.
      if ((k & (64 / sizeof(T) - 1)) == 0) __builtin_prefetch(at + Ranks * factor_stride, 0, 2);
      const VecF right = load(at);
#pragma GCC unroll 4
      for (int i = 0; i < Rows; ++i) acc[i][r] = mul_add(left[i], right, acc[i][r]);
    }
  }
  if (k < cols) {
    for (int r = 0; r < Ranks; ++r) {
      const VecF right = load_part(factor + r * factor_stride + k, cols - k);
      for (int i = 0; i < Rows; ++i) {
        acc[i][r] = mul_add(load_part(x[i] + k, cols - k), right, acc[i][r]);
      }
    }
  }
}

// Rows x Ranks running sums, a lane apart; the order of a sum is the same whatever Rows and Ranks.
template <int Rows, int Ranks, typename T>
LRK_INLINE void dot_tile(float* out, int64_t out_stride, int64_t i0, int64_t r0, const Dots& dots,
                         const Dots* more) {
  VecF acc[Rows][Ranks] = {};
  add_dots(acc, dots.x + i0, static_cast<const T*>(dots.factor) + r0 * dots.stride, dots.stride,
           dots.cols);
  if (more) {
    add_dots(acc, more->x + i0, static_cast<const float*>(more->factor) + r0 * more->stride,
             more->stride, more->cols);
  }
  for (int i = 0; i < Rows; ++i) {
    for (int r = 0; r < Ranks; ++r) out[(i0 + i) * out_stride + r0 + r] = lane_sum(acc[i][r]);
  }
}

// The same over rows of codes, in two running sums each: one would wait for itself.
template <int Rows, int Ranks>
LRK_INLINE void dot_coded_tile(float* out, int64_t out_stride, int64_t i0, int64_t r0,
                               const Dots& dots, const Dots* more) {
  constexpr int64_t kBlocks = 32;  // whose scales are worked out at a time
  const Coded& w = *static_cast<const Coded*>(dots.factor);
  const NibbleOrder order = nibble_order(w);
  const int64_t size = w.run ? w.run : w.block_cols, blocks = dots.cols / size;
  const uint8_t* data = w.data + (dots.row + r0) * w.cols / 2;
  const int64_t stride = w.cols / 2;
  float scales[Ranks][kBlocks];
  VecF acc[Rows][Ranks] = {}, other[Rows][Ranks] = {};
  for (int64_t b = 0; b < blocks; ++b) {
    ByteBook books[Ranks];
#pragma GCC unroll 8
    for (int r = 0; r < Ranks; ++r) {
      const int64_t block = first_block(w, dots.row + r0 + r) + b;
      if (b % kBlocks == 0) {
        block_scales(scales[r], w, block, blocks - b < kBlocks ? blocks - b : kBlocks, 1);
      }
      books[r] = byte_book(w, block_zero(w, block), scales[r][b % kBlocks]);
      __builtin_prefetch(data + (Ranks + r) * stride, 0, 2);
    }
    for (int64_t k = b * size; k < (b + 1) * size; k += 32, data += 16) {
#pragma GCC unroll 8
      for (int r = 0; r < Ranks; ++r) {
        VecF right[32 / kWidth];
        widen_32(right, look_up_32(books[r], data + r * stride, order));
#pragma GCC unroll 4
        for (int i = 0; i < Rows; ++i) {
          const float* left = dots.x[i0 + i] + k;
#pragma GCC unroll 8
          for (int v = 0; v < 32 / kWidth; v += 2) {
            acc[i][r] = mul_add(load(left + v * kWidth), right[v], acc[i][r]);
            other[i][r] = mul_add(load(left + (v + 1) * kWidth), right[v + 1], other[i][r]);
          }
        }
      }
    }
  }
  for (int i = 0; i < Rows; ++i) {
    for (int r = 0; r < Ranks; ++r) acc[i][r] += other[i][r];
  }
  if (more) {
    add_dots(acc, more->x + i0, static_cast<const float*>(more->factor) + r0 * more->stride,
             more->stride, more->cols);
  }
  for (int i = 0; i < Rows; ++i) {
    for (int r = 0; r < Ranks; ++r) out[(i0 + i) * out_stride + r0 + r] = lane_sum(acc[i][r]);
  }
}

template <int Rows>
LRK_FN void dot_coded_rows(float* out, int64_t out_stride, int64_t i0, int64_t rank,
                           const Dots& dots, const Dots* more) {
  constexpr int kRanks = Rows <= 2 ? 2 : 1;
  int64_t r = 0;
  for (; r + kRanks <= rank; r += kRanks) {
    dot_coded_tile<Rows, kRanks>(out, out_stride, i0, r, dots, more);
  }
  for (; r < rank; ++r) dot_coded_tile<Rows, 1>(out, out_stride, i0, r, dots, more);
}

LRK_FN void dot_coded(float* out, int64_t out_stride, int64_t rows, int64_t rank, const Dots& dots,
                      const Dots* more) {
  int64_t i = 0;
  for (; i + 4 <= rows; i += 4) dot_coded_rows<4>(out, out_stride, i, rank, dots, more);
  if (i + 3 == rows) dot_coded_rows<3>(out, out_stride, i, rank, dots, more);
  if (i + 2 == rows) dot_coded_rows<2>(out, out_stride, i, rank, dots, more);
  if (i + 1 == rows) dot_coded_rows<1>(out, out_stride, i, rank, dots, more);
}

template <int Rows, typename T>
LRK_FN void dot_some_rows(float* out, int64_t out_stride, int64_t i0, int64_t rank,
                          const Dots& dots, const Dots* more) {
  // As many sums as registers hold, and enough of them to hide an addition's latency.
  constexpr int kRanks = LRK_W == 16 ? (Rows > 2 ? 4 : 8) : (Rows == 1 ? 4 : 2);
  int64_t r = 0;
  for (; r + kRanks <= rank; r += kRanks) {
    dot_tile<Rows, kRanks, T>(out, out_stride, i0, r, dots, more);
  }
  for (; r < rank; ++r) dot_tile<Rows, 1, T>(out, out_stride, i0, r, dots, more);
}

template <typename T>
LRK_FN void dot_rows_typed(float* out, int64_t out_stride, int64_t rows, int64_t rank,
                           const Dots& dots, const Dots* more) {
  int64_t i = 0;
  for (; i + 4 <= rows; i += 4) dot_some_rows<4, T>(out, out_stride, i, rank, dots, more);
  if (i + 3 == rows) dot_some_rows<3, T>(out, out_stride, i, rank, dots, more);
  if (i + 2 == rows) dot_some_rows<2, T>(out, out_stride, i, rank, dots, more);
  if (i + 1 == rows) dot_some_rows<1, T>(out, out_stride, i, rank, dots, more);
}

LRK_FN void dot_rows(float* out, int64_t out_stride, int64_t rows, int64_t rank, const Dots& dots,
                     const Dots* more) {
  switch (dots.dtype) {
    case Dtype::kFloat32:
      return dot_rows_typed<float>(out, out_stride, rows, rank, dots, more);
    case Dtype::kBFloat16:
      return dot_rows_typed<BFloat16>(out, out_stride, rows, rank, dots, more);
    case Dtype::kCoded:
      return dot_coded(out, out_stride, rows, rank, dots, more);
    case Dtype::kFloat16:
      return dot_rows_typed<Float16>(out, out_stride, rows, rank, dots, more);
  }
}

// Rows x (Vecs registers) of the result. The rows after these are asked for while these are read.
template <int Rows, int Vecs, typename T>
LRK_INLINE void mix_strip(const Mix& m, int64_t i0, int64_t j0) {
  const T* factor = static_cast<const T*>(m.factor) + j0;
  const float* p = m.p + i0 * m.p_stride;
  float* out = m.out + i0 * m.out_stride + j0;
  VecF acc[Rows][Vecs] = {};
  for (int64_t r = 0; r < m.rank; ++r) {
    const T* line = factor + r * m.factor_stride;
    for (int v = 0; v < Vecs * kWidth; v += 64 / sizeof(T)) {
      __builtin_prefetch(line + m.rank * m.factor_stride + v, 0, 2);
    }
    VecF right[Vecs];
#pragma GCC unroll 8
    for (int v = 0; v < Vecs; ++v) right[v] = load(line + v * kWidth);
#pragma GCC unroll 4
    for (int i = 0; i < Rows; ++i) {
      const VecF left = splat(p[i * m.p_stride + r]);
#pragma GCC unroll 8
      for (int v = 0; v < Vecs; ++v) acc[i][v] = mul_add(left, right[v], acc[i][v]);
    }
  }
#pragma GCC unroll 4
  for (int i = 0; i < Rows; ++i) {
#pragma GCC unroll 8
    for (int v = 0; v < Vecs; ++v) {
      float* to = out + i * m.out_stride + v * kWidth;
      store(to, m.accumulate ? load(to) + acc[i][v] : acc[i][v]);
    }
  }
}

template <int Rows, typename T>
LRK_FN void mix_some_rows(const Mix& m, int64_t i0) {
  constexpr int kVecs = LRK_W == 16 ? (Rows == 4 ? 4 : 8) : 2;
  int64_t j = 0;
  for (; j + kVecs * kWidth <= m.cols; j += kVecs * kWidth) mix_strip<Rows, kVecs, T>(m, i0, j);
  for (; j + kWidth <= m.cols; j += kWidth) mix_strip<Rows, 1, T>(m, i0, j);
  if (j == m.cols) return;
  VecF acc[Rows] = {};
  for (int64_t r = 0; r < m.rank; ++r) {
    const VecF right =
        load_part(static_cast<const T*>(m.factor) + r * m.factor_stride + j, m.cols - j);
    for (int i = 0; i < Rows; ++i) {
      acc[i] = mul_add(splat(m.p[(i0 + i) * m.p_stride + r]), right, acc[i]);
    }
  }
  for (int i = 0; i < Rows; ++i) {
    float* to = m.out + (i0 + i) * m.out_stride + j;
    store_part(to, m.accumulate ? load_part(to, m.cols - j) + acc[i] : acc[i], m.cols - j);
  }
}

template <typename T>
LRK_FN void mix_rows_typed(const Mix& m) {
  int64_t i = 0;
  for (; i + 4 <= m.rows; i += 4) mix_some_rows<4, T>(m, i);
  for (; i + 2 <= m.rows; i += 2) mix_some_rows<2, T>(m, i);
  if (i < m.rows) mix_some_rows<1, T>(m, i);
}

// One row of a result, from rows of codes: 32 * Groups columns at a time, all under one scale.
template <int Groups>
LRK_INLINE void mix_coded_strip(const Mix& m, int64_t j) {
  constexpr int64_t kRows = 32;  // whose scales are worked out at a time
  const Coded& w = *static_cast<const Coded*>(m.factor);
  const NibbleOrder order = nibble_order(w);
  const int64_t col = m.col + j, block = col / (w.run ? w.run : w.block_cols);
  constexpr int kVecs = 32 / kWidth;
  float scales[kRows];
  VecF acc[Groups][kVecs] = {};
  for (int64_t r = 0; r < m.rank; ++r) {
    const int64_t at = first_block(w, m.row + r) + block;
    if (w.run && r % kRows == 0) {
      block_scales(scales, w, at, m.rank - r < kRows ? m.rank - r : kRows, w.cols / w.run);
    }
    const float scale = w.run ? scales[r % kRows] : block_scale(w, at);
    const uint8_t* data = w.data + ((m.row + r) * w.cols + col) / 2;
    __builtin_prefetch(data + m.rank * w.cols / 2, 0, 2);
    const ByteBook book = byte_book(w, block_zero(w, at), scale);
    const VecF left = splat(m.p[r]);
#pragma GCC unroll 2
    for (int g = 0; g < Groups; ++g) {
      VecF right[kVecs];
      widen_32(right, look_up_32(book, data + 16 * g, order));
#pragma GCC unroll 8
      for (int v = 0; v < kVecs; ++v) acc[g][v] = mul_add(left, right[v], acc[g][v]);
    }
  }
  for (int g = 0; g < Groups; ++g) {
    for (int v = 0; v < kVecs; ++v) {
      float* to = m.out + j + 32 * g + v * kWidth;
      store(to, m.accumulate ? load(to) + acc[g][v] : acc[g][v]);
    }
  }
}

LRK_FN void mix_coded(const Mix& m) {
  const Coded& w = *static_cast<const Coded*>(m.factor);
  const int64_t size = w.run ? w.run : w.block_cols;
  int64_t j = 0;
  for (; size % 64 == 0 && m.col % 64 == 0 && j + 64 <= m.cols; j += 64) mix_coded_strip<2>(m, j);
  for (; j < m.cols; j += 32) mix_coded_strip<1>(m, j);
}

LRK_FN void mix_rows(const Mix& m) {
  switch (m.dtype) {
    case Dtype::kFloat32:
      return mix_rows_typed<float>(m);
    case Dtype::kBFloat16:
      return mix_rows_typed<BFloat16>(m);
    case Dtype::kCoded:
      return mix_coded(m);
    case Dtype::kFloat16:
      return mix_rows_typed<Float16>(m);
  }
}

constexpr KernelTable float_table() {
  return {LRK_ISA_NAME,  stage_float, stage_bfloat16, multiply_float, nullptr,
          nullptr,       transpose,   nullptr,        store_rows,     add_rows,
          scale_columns, scale_grad,  keep_mask,      dot_rows,       mix_rows};
}

}  // namespace LRK_ISA
}  // namespace lrk

#undef LRK_FN
#undef LRK_INLINE
