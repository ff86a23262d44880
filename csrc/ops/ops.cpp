#include "ops/ops.h"

#include "ops/attention/attention.h"
#include "ops/gather/gather.h"
#include "ops/gemm/gemm.h"
#include "ops/moe/moe.h"
#include "ops/rng/rng.h"
#include "ops/sample/sample.h"
#include "ops/ssm/ssm.h"

// op, parameter struct
#define ENGINE_OPS(X)       \
  X(attention, AttentionParams) \
  X(gather, GatherParams)       \
  X(gemm, GemmParams)           \
  X(gemm_pack, GemmPackParams)  \
  X(moe_down, MoeDownParams)    \
  X(moe_route, MoeRouteParams)  \
  X(moe_up, MoeUpParams)        \
  X(rng, RngParams)             \
  X(sample, SampleParams)       \
  X(ssm, SsmParams)

namespace engine {

#define ENGINE_DECLARE(op, Params)                                          \
  namespace cpu::scalar { void op(const Params&, Ctx&); }                   \
  namespace cpu::avx2 { void op(const Params&, Ctx&); }                     \
  namespace cpu::avx512 { void op(const Params&, Ctx&); }                   \
  static_assert(sizeof(Params) <= kMaxParamBytes, "raise kMaxParamBytes");
ENGINE_OPS(ENGINE_DECLARE)

#define ENGINE_THUNK(isa, op, Params) \
  [](const void* p, Ctx& c) { cpu::isa::op(*static_cast<const Params*>(p), c); }
#define ENGINE_ENTRY(op, Params)                                                                                 \
  {#op, fields_of_##Params::table, int(sizeof(fields_of_##Params::table) / sizeof(Field)), sizeof(Params),       \
   {ENGINE_THUNK(scalar, op, Params), ENGINE_THUNK(avx2, op, Params), ENGINE_THUNK(avx512, op, Params)}},
const Op kOps[] = {ENGINE_OPS(ENGINE_ENTRY)};
const int kOpCount = int(sizeof(kOps) / sizeof(kOps[0]));

}  // namespace engine
