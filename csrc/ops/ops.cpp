#include "ops/ops.h"

#include "ops/attention/attention.h"
#include "ops/channel_attention/channel_attention.h"
#include "ops/codebook/codebook.h"
#include "ops/conv/conv.h"
#include "ops/flow/flow.h"
#include "ops/fuse/fuse.h"
#include "ops/gather/gather.h"
#include "ops/gemm/gemm.h"
#include "ops/guide/guide.h"
#include "ops/moe/moe.h"
#include "ops/norm/norm.h"
#include "ops/pick/pick.h"
#include "ops/rng/rng.h"
#include "ops/sample/sample.h"
#include "ops/ssm/ssm.h"

// op, parameter struct, cpu_only | with_cuda
#define ENGINE_OPS(X) \
  X(attention, AttentionParams, with_cuda) \
  X(channel_attention, ChannelAttentionParams, with_cuda) \
  X(codebook_conv, CodebookConvParams, with_cuda) \
  X(codebook_search, CodebookSearchParams, with_cuda) \
  X(conv_depthwise, ConvDepthwiseParams, with_cuda) \
  X(conv_patches, ConvPatchesParams, with_cuda) \
  X(flow_begin, FlowBeginParams, with_cuda) \
  X(flow_end, FlowEndParams, with_cuda) \
  X(gate_heads, GateHeadsParams, with_cuda) \
  X(gated_fuse, GatedFuseParams, with_cuda) \
  X(gather, GatherParams, with_cuda) \
  X(gather_mean, GatherMeanParams, with_cuda) \
  X(gather_sum, GatherSumParams, with_cuda) \
  X(gemm, GemmParams, with_cuda) \
  X(gemm_pack, GemmPackParams, cpu_only) \
  X(gemm_peak, GemmPeakParams, cpu_only) \
  X(guide, GuideParams, with_cuda) \
  X(guide_joints, GuideJointsParams, with_cuda) \
  X(moe_down, MoeDownParams, with_cuda) \
  X(moe_route, MoeRouteParams, with_cuda) \
  X(moe_up, MoeUpParams, with_cuda) \
  X(norm, NormParams, with_cuda) \
  X(pick_masked, PickMaskedParams, with_cuda) \
  X(pick_next, PickNextParams, with_cuda) \
  X(rng, RngParams, with_cuda) \
  X(sample, SampleParams, with_cuda) \
  X(ssm, SsmParams, with_cuda)

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

// The emulated module (tests/emu) has the same table without the CPU kernels.
#if defined(ENGINE_NO_CPU_KERNELS)
#define ENGINE_DECLARE_CPU(op, Params)
#define ENGINE_THUNK(isa, op, Params) nullptr
#else
#define ENGINE_DECLARE_CPU(op, Params)                    \
  namespace cpu::scalar { void op(const Params&, Ctx&); } \
  namespace cpu::avx2 { void op(const Params&, Ctx&); }   \
  namespace cpu::avx512 { void op(const Params&, Ctx&); }
#define ENGINE_THUNK(isa, op, Params) \
  [](const void* p, Ctx& c) { cpu::isa::op(*static_cast<const Params*>(p), c); }
#endif

#define ENGINE_DECLARE(op, Params, cuda_kernel) \
  ENGINE_DECLARE_CPU(op, Params)                \
  ENGINE_DECLARE_##cuda_kernel(op, Params)      \
  static_assert(sizeof(Params) <= kMaxParamBytes, "raise kMaxParamBytes");
ENGINE_OPS(ENGINE_DECLARE)

#define ENGINE_ENTRY(op, Params, cuda_kernel)                                                                    \
  {#op, fields_of_##Params::table, int(sizeof(fields_of_##Params::table) / sizeof(Field)), sizeof(Params),       \
   {ENGINE_THUNK(scalar, op, Params), ENGINE_THUNK(avx2, op, Params), ENGINE_THUNK(avx512, op, Params)},         \
   ENGINE_CUDA_##cuda_kernel(op, Params)},
const Op kOps[] = {ENGINE_OPS(ENGINE_ENTRY)};
const int kOpCount = int(sizeof(kOps) / sizeof(kOps[0]));

}  // namespace engine
