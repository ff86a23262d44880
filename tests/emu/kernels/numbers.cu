// Every wrapper of ptx.cuh that computes, on values that Python chooses.
#include "base/ptx.cuh"
#include "probe.h"

namespace engine::cuda {
namespace {

// in: a [16,16] then b [8,16] (columns of B as rows), bf16; out: c [16,8], added to what is there.
__global__ void product_bf16(const uint16_t* in, float* out, int) {
  const unsigned lane = threadIdx.x, group = lane / 4, part = lane % 4;
  const auto pair = [&](const uint16_t* p) { return *reinterpret_cast<const uint32_t*>(p); };
  const uint16_t *a = in, *b = in + 256;
  const uint32_t fa[4] = {pair(a + group * 16 + 2 * part), pair(a + (group + 8) * 16 + 2 * part),
                          pair(a + group * 16 + 2 * part + 8), pair(a + (group + 8) * 16 + 2 * part + 8)};
  const uint32_t fb[2] = {pair(b + group * 16 + 2 * part), pair(b + group * 16 + 2 * part + 8)};
  float c[4];
  for (unsigned i = 0; i < 4; ++i) c[i] = out[(group + 8 * (i / 2)) * 8 + 2 * part + i % 2];
  mma_bf16(c, fa, fb);
  for (unsigned i = 0; i < 4; ++i) out[(group + 8 * (i / 2)) * 8 + 2 * part + i % 2] = c[i];
}
PROBE(product_bf16, product_bf16, 1, 32)

// The same with the fragments of A loaded by ldmatrix.
__global__ void product_ldmatrix(const uint16_t* in, float* out, int) {
  __shared__ __align__(16) uint16_t a[16 * 16];
  const unsigned lane = threadIdx.x, group = lane / 4, part = lane % 4;
  for (unsigned i = 0; i < 8; ++i) a[lane * 8 + i] = in[lane * 8 + i];
  __syncwarp();
  uint32_t fa[4];
  ldmatrix_x4(fa, a + (lane % 16) * 16 + lane / 16 * 8);
  const uint32_t* b = reinterpret_cast<const uint32_t*>(in + 256 + group * 16 + 2 * part);
  const uint32_t fb[2] = {b[0], b[4]};
  float c[4] = {0, 0, 0, 0};
  mma_bf16(c, fa, fb);
  for (unsigned i = 0; i < 4; ++i) out[(group + 8 * (i / 2)) * 8 + 2 * part + i % 2] = c[i];
}
PROBE(product_ldmatrix, product_ldmatrix, 1, 32)

// in: a [16,32] then b [8,32], int8; out: c [16,8].
__global__ void product_s8(const int8_t* in, int32_t* out, int) {
  const unsigned lane = threadIdx.x, group = lane / 4, part = lane % 4;
  const auto word = [&](const int8_t* p) { return *reinterpret_cast<const uint32_t*>(p); };
  const int8_t *a = in, *b = in + 512;
  const uint32_t fa[4] = {word(a + group * 32 + 4 * part), word(a + (group + 8) * 32 + 4 * part),
                          word(a + group * 32 + 4 * part + 16), word(a + (group + 8) * 32 + 4 * part + 16)};
  const uint32_t fb[2] = {word(b + group * 32 + 4 * part), word(b + group * 32 + 4 * part + 16)};
  int32_t c[4] = {1, 2, 3, 4};
  mma_s8(c, fa, fb);
  for (unsigned i = 0; i < 4; ++i) out[(group + 8 * (i / 2)) * 8 + 2 * part + i % 2] = c[i];
}
PROBE(product_s8, product_s8, 1, 32)

// Pairs of words; out: us, ss.
__global__ void dot(const uint2* in, int2* out, int n) {
  const int i = int(threadIdx.x);
  if (i >= n) return;
  const uint2 v = load_stream(in + i);
  out[i] = make_int2(dp4a_us(v.x, v.y, 5), dp4a_ss(v.x, v.y, -5));
}
PROBE(dot, dot, 1, 256)

__global__ void to_bf16(const float* in, uint32_t* out, int n) {
  const int i = int(threadIdx.x);
  if (i < n) out[i] = pack_bf16(in[i], bf16_to_f32(f32_to_bf16(in[i])));
}
PROBE(to_bf16, to_bf16, 1, 256)

__global__ void from_f16(const uint16_t* in, float* out, int n) {
  for (int i = int(threadIdx.x); i < n; i += 256) out[i] = f16_to_f32(in[i]);
}
PROBE(from_f16, from_f16, 1, 256)

__global__ void keep(const float4* in, float4* out, int n) {
  const int i = int(threadIdx.x);
  if (i >= n) return;
  float4 v = load_keep(in + i);
  const uint4 w = load_stream(reinterpret_cast<const uint4*>(in) + i);
  v.x += __uint_as_float(w.y) + __uint_as_float(load_stream(reinterpret_cast<const uint32_t*>(in) + 4 * i + 2));
  prefetch_l2(in);
  store_keep(out + i, v);
}
PROBE(keep, keep, 1, 32)

}  // namespace
}  // namespace engine::cuda
