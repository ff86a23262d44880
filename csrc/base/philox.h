// Philox 4x32-10 (Salmon et al., SC'11): the one counter-based generator, same bits in C++, CUDA, Triton and torch.
// Stream layout: key = seed (lo, hi); counter = (index / 4, offset_lo, offset_hi, stream); lane index % 4.
#pragma once
#include <cstdint>

#include "base/params.h"

namespace engine {

struct Philox {
  uint32_t v[4];
};

ENGINE_HD Philox philox(uint64_t seed, uint32_t c0, uint64_t offset, uint32_t stream) {
  uint32_t k0 = uint32_t(seed), k1 = uint32_t(seed >> 32);
  uint32_t x0 = c0, x1 = uint32_t(offset), x2 = uint32_t(offset >> 32), x3 = stream;
  for (int round = 0; round < 10; ++round) {
    const uint64_t p0 = uint64_t(0xD2511F53u) * x0, p1 = uint64_t(0xCD9E8D57u) * x2;
    const uint32_t y0 = uint32_t(p1 >> 32) ^ x1 ^ k0, y2 = uint32_t(p0 >> 32) ^ x3 ^ k1;
    x1 = uint32_t(p1);
    x3 = uint32_t(p0);
    x0 = y0;
    x2 = y2;
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  return {{x0, x1, x2, x3}};
}

// [0, 1) with 24 bits: exact in fp32.
ENGINE_HD float philox_uniform(uint32_t bits) { return float(bits >> 8) * 5.9604644775390625e-8f; }

}  // namespace engine
