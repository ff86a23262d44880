// The only home of inline PTX. Each wrapper has an emulation, so that the same kernel text compiles for the host
// (csrc/emu), and a fallback for architectures without the instruction.
#pragma once
#include <cstdint>

#include "base/launch.h"

namespace engine::cuda {

// Base of dynamic shared memory.
__device__ __forceinline__ uint8_t* shared_memory() {
#if defined(ENGINE_EMU)
  return emu::shared_memory();
#else
  extern __shared__ __align__(128) uint8_t engine_shared_memory[];
  return engine_shared_memory;
#endif
}

#if !defined(ENGINE_EMU)
__device__ __forceinline__ uint32_t shared_address(const void* p) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(p));
}

// Not volatile and without inputs: the compiler makes a policy once per kernel, not once per load.
__device__ __forceinline__ uint64_t evict_first() {
  uint64_t policy;
  asm("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
  return policy;
}

__device__ __forceinline__ uint64_t evict_last() {
  uint64_t policy;
  asm("createpolicy.fractional.L2::evict_last.b64 %0, 1.0;" : "=l"(policy));
  return policy;
}
#endif

// ---- cache hints: weights are read once per step and must push the state out of neither L1 nor L2
__device__ __forceinline__ uint4 load_stream(const uint4* p) {
#if defined(ENGINE_EMU)
  return *p;
#else
  uint4 v;
  asm volatile("ld.global.nc.L1::no_allocate.L2::cache_hint.v4.u32 {%0,%1,%2,%3}, [%4], %5;"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "l"(p), "l"(evict_first()));
  return v;
#endif
}

__device__ __forceinline__ uint2 load_stream(const uint2* p) {
#if defined(ENGINE_EMU)
  return *p;
#else
  uint2 v;
  asm volatile("ld.global.nc.L1::no_allocate.L2::cache_hint.v2.u32 {%0,%1}, [%2], %3;"
               : "=r"(v.x), "=r"(v.y)
               : "l"(p), "l"(evict_first()));
  return v;
#endif
}

__device__ __forceinline__ uint32_t load_stream(const uint32_t* p) {
#if defined(ENGINE_EMU)
  return *p;
#else
  uint32_t v;
  asm volatile("ld.global.nc.L1::no_allocate.L2::cache_hint.u32 %0, [%1], %2;" : "=r"(v) : "l"(p), "l"(evict_first()));
  return v;
#endif
}

// Recurrent state: read and written every step, so it should stay in L2 while the weights stream past.
__device__ __forceinline__ float4 load_keep(const float4* p) {
#if defined(ENGINE_EMU)
  return *p;
#else
  float4 v;
  asm volatile("ld.global.L2::cache_hint.v4.f32 {%0,%1,%2,%3}, [%4], %5;"
               : "=f"(v.x), "=f"(v.y), "=f"(v.z), "=f"(v.w)
               : "l"(p), "l"(evict_last())
               : "memory");
  return v;
#endif
}

__device__ __forceinline__ void store_keep(float4* p, float4 v) {
#if defined(ENGINE_EMU)
  *p = v;
#else
  asm volatile("st.global.L2::cache_hint.v4.f32 [%0], {%1,%2,%3,%4}, %5;" ::"l"(p), "f"(v.x), "f"(v.y), "f"(v.z),
               "f"(v.w), "l"(evict_last())
               : "memory");
#endif
}

// Written once and not read again by this kernel.
__device__ __forceinline__ void store_stream(uint4* p, uint4 v) {
#if defined(ENGINE_EMU)
  *p = v;
#else
  asm volatile("st.global.cs.v4.u32 [%0], {%1,%2,%3,%4};" ::"l"(p), "r"(v.x), "r"(v.y), "r"(v.z), "r"(v.w) : "memory");
#endif
}

__device__ __forceinline__ void prefetch_l2(const void* p) {
#if defined(ENGINE_EMU)
  (void)p;
#else
  asm volatile("prefetch.global.L2 [%0];" ::"l"(p));
#endif
}

// ---- conversions
__device__ __forceinline__ float f16_to_f32(uint16_t h) {
#if defined(ENGINE_EMU)
  return emu::f16_to_f32(h);
#else
  float f;
  asm("cvt.f32.f16 %0, %1;" : "=f"(f) : "h"(h));
  return f;
#endif
}

__device__ __forceinline__ float bf16_to_f32(uint16_t h) { return __uint_as_float(uint32_t(h) << 16); }

// Nearest even; every NaN becomes 0x7FFF, as the instruction does it.
__device__ __forceinline__ uint16_t f32_to_bf16(float f) {
#if defined(ENGINE_EMU)
  const uint32_t u = __float_as_uint(f);
  return (u & 0x7FFFFFFF) > 0x7F800000 ? uint16_t(0x7FFF) : uint16_t((u + 0x7FFF + (u >> 16 & 1)) >> 16);
#else
  uint16_t h;
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(h) : "f"(f));
  return h;
#endif
}

__device__ __forceinline__ uint32_t pack_bf16(float lo, float hi) {
#if defined(ENGINE_EMU)
  return f32_to_bf16(lo) | uint32_t(f32_to_bf16(hi)) << 16;
#else
  uint32_t r;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(hi), "f"(lo));
  return r;
#endif
}

// ---- products
// c + sum of four products of bytes: unsigned times signed.
__device__ __forceinline__ int32_t dp4a_us(uint32_t a, uint32_t b, int32_t c) {
#if defined(ENGINE_EMU)
  for (int i = 0; i < 32; i += 8) c += int32_t(a >> i & 0xFF) * int8_t(b >> i);
  return c;
#else
  int32_t d;
  asm("dp4a.u32.s32 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(c));
  return d;
#endif
}

// Signed times signed.
__device__ __forceinline__ int32_t dp4a_ss(uint32_t a, uint32_t b, int32_t c) {
#if defined(ENGINE_EMU)
  for (int i = 0; i < 32; i += 8) c += int8_t(a >> i) * int8_t(b >> i);
  return c;
#else
  int32_t d;
  asm("dp4a.s32.s32 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(c));
  return d;
#endif
}

// c [16,8] += a [16,16] b [16,8], fragments as in the PTX ISA for m16n8k16 (a by rows, b by columns).
__device__ __forceinline__ void mma_bf16(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
#if defined(ENGINE_EMU)
  emu::mma_bf16(c, a, b);
#else
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#endif
}

// c [16,8] += a [16,32] b [32,8], fragments as in the PTX ISA for m16n8k32.
__device__ __forceinline__ void mma_s8(int32_t (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
#if defined(ENGINE_EMU)
  emu::mma_s8(c, a, b);
#else
  asm volatile("mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
               : "+r"(c[0]), "+r"(c[1]), "+r"(c[2]), "+r"(c[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#endif
}

// Four 8x8 matrices of 16-bit values; lane i gives the address of row i % 8 of matrix i / 8.
__device__ __forceinline__ void ldmatrix_x4(uint32_t (&r)[4], const void* shared_row) {
#if defined(ENGINE_EMU)
  emu::ldmatrix_x4(r, shared_row);
#else
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(shared_row))
               : "memory");
#endif
}

// ---- copies that run behind the thread; visible to it after the wait, to the others after a barrier too
__device__ __forceinline__ void cp_async16(void* shared, const void* global) {
#if defined(ENGINE_EMU)
  emu::cp_async16(shared, global);
#else
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(shared_address(shared)), "l"(global) : "memory");
#endif
}

__device__ __forceinline__ void cp_async_commit() {
#if defined(ENGINE_EMU)
  emu::cp_async_commit();
#else
  asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}

// Waits until at most N of the latest groups are under way.
template <int N> __device__ __forceinline__ void cp_async_wait() {
#if defined(ENGINE_EMU)
  emu::cp_async_wait(N);
#else
  asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory");
#endif
}

// ---- programmatic dependent launch (sm_90 and later; elsewhere the stream's order already says it)
// Blocks until the kernel before has finished and its writes are visible. Every kernel calls it before its first read
// of anything that an earlier node wrote.
__device__ __forceinline__ void wait_for_previous() {
#if defined(ENGINE_EMU)
  emu::wait_for_previous();
#elif defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
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
