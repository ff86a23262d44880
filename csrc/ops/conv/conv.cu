// conv: patches for a product, and depthwise 3 x 3 with its residual
// layout   channels-last grids: neighbouring threads take neighbouring channels
// mapping  conv_patches: a block per output row (one window). conv_depthwise: a block per cell and 256 channels
// moves    conv_patches: image size^2 / stride^2 times (from L2), out once; conv_depthwise: x once (nine times from L2), out once
// tried    README.md
#include "ops/conv/conv.h"

#include "base/launch.h"
#include "base/ptx.cuh"

namespace engine::cuda {
namespace {

constexpr int kThreads = 256;

__global__ void __launch_bounds__(kThreads) conv_patches_kernel(ConvPatchesParams p, int oh, int ow) {
  release_next();
  wait_for_previous();
  const int64_t row = blockIdx.x, c = p.channels, b = row / (int64_t(oh) * ow);
  const int64_t oy = row / ow % oh, ox = row % ow;
  float* out = p.out + row * p.ldo;
  const int64_t values = p.size * p.size * c;
  for (int64_t at = threadIdx.x; at < values; at += kThreads) {
    const int64_t i = at % c, kx = at / c % p.size, ky = at / c / p.size;
    const int64_t y = oy * p.stride - p.pad + ky, x = ox * p.stride - p.pad + kx;
    float v = 0.f;
    if (y >= 0 && y < p.height && x >= 0 && x < p.width) {
      const int64_t from = ((b * p.height + y) * p.width + x) * c + i;
      v = p.kind == 0 ? static_cast<const float*>(p.image)[from] : float(static_cast<const uint8_t*>(p.image)[from]);
      if (p.scale) v = v * p.scale[i] + p.offset[i];
    }
    out[at] = v;
  }
}

__global__ void __launch_bounds__(kThreads) conv_depthwise_kernel(ConvDepthwiseParams p) {
  release_next();
  wait_for_previous();
  const int64_t cell = blockIdx.x, c = p.channels, i = int64_t(blockIdx.y) * kThreads + threadIdx.x;
  if (i >= c) return;
  const int64_t x = cell % p.width, y = cell / p.width % p.height;
  float sum = p.bias[i];
#pragma unroll
  for (int ky = 0; ky < 3; ++ky)
#pragma unroll
    for (int kx = 0; kx < 3; ++kx) {
      const int64_t gy = y + ky - 1, gx = x + kx - 1;
      if (gy < 0 || gy >= p.height || gx < 0 || gx >= p.width) continue;
      sum = fmaf(p.w[(ky * 3 + kx) * c + i], p.x[(cell + (ky - 1) * p.width + kx - 1) * c + i], sum);
    }
  p.out[cell * c + i] = p.x[cell * c + i] + sum;
}

}  // namespace

void conv_patches(const ConvPatchesParams& p, void* stream) {
  const int oh = int(conv_out(p.height, p.size, p.stride, p.pad)), ow = int(conv_out(p.width, p.size, p.stride, p.pad));
  const Launch l = {unsigned(p.batch * oh * ow), kThreads, 0, stream, true};
  launch("conv_patches", conv_patches_kernel, l, p, oh, ow);
}

void conv_depthwise(const ConvDepthwiseParams& p, void* stream) {
  const unsigned cells = unsigned(p.batch * p.height * p.width);
  const Launch l = {{cells, unsigned((p.channels + kThreads - 1) / kThreads)}, kThreads, 0, stream, true};
  launch("conv_depthwise", conv_depthwise_kernel, l, p);
}

}  // namespace engine::cuda
