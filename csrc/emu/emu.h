// Host stand-in for the CUDA runtime: the unmodified .cu text compiled by the host compiler, one fibre per CUDA thread.
// This header is the vocabulary of kernels; emu.cpp runs them; watch.cpp observes their memory accesses.
#pragma once
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <type_traits>

#define __global__
#define __device__
#define __host__
#define __constant__
#define __forceinline__ inline __attribute__((always_inline))
#define __align__(n) __attribute__((aligned(n)))
#define __launch_bounds__(...)
// noinit gives the variables a section of their own, also inside templates (the section attribute does not); shared.ld
// marks its ends, so that it can be poisoned when a block starts.
#define __shared__ static __attribute__((noinit))

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};
using uint3 = dim3;

#define ENGINE_EMU_VECTOR2(name, T)      \
  struct alignas(2 * sizeof(T)) name {   \
    T x, y;                              \
  };                                     \
  inline name make_##name(T x, T y) { return {x, y}; }
#define ENGINE_EMU_VECTOR4(name, T)      \
  struct alignas(4 * sizeof(T)) name {   \
    T x, y, z, w;                        \
  };                                     \
  inline name make_##name(T x, T y, T z, T w) { return {x, y, z, w}; }
ENGINE_EMU_VECTOR2(int2, int32_t)
ENGINE_EMU_VECTOR2(uint2, uint32_t)
ENGINE_EMU_VECTOR2(float2, float)
ENGINE_EMU_VECTOR4(int4, int32_t)
ENGINE_EMU_VECTOR4(uint4, uint32_t)
ENGINE_EMU_VECTOR4(float4, float)
#undef ENGINE_EMU_VECTOR2
#undef ENGINE_EMU_VECTOR4
inline uint3 make_uint3(uint32_t x, uint32_t y, uint32_t z) { return {x, y, z}; }

constexpr int warpSize = 32;

namespace engine::emu {

// Where the running thread is. Plain globals: one launch runs at a time, and a switch of fibres rewrites `thread`.
struct Builtins {
  dim3 grid, block, block_index, thread;
};
extern Builtins builtins;

enum class Collective : uint8_t { sync_threads, sync_warp, shuffle, ballot, reduce, mma_bf16, mma_s8, ldmatrix };
enum class Vote : uint8_t { none, any, all, count };
enum class Lane : uint8_t { index, up, down, exclusive };
enum class Reduce : uint8_t { add, min, max, bit_and, bit_or, bit_xor };
enum class Atomic : uint8_t { add, min, max, exchange, compare, bit_and, bit_or, bit_xor, increment };

// `line` is the caller's line: a collective that two threads enter at different lines is a divergent one.
int sync_threads(Vote vote, int predicate, int line);
void sync_warp(unsigned mask, int line);
uint64_t shuffle(unsigned mask, uint64_t value, Lane mode, int operand, int width, int line);
unsigned ballot(unsigned mask, int predicate, int line);
uint32_t reduce(unsigned mask, uint32_t value, Reduce op, bool is_signed, int line);
unsigned active_mask();
void mma_bf16(float* c, const uint32_t* a, const uint32_t* b);
void mma_s8(int32_t* c, const uint32_t* a, const uint32_t* b);
void ldmatrix_x4(uint32_t* r, const void* row);
template <class T> T atomic(Atomic op, T* address, T value, T compare);
extern template int atomic(Atomic, int*, int, int);
extern template unsigned atomic(Atomic, unsigned*, unsigned, unsigned);
extern template unsigned long long atomic(Atomic, unsigned long long*, unsigned long long, unsigned long long);
extern template float atomic(Atomic, float*, float, float);
void fence();
// The copy happens at the wait; until then the destination is poisoned, so a missing wait reads NaN.
void cp_async16(void* shared, const void* global);
void cp_async_commit();
void cp_async_wait(int groups_left);
void wait_for_previous();
uint8_t* shared_memory();

// Order in which runnable threads and blocks take turns. 0: in order, 1: reversed, both with warps in lockstep; 2 and 3:
// the same with one warp running ahead of the others; from 4: shuffled, the seed decides.
void set_schedule(uint64_t seed);

void run(const char* name, dim3 grid, dim3 block, size_t shared, bool overlap, void (*body)(void*), void* arg);
template <class Body> void run(const char* name, dim3 grid, dim3 block, size_t shared, bool overlap, Body body) {
  run(name, grid, block, shared, overlap, [](void* arg) { (*static_cast<Body*>(arg))(); }, &body);
}

float f16_to_f32(uint16_t h);

template <class To, class From> To bits(From from) {
  static_assert(sizeof(To) == sizeof(From), "bits() keeps the size");
  To to;
  std::memcpy(&to, &from, sizeof to);
  return to;
}
template <class T> uint64_t widen(T v) {
  static_assert(std::is_arithmetic_v<T> && sizeof(T) <= 8, "shuffles move numbers of up to eight bytes");
  uint64_t u = 0;
  std::memcpy(&u, &v, sizeof v);
  return u;
}
template <class T> T narrow(uint64_t u) {
  T v;
  std::memcpy(&v, &u, sizeof v);
  return v;
}

}  // namespace engine::emu

#define gridDim (::engine::emu::builtins.grid)
#define blockDim (::engine::emu::builtins.block)
#define blockIdx (::engine::emu::builtins.block_index)
#define threadIdx (::engine::emu::builtins.thread)

// ---- barriers, votes, shuffles
inline void __syncthreads(int line = __builtin_LINE()) { engine::emu::sync_threads(engine::emu::Vote::none, 0, line); }
inline int __syncthreads_or(int predicate, int line = __builtin_LINE()) {
  return engine::emu::sync_threads(engine::emu::Vote::any, predicate, line);
}
inline int __syncthreads_and(int predicate, int line = __builtin_LINE()) {
  return engine::emu::sync_threads(engine::emu::Vote::all, predicate, line);
}
inline int __syncthreads_count(int predicate, int line = __builtin_LINE()) {
  return engine::emu::sync_threads(engine::emu::Vote::count, predicate, line);
}
inline void __syncwarp(unsigned mask = ~0u, int line = __builtin_LINE()) { engine::emu::sync_warp(mask, line); }

template <class T> T __shfl_sync(unsigned mask, T v, int lane, int width = 32, int line = __builtin_LINE()) {
  using namespace engine::emu;
  return narrow<T>(shuffle(mask, widen(v), Lane::index, lane, width, line));
}
template <class T> T __shfl_up_sync(unsigned mask, T v, unsigned d, int width = 32, int line = __builtin_LINE()) {
  using namespace engine::emu;
  return narrow<T>(shuffle(mask, widen(v), Lane::up, int(d), width, line));
}
template <class T> T __shfl_down_sync(unsigned mask, T v, unsigned d, int width = 32, int line = __builtin_LINE()) {
  using namespace engine::emu;
  return narrow<T>(shuffle(mask, widen(v), Lane::down, int(d), width, line));
}
template <class T> T __shfl_xor_sync(unsigned mask, T v, int lanes, int width = 32, int line = __builtin_LINE()) {
  using namespace engine::emu;
  return narrow<T>(shuffle(mask, widen(v), Lane::exclusive, lanes, width, line));
}

inline unsigned __ballot_sync(unsigned mask, int predicate, int line = __builtin_LINE()) {
  return engine::emu::ballot(mask, predicate, line);
}
inline int __any_sync(unsigned mask, int predicate, int line = __builtin_LINE()) {
  return engine::emu::ballot(mask, predicate, line) != 0;
}
inline int __all_sync(unsigned mask, int predicate, int line = __builtin_LINE()) {
  return engine::emu::ballot(mask, !predicate, line) == 0;
}
inline unsigned __activemask() { return engine::emu::active_mask(); }

#define ENGINE_EMU_REDUCE(name, op)                                                        \
  inline unsigned name(unsigned mask, unsigned v, int line = __builtin_LINE()) {           \
    return engine::emu::reduce(mask, v, engine::emu::Reduce::op, false, line);             \
  }                                                                                        \
  inline int name(unsigned mask, int v, int line = __builtin_LINE()) {                     \
    return int(engine::emu::reduce(mask, unsigned(v), engine::emu::Reduce::op, true, line)); \
  }
ENGINE_EMU_REDUCE(__reduce_add_sync, add)
ENGINE_EMU_REDUCE(__reduce_min_sync, min)
ENGINE_EMU_REDUCE(__reduce_max_sync, max)
ENGINE_EMU_REDUCE(__reduce_and_sync, bit_and)
ENGINE_EMU_REDUCE(__reduce_or_sync, bit_or)
ENGINE_EMU_REDUCE(__reduce_xor_sync, bit_xor)
#undef ENGINE_EMU_REDUCE

// ---- atomics and fences
#define ENGINE_EMU_ATOMIC(name, op, T) \
  inline T name(T* p, T v) { return engine::emu::atomic<T>(engine::emu::Atomic::op, p, v, static_cast<T>(0)); }
#define ENGINE_EMU_ATOMIC_INTEGERS(name, op) \
  ENGINE_EMU_ATOMIC(name, op, int)           \
  ENGINE_EMU_ATOMIC(name, op, unsigned)      \
  ENGINE_EMU_ATOMIC(name, op, unsigned long long)
ENGINE_EMU_ATOMIC_INTEGERS(atomicAdd, add)
ENGINE_EMU_ATOMIC(atomicAdd, add, float)
ENGINE_EMU_ATOMIC_INTEGERS(atomicMin, min)
ENGINE_EMU_ATOMIC_INTEGERS(atomicMax, max)
ENGINE_EMU_ATOMIC_INTEGERS(atomicExch, exchange)
ENGINE_EMU_ATOMIC(atomicExch, exchange, float)
ENGINE_EMU_ATOMIC_INTEGERS(atomicAnd, bit_and)
ENGINE_EMU_ATOMIC_INTEGERS(atomicOr, bit_or)
ENGINE_EMU_ATOMIC_INTEGERS(atomicXor, bit_xor)
ENGINE_EMU_ATOMIC(atomicInc, increment, unsigned)
#undef ENGINE_EMU_ATOMIC_INTEGERS
#undef ENGINE_EMU_ATOMIC
template <class T> T atomicCAS(T* p, T compare, T v) {
  return engine::emu::atomic<T>(engine::emu::Atomic::compare, p, v, compare);
}
inline void __threadfence() { engine::emu::fence(); }
inline void __threadfence_block() {}

// ---- numbers
inline float __uint_as_float(uint32_t u) { return engine::emu::bits<float>(u); }
inline uint32_t __float_as_uint(float f) { return engine::emu::bits<uint32_t>(f); }
inline float __int_as_float(int32_t i) { return engine::emu::bits<float>(i); }
inline int32_t __float_as_int(float f) { return engine::emu::bits<int32_t>(f); }
inline int64_t __double_as_longlong(double d) { return engine::emu::bits<int64_t>(d); }
inline double __longlong_as_double(int64_t i) { return engine::emu::bits<double>(i); }
template <class T> T __ldg(const T* p) { return *p; }

inline int __popc(unsigned v) { return __builtin_popcount(v); }
inline int __popcll(unsigned long long v) { return __builtin_popcountll(v); }
inline int __ffs(int v) { return __builtin_ffs(v); }
inline int __clz(int v) { return v ? __builtin_clz(unsigned(v)) : 32; }
inline unsigned __brev(unsigned v) {
  unsigned r = 0;
  for (int i = 0; i < 32; ++i) r |= (v >> i & 1u) << (31 - i);
  return r;
}
inline unsigned __umulhi(unsigned a, unsigned b) { return unsigned(uint64_t(a) * b >> 32); }
// Selects four of the eight bytes of (b, a); the sign-replicating form of the selector is not used by any kernel.
inline unsigned __byte_perm(unsigned a, unsigned b, unsigned selector) {
  const uint64_t bytes = uint64_t(b) << 32 | a;
  unsigned r = 0;
  for (int i = 0; i < 4; ++i) r |= unsigned(bytes >> (selector >> (4 * i) & 7) * 8 & 0xFF) << (8 * i);
  return r;
}
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fsub_rn(float a, float b) { return a - b; }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline float __fmaf_rn(float a, float b, float c) { return fmaf(a, b, c); }
inline float __fdividef(float a, float b) { return a / b; }
inline float __frcp_rn(float a) { return 1.0f / a; }
inline float __fsqrt_rn(float a) { return sqrtf(a); }
inline float __expf(float x) { return expf(x); }
inline float __logf(float x) { return logf(x); }
inline float rsqrtf(float x) { return 1.0f / sqrtf(x); }
inline double rsqrt(double x) { return 1.0 / sqrt(x); }
inline int __float2int_rn(float x) {
  // As the hardware: saturates, and NaN is 0.
  if (std::isnan(x)) return 0;
  return x >= 2147483648.0f ? INT32_MAX : x <= -2147483648.0f ? INT32_MIN : int(nearbyintf(x));
}
inline float __int2float_rn(int x) { return float(x); }
inline float __uint2float_rn(unsigned x) { return float(x); }
inline float __saturatef(float x) { return x > 0 ? x < 1 ? x : 1.0f : 0.0f; }
inline void sincospi(double x, double* s, double* c) {
  *s = std::sin(x * 3.141592653589793);
  *c = std::cos(x * 3.141592653589793);
}

#define ENGINE_EMU_MIN_MAX(T)                      \
  inline T min(T a, T b) { return b < a ? b : a; } \
  inline T max(T a, T b) { return a < b ? b : a; }
ENGINE_EMU_MIN_MAX(int)
ENGINE_EMU_MIN_MAX(unsigned)
ENGINE_EMU_MIN_MAX(long)
ENGINE_EMU_MIN_MAX(unsigned long)
ENGINE_EMU_MIN_MAX(long long)
ENGINE_EMU_MIN_MAX(unsigned long long)
#undef ENGINE_EMU_MIN_MAX
inline float min(float a, float b) { return fminf(a, b); }
inline float max(float a, float b) { return fmaxf(a, b); }
inline double min(double a, double b) { return fmin(a, b); }
inline double max(double a, double b) { return fmax(a, b); }
