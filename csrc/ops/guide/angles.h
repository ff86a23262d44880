// Sine and cosine of headings, by the same arithmetic on a CPU and on CUDA, where the library's reduction of huge angles
// would take local memory.
#pragma once
#include <cmath>

#include "base/params.h"

namespace engine {

// Cody and Waite's reduction by pi/2 in three parts, then Chebyshev fits on [-pi/4, pi/4]; good to 1e-7 up to |a| ~ 1e4.
ENGINE_HD void heading(float a, float* s, float* c) {
  const float n = nearbyintf(a * 0.636619772367581343f);
  float r = a - n * 1.5703125f;
  r -= n * 4.837512969970703125e-4f;
  r -= n * 7.54978995489188216e-8f;
  const float r2 = r * r;
  const float sine = r + r * r2 * (-1.6666654611e-1f + r2 * (8.3321608736e-3f - 1.9515295891e-4f * r2));
  const float cosine =
      1.f - 0.5f * r2 + r2 * r2 * (4.166664568298827e-2f + r2 * (-1.388731625493765e-3f + 2.443315711809948e-5f * r2));
  const int32_t q = int32_t(n);
  const float one = q & 1 ? cosine : sine, other = q & 1 ? sine : cosine;
  *s = q & 2 ? -one : one;
  *c = (q + 1) & 2 ? -other : other;
}

}  // namespace engine
