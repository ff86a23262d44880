// Codes shared by Python and every kernel. Weight formats are the packed ones of csrc/ops/gemm.
#pragma once
#include <cstdint>

namespace engine {

enum DType : int32_t { kF32 = 0, kBF16 = 1, kF16 = 2 };

enum WeightFormat : int32_t {
  kW_F32 = 0,   // fp32 codes, fp32 activations
  kW_BF16 = 1,  // bf16 codes, activations rounded to bf16
  kW_I8 = 2,    // u8 codes (zero point 128), fp16 scale per group, activations int8 per group
  kW_I4 = 3,    // u4 codes (zero point 8), fp16 scale per group, activations int8 per group
};

enum Prologue : int32_t {
  kProNone = 0,
  kProRmsNorm = 1,         // x * rsqrt(mean(x^2) + eps)
  kProGatedGroupNorm = 2,  // x * silu(z), then rms over groups of channels
  kProLayerNorm = 3,       // (x - mean) * rsqrt(var + eps)
  kProGlu = 4,             // act(x) * z
};

enum Act : int32_t {
  kActNone = 0,
  kActRelu2 = 1,
  kActSilu = 2,
  kActGeluTanh = 3,
  kActGeluErf = 4,
  kActRelu = 5,
  kActQuickGelu = 6,  // x * sigmoid(1.702 x)
};

}  // namespace engine
