// conv: patches for a product, and depthwise 3 x 3 with its residual
// layout   channels-last grids, so that a patch row is `size` contiguous runs and a tap is one vector of channels
// mapping  conv_patches: one task per output row of a grid; conv_depthwise: one task per grid row
// moves    conv_patches: image size^2 / stride^2 times (from cache), out once; conv_depthwise: x once (3 rows in L2), out once
// tried    -
#include "ops/conv/conv.h"

#include "base/simd.h"

namespace engine::cpu::ENGINE_NS {

void conv_patches(const ConvPatchesParams& p, Ctx& ctx) {
  const int64_t oh = conv_out(p.height, p.size, p.stride, p.pad), ow = conv_out(p.width, p.size, p.stride, p.pad);
  const int64_t c = p.channels;
  for (int64_t task; (task = claim(ctx)) < p.batch * oh;) {
    const int64_t b = task / oh, oy = task % oh;
    for (int64_t ox = 0; ox < ow; ++ox) {
      float* out = p.out + (task * ow + ox) * p.ldo;
      for (int64_t ky = 0; ky < p.size; ++ky) {
        const int64_t y = oy * p.stride - p.pad + ky;
        for (int64_t kx = 0; kx < p.size; ++kx, out += c) {
          const int64_t x = ox * p.stride - p.pad + kx;
          if (y < 0 || y >= p.height || x < 0 || x >= p.width) {
            memset(out, 0, size_t(c) * 4);
            continue;
          }
          const int64_t at = ((b * p.height + y) * p.width + x) * c;
          if (p.kind == 0 && !p.scale) {
            memcpy(out, static_cast<const float*>(p.image) + at, size_t(c) * 4);
            continue;
          }
          for (int64_t i = 0; i < c; ++i) {
            const float v = p.kind == 0 ? static_cast<const float*>(p.image)[at + i]
                                        : float(static_cast<const uint8_t*>(p.image)[at + i]);
            out[i] = p.scale ? v * p.scale[i] + p.offset[i] : v;
          }
        }
      }
    }
  }
}

void conv_depthwise(const ConvDepthwiseParams& p, Ctx& ctx) {
  const int64_t c = p.channels, w = p.width;
  for (int64_t task; (task = claim(ctx)) < p.batch * p.height;) {
    const int64_t b = task / p.height, y = task % p.height;
    const float* grid = p.x + b * p.height * w * c;
    for (int64_t i = 0; i < c; i += 16) {
      const int64_t n = c - i;
      F16 taps[9];
      for (int t = 0; t < 9; ++t) taps[t] = loadn(p.w + t * c + i, n);
      const F16 bias = loadn(p.bias + i, n);
      for (int64_t x = 0; x < w; ++x) {
        F16 sum = bias;
        for (int64_t ky = 0; ky < 3; ++ky) {
          const int64_t gy = y + ky - 1;
          if (gy < 0 || gy >= p.height) continue;
          for (int64_t kx = 0; kx < 3; ++kx) {
            const int64_t gx = x + kx - 1;
            if (gx < 0 || gx >= w) continue;
            sum = fma(taps[ky * 3 + kx], loadn(grid + (gy * w + gx) * c + i, n), sum);
          }
        }
        const int64_t at = (y * w + x) * c + i;
        storen(p.out + b * p.height * w * c + at, add(loadn(grid + at, n), sum), n);
      }
    }
  }
}

}  // namespace engine::cpu::ENGINE_NS
