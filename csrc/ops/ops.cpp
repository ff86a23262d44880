#include "ops/ops.h"

#include "ops/attention/attention.h"
#include "ops/gather/gather.h"
#include "ops/gemm/gemm.h"
#include "ops/moe/moe.h"
#include "ops/rng/rng.h"
#include "ops/sample/sample.h"
#include "ops/ssm/ssm.h"

// op, parameter struct, cpu_only | with_cuda
#define ENGINE_OPS(X)                     \
  X(attention, AttentionParams, cpu_only) \
  X(gather, GatherParams, cpu_only)       \
  X(gemm, GemmParams, cpu_only)           \
  X(gemm_pack, GemmPackParams, cpu_only)  \
  X(gemm_peak, GemmPeakParams, cpu_only)  \
  X(moe_down, MoeDownParams, cpu_only)    \
  X(moe_route, MoeRouteParams, cpu_only)  \
  X(moe_up, MoeUpParams, cpu_only)        \
  X(rng, RngParams, with_cuda)            \
  X(sample, SampleParams, cpu_only)       \
  X(ssm, SsmParams, cpu_only)

namespace engine {

#if defined(ENGINE_WITH_CUDA)
#define ENGINE_DECLARE_with_cuda(op, Params) \
  namespace cuda { void op(const Params&, void* stream); }
#define ENGINE_CUDA_with_cuda(op, Params) \
  [](const void* p, void* stream) { cuda::op(*static_cast<const Params*>(p), stream); }
#else
#define ENGINE_DECLARE_with_cuda(op, Params)
#define ENGINE_CUDA_with_cuda(op, Params) nullptr
#endif
#define ENGINE_DECLARE_cpu_only(op, Params)
#define ENGINE_CUDA_cpu_only(op, Params) nullptr

#define ENGINE_DECLARE(op, Params, cuda_kernel)                             \
  namespace cpu::scalar { void op(const Params&, Ctx&); }                   \
  namespace cpu::avx2 { void op(const Params&, Ctx&); }                     \
  namespace cpu::avx512 { void op(const Params&, Ctx&); }                   \
  ENGINE_DECLARE_##cuda_kernel(op, Params)                                  \
  static_assert(sizeof(Params) <= kMaxParamBytes, "raise kMaxParamBytes");
ENGINE_OPS(ENGINE_DECLARE)

#define ENGINE_THUNK(isa, op, Params) \
  [](const void* p, Ctx& c) { cpu::isa::op(*static_cast<const Params*>(p), c); }
#define ENGINE_ENTRY(op, Params, cuda_kernel)                                                                    \
  {#op, fields_of_##Params::table, int(sizeof(fields_of_##Params::table) / sizeof(Field)), sizeof(Params),       \
   {ENGINE_THUNK(scalar, op, Params), ENGINE_THUNK(avx2, op, Params), ENGINE_THUNK(avx512, op, Params)},         \
   ENGINE_CUDA_##cuda_kernel(op, Params)},
const Op kOps[] = {ENGINE_OPS(ENGINE_ENTRY)};
const int kOpCount = int(sizeof(kOps) / sizeof(kOps[0]));

}  // namespace engine
