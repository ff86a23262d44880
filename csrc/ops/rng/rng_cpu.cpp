// rng: counter-based random numbers, seed and offset read from memory so that a replayed plan can draw new ones
// layout   out [n] u32 | f32, element i = lane i % 4 of counter i / 4
// mapping  4096 elements per task
// moves    4 n bytes
// tried    -
#include "ops/rng/rng.h"

#include "base/philox.h"
#include "base/simd.h"

namespace engine::cpu::ENGINE_NS {

void rng(const RngParams& p, Ctx& ctx) {
  constexpr int64_t kChunk = 4096;
  for (int64_t task; (task = claim(ctx)) < ceil_div(p.n, kChunk);) {
    const int64_t i0 = task * kChunk, i1 = imin(i0 + kChunk, p.n);
    for (int64_t i = i0; i < i1; i += 4) {
      const Philox r = philox(*p.seed, uint32_t(i / 4), *p.offset, uint32_t(p.stream));
      uint32_t bits[4];
      for (int j = 0; j < 4; ++j) bits[j] = r.v[j];
      if (p.kind == 1) {
        for (int j = 0; j < 4; ++j) bits[j] = f32_to_bits(philox_uniform(r.v[j]));
      } else if (p.kind == 2) {
        for (int j = 0; j < 4; j += 2) {
          const double u = (double(r.v[j]) + 0.5) * 2.3283064365386963e-10;
          const double angle = double(r.v[j + 1]) * 2.3283064365386963e-10 * 6.283185307179586;
          const double radius = sqrt(-2.0 * log(u));
          bits[j] = f32_to_bits(float(radius * cos(angle)));
          bits[j + 1] = f32_to_bits(float(radius * sin(angle)));
        }
      }
      for (int j = 0; j < 4 && i + j < i1; ++j) static_cast<uint32_t*>(p.out)[i + j] = bits[j];
    }
  }
}

}  // namespace engine::cpu::ENGINE_NS
