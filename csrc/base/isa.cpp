#include "base/isa.h"

#include <cstring>

namespace engine {

const char* isa_name(int isa) {
  static const char* names[] = {"scalar", "avx2", "avx512"};
  return isa >= 0 && isa < kIsaCount ? names[isa] : "?";
}

int isa_from_name(const char* name) {
  for (int i = 0; i < kIsaCount; ++i)
    if (std::strcmp(name, isa_name(i)) == 0) return i;
  return -1;
}

// __builtin_cpu_supports also checks that the operating system saves the wide registers (XCR0).
const char* isa_missing(int isa) {
  __builtin_cpu_init();
#define ENGINE_NEED(feature) \
  if (!__builtin_cpu_supports(feature)) return feature
  if (isa >= kAvx2) {
    ENGINE_NEED("avx2");
    ENGINE_NEED("fma");
    ENGINE_NEED("f16c");
  }
  if (isa >= kAvx512) {
    ENGINE_NEED("avx512f");
    ENGINE_NEED("avx512bw");
    ENGINE_NEED("avx512vl");
    ENGINE_NEED("avx512dq");
    ENGINE_NEED("avx512vnni");
    ENGINE_NEED("avx512bf16");
  }
#undef ENGINE_NEED
  return "";
}

int host_isa() {
  int best = kScalar;
  for (int i = 0; i < kIsaCount; ++i)
    if (isa_missing(i)[0] == 0) best = i;
  return best;
}

}  // namespace engine
