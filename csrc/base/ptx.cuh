// The only home of inline PTX. Each wrapper has a fallback, so that the same kernel text compiles for the host
// (csrc/emu) and for architectures without the instruction.
#pragma once
#include <cstdint>

#include "base/launch.h"

namespace engine::cuda {

// ---- cache hints: weights are read once per step and must not push the state out of L1
__device__ __forceinline__ uint4 load_stream(const uint4* p) {
#if defined(__CUDA_ARCH__)
  uint4 v;
  asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0,%1,%2,%3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "l"(p));
  return v;
#else
  return *p;
#endif
}

__device__ __forceinline__ uint32_t load_stream(const uint32_t* p) {
#if defined(__CUDA_ARCH__)
  uint32_t v;
  asm volatile("ld.global.nc.L1::no_allocate.u32 %0, [%1];" : "=r"(v) : "l"(p));
  return v;
#else
  return *p;
#endif
}

// Written once and not read again by this kernel.
__device__ __forceinline__ void store_stream(uint4* p, uint4 v) {
#if defined(__CUDA_ARCH__)
  asm volatile("st.global.cs.v4.u32 [%0], {%1,%2,%3,%4};" ::"l"(p), "r"(v.x), "r"(v.y), "r"(v.z), "r"(v.w) : "memory");
#else
  *p = v;
#endif
}

// ---- programmatic dependent launch (sm_90 and later; elsewhere the stream's order already says it)
// Blocks until the kernel before has finished and its writes are visible. Every kernel calls it before its first read
// of anything that an earlier node wrote.
__device__ __forceinline__ void wait_for_previous() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// Lets the next kernel start its prologue; it still waits for this one's writes.
__device__ __forceinline__ void release_next() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;");
#endif
}

}  // namespace engine::cuda
