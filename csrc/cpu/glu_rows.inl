// Activations and their derivatives in float32, once per instruction set. The including file
// defines LRK_ISA (a namespace), LRK_TARGET (the attribute that enables the instructions, may be
// empty) and LRK_W (floats in a register).

namespace lrk {
namespace LRK_ISA {

typedef float VecF __attribute__((vector_size(4 * LRK_W)));
typedef int32_t VecI __attribute__((vector_size(4 * LRK_W)));

#define LRK_INLINE LRK_TARGET __attribute__((always_inline)) static inline

LRK_INLINE VecF splat(float value) { return value - VecF{}; }
LRK_INLINE VecF select(VecI mask, VecF a, VecF b) {
  return (VecF)(((VecI)a & mask) | ((VecI)b & ~mask));
}

// e^x to about 1 unit in the last place: x = n log 2 + r, and a polynomial of r in [-0.35, 0.35].
// Infinite above 88.7, 0 below -87.3; NaN stays.
LRK_INLINE VecF exponential(VecF x) {
  const VecI over = (VecI)(x > 88.72f), under = (VecI)(x < -87.33f);
  const VecF inside = select(over | under, VecF{}, x);
  constexpr float kRound = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer
  const VecF shifted = inside * 1.44269504f + kRound;
  const VecF n = shifted - kRound;
  const VecF r = (inside - n * 0.693359375f) - n * -2.12194440e-4f;
  VecF p = splat(1.0f / 5040.0f);
  p = p * r + 1.0f / 720.0f;
  p = p * r + 1.0f / 120.0f;
  p = p * r + 1.0f / 24.0f;
  p = p * r + 1.0f / 6.0f;
  p = p * r + 0.5f;
  p = p * (r * r) + (r + 1.0f);
  // 2^n in two factors: n may be 128.
  const VecI exponent = (VecI)shifted << 23 >> 23;
  const VecI half = exponent >> 1;
  const VecF scaled = p * (VecF)((half + 127) << 23) * (VecF)((exponent - half + 127) << 23);
  return select(over, splat(__builtin_inff()), select(under, VecF{}, scaled));
}

struct Slope {
  VecF value, gradient;  // f(z) and f'(z)
};

LRK_INLINE Slope slope(Activation f, VecF z) {
  if (f == Activation::kReluSquared) {
    const VecF positive = select((VecI)(z <= 0.0f), VecF{}, z);
    return {positive * positive, 2.0f * positive};
  }
  // z sigmoid(w): w is z, or, since (1 + tanh t) / 2 = sigmoid(2 t), what gives GELU by tanh.
  VecF w = z, inner = splat(1.0f);
  if (f == Activation::kGeluTanh) {
    constexpr float kTwice = 1.59576912f, kCube = 0.044715f;  // 2 sqrt(2 / pi)
    w = kTwice * (z + kCube * (z * z) * z);
    inner = kTwice * (1.0f + 3.0f * kCube * (z * z));
  }
  // e / (1 + e) is what 1 - share would lose digits of.
  const VecF e = exponential(-w), share = 1.0f / (1.0f + e);
  const VecF rest = select((VecI)(share == 0.0f), splat(1.0f), e * share);
  return {z * share, share * (1.0f + z * inner * rest)};
}

LRK_INLINE VecF load(const float* p) {
  VecF v;
  __builtin_memcpy(&v, p, sizeof(v));
  return v;
}

LRK_INLINE void store(float* p, VecF v) { __builtin_memcpy(p, &v, sizeof(v)); }

// f is a constant of each call below, so that the loop holds one activation alone.
LRK_INLINE void forward_step(Activation f, float* h, const float* gate, const float* up) {
  const VecF value = slope(f, load(gate)).value;
  store(h, up ? value * load(up) : value);
}

LRK_INLINE void backward_step(Activation f, float* grad_gate, float* grad_up, const float* grad_h,
                              const float* gate, const float* up) {
  const Slope s = slope(f, load(gate));
  const VecF dh = load(grad_h);
  if (up) {
    const VecF u = load(up);
    store(grad_up, dh * s.value);
    store(grad_gate, dh * u * s.gradient);
  } else {
    store(grad_gate, dh * s.gradient);
  }
}

// The last columns, fewer than a register holds, go through one that is filled up with zeros.
LRK_INLINE void forward_of(Activation f, float* h, const float* gate, const float* up, int64_t n) {
  int64_t i = 0;
  for (; i + LRK_W <= n; i += LRK_W) forward_step(f, h + i, gate + i, up ? up + i : nullptr);
  if (i == n) return;
  const size_t bytes = static_cast<size_t>(n - i) * sizeof(float);
  float z[LRK_W] = {}, u[LRK_W] = {}, out[LRK_W];
  __builtin_memcpy(z, gate + i, bytes);
  if (up) __builtin_memcpy(u, up + i, bytes);
  forward_step(f, out, z, up ? u : nullptr);
  __builtin_memcpy(h + i, out, bytes);
}

LRK_INLINE void backward_of(Activation f, float* grad_gate, float* grad_up, const float* grad_h,
                            const float* gate, const float* up, int64_t n) {
  int64_t i = 0;
  for (; i + LRK_W <= n; i += LRK_W) {
    if (up) {
      backward_step(f, grad_gate + i, grad_up + i, grad_h + i, gate + i, up + i);
    } else {
      backward_step(f, grad_gate + i, nullptr, grad_h + i, gate + i, nullptr);
    }
  }
  if (i == n) return;
  const size_t bytes = static_cast<size_t>(n - i) * sizeof(float);
  float dh[LRK_W] = {}, z[LRK_W] = {}, u[LRK_W] = {}, dz[LRK_W], du[LRK_W];
  __builtin_memcpy(dh, grad_h + i, bytes);
  __builtin_memcpy(z, gate + i, bytes);
  if (up) __builtin_memcpy(u, up + i, bytes);
  backward_step(f, dz, du, dh, z, up ? u : nullptr);
  __builtin_memcpy(grad_gate + i, dz, bytes);
  if (up) __builtin_memcpy(grad_up + i, du, bytes);
}

LRK_TARGET static void forward(Activation f, float* h, const float* gate, const float* up,
                               int64_t n) {
  switch (f) {
    case Activation::kSilu:
      return forward_of(Activation::kSilu, h, gate, up, n);
    case Activation::kGeluTanh:
      return forward_of(Activation::kGeluTanh, h, gate, up, n);
    case Activation::kReluSquared:
      return forward_of(Activation::kReluSquared, h, gate, up, n);
  }
}

LRK_TARGET static void backward(Activation f, float* grad_gate, float* grad_up, const float* grad_h,
                                const float* gate, const float* up, int64_t n) {
  switch (f) {
    case Activation::kSilu:
      return backward_of(Activation::kSilu, grad_gate, grad_up, grad_h, gate, up, n);
    case Activation::kGeluTanh:
      return backward_of(Activation::kGeluTanh, grad_gate, grad_up, grad_h, gate, up, n);
    case Activation::kReluSquared:
      return backward_of(Activation::kReluSquared, grad_gate, grad_up, grad_h, gate, up, n);
  }
}

#undef LRK_INLINE

}  // namespace LRK_ISA
}  // namespace lrk

#undef LRK_ISA
#undef LRK_TARGET
#undef LRK_W
