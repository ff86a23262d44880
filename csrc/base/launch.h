// The one place that launches CUDA kernels: stream, programmatic dependent launch, error check, trace and emulation.
// Under ENGINE_EMU the kernel text is compiled by the host compiler and runs in csrc/emu instead.
#pragma once
#include <cstddef>
#include <cstdint>
#include <stdexcept>
#include <string>
#include <utility>

#if defined(ENGINE_EMU)
#include "emu/emu.h"
#else
#include <cuda_runtime.h>
#endif

namespace engine::cuda {

struct Launch {
  dim3 grid;
  dim3 block;
  size_t shared = 0;       // dynamic shared memory, bytes
  void* stream = nullptr;  // cudaStream_t
  bool overlap = false;    // may start before the previous kernel ends; the kernel must call wait_for_previous()
};

// Called before each launch when set, or instead of it; the name is a string literal.
using TraceFn = void (*)(const char* name, const void* kernel, const Launch& launch, void* arg);
struct Trace {
  TraceFn fn = nullptr;
  void* arg = nullptr;
  bool instead = false;  // what would be launched, without a device
};
inline Trace& trace() {
  static Trace hook;
  return hook;
}

#if !defined(ENGINE_EMU)
inline void check(cudaError_t e, const char* what) {
  if (e == cudaSuccess) return;
  cudaGetLastError();  // not sticky: the next call reports its own
  throw std::runtime_error(std::string(what) + ": " + cudaGetErrorString(e) + " (" + cudaGetErrorName(e) + ")");
}
#endif

template <class... Params, class... Args>
void launch(const char* name, void (*kernel)(Params...), const Launch& l, Args&&... args) {
  if (trace().fn) trace().fn(name, reinterpret_cast<const void*>(kernel), l, trace().arg);
  if (trace().instead) return;
#if defined(ENGINE_EMU)
  emu::run(name, l.grid, l.block, l.shared, l.overlap, [&] { kernel(Params(args)...); });
#else
  auto stream = static_cast<cudaStream_t>(l.stream);
  if (l.shared > 48 * 1024) {  // above the default limit a kernel must ask
    check(cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel), cudaFuncAttributeMaxDynamicSharedMemorySize,
                               int(l.shared)),
          name);
  }
  cudaLaunchAttribute attribute = {};
  attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attribute.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config = {};
  config.gridDim = l.grid;
  config.blockDim = l.block;
  config.dynamicSmemBytes = l.shared;
  config.stream = stream;
  config.attrs = &attribute;
  config.numAttrs = l.overlap ? 1 : 0;
  check(cudaLaunchKernelEx(&config, kernel, Params(std::forward<Args>(args))...), name);
#endif
}

constexpr unsigned blocks_for(int64_t work, int64_t per_block, int64_t most) {
  const int64_t n = (work + per_block - 1) / per_block;
  return unsigned(n < 1 ? 1 : n < most ? n : most);
}

}  // namespace engine::cuda
