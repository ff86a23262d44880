// conv: convolutions over channels-last grids [B, H, W, C].
//
// conv_patches: rows of a convolution as a product (im2col): out[(b, oy, ox), (ky, kx, c)] = image[b, oy*stride - pad + ky,
//   ox*stride - pad + kx, c] * scale[c] + offset[c], 0 outside the grid. image u8 (kind 1) or f32 (kind 0); scale and
//   offset may be null (together).
// conv_depthwise: out = x + bias + sum over 3 x 3 of w[ky*3+kx, c] * x[b, y+ky-1, x+kx-1, c], 0 outside. out is not x.
#pragma once
#include "base/params.h"

namespace engine {

#define ENGINE_CONV_PATCHES_PARAMS(F)                                                                    \
  F(const void*, image) F(int32_t, kind) F(const float*, scale) F(const float*, offset) F(float*, out)   \
  F(int64_t, ldo) F(int64_t, batch) F(int64_t, height) F(int64_t, width) F(int64_t, channels)            \
  F(int64_t, size) F(int64_t, stride) F(int64_t, pad)
ENGINE_PARAMS(ConvPatchesParams, ENGINE_CONV_PATCHES_PARAMS)

#define ENGINE_CONV_DEPTHWISE_PARAMS(F)                                                            \
  F(const float*, x) F(const float*, w) F(const float*, bias) F(float*, out) F(int64_t, batch)     \
  F(int64_t, height) F(int64_t, width) F(int64_t, channels)
ENGINE_PARAMS(ConvDepthwiseParams, ENGINE_CONV_DEPTHWISE_PARAMS)

ENGINE_HD constexpr int64_t conv_out(int64_t n, int64_t size, int64_t stride, int64_t pad) {
  return (n + 2 * pad - size) / stride + 1;
}

}  // namespace engine
