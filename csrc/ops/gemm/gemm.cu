// gemm: rows of activations times packed panels, for few rows: prologue, product and epilogue in one kernel
// layout   packed panels as on the CPU; activations staged in shared memory in the form of the weight format
// mapping  256 threads per block; a block owns 1, 2 or 4 panels of 16 output rows, its 8 warps split K; R = 1, 2, 4 or 8
//          rows of activations share each weight; more rows take more passes
// moves    the weights once per R rows; x once per block (from L2); out once
// tried    -
#include "ops/gemm/gemm.h"

#include "ops/gemm/gemv.cuh"

namespace engine::cuda {
namespace {

constexpr int kWarps = 8;
constexpr int kMaxBlocks = 1024;

template <int F, int R> __global__ void __launch_bounds__(kWarps * 32, kBlocksPerSm)
    gemm_kernel(GemmParams p, Panels w, Prologue pro, int64_t row_bytes, int turns) {
  constexpr int P = panels_per_turn(R);
  const int group0 = int(blockIdx.x) * turns;
  release_next();
  prefetch_panels(w, group0 * P, P);
  wait_for_previous();
  const int m = p.rows ? min(int(*p.rows), int(p.m)) : int(p.m);
  Shared s(shared_memory(), R, pro.groups, kWarps, P * 16);
  const bool wide = aligned16(p.x) && p.ldx % 4 == 0 && aligned16(p.z) && p.ldz % 4 == 0 && aligned16(pro.w);
  for (int r0 = 0; r0 < m; r0 += R) {
    const int n = min(R, m - r0);
    stage_rows<F>(
        pro, n, w.d, row_bytes,
        [&](int r) {
          const int64_t t = r0 + r;
          return Row{
              p.x + t * p.ldx, p.z ? p.z + t * p.ldz : nullptr, pro.w, s.inv + r * pro.groups, pro.norm_group, wide};
        },
        s);
    project<F, R, P>(w, group0, turns, n, row_bytes, s, [&](int r, int row, float v) {
      const int64_t t = r0 + r;
      if (p.bias) v += p.bias[row];
      v = activate(v, p.act) * p.scale;
      if (p.residual) v += p.residual[t * p.ldr + row];
      if (p.out_dtype == kF32)
        static_cast<float*>(p.out)[t * p.ldo + row] = v;
      else
        static_cast<uint16_t*>(p.out)[t * p.ldo + row] = f32_to_bf16(v);
    });
  }
}

}  // namespace

void gemm(const GemmParams& p, void* stream) {
  with_format("gemm", p.format, [&](auto format) {
    constexpr int F = decltype(format)::value;
    const Panels w = panels_of(p.w, F, p.n, p.k, p.group);
    const Prologue pro = p.prologue == kProNone
                             ? prologue_of(nullptr, 1, p.k, 0.f)
                             : prologue_of(p.pro_w, p.prologue == kProRmsNorm ? p.k : p.norm_group, p.k, p.eps);
    const size_t row_bytes = Codes<F>::row_bytes(w.d);
    const auto bytes = [&](int rows) {
      return Shared::bytes(rows, pro.groups, kWarps, 16 * panels_per_turn(rows), row_bytes);
    };
    with_rows("gemm", p.m, bytes, [&](auto rows) {
      constexpr int R = decltype(rows)::value;
      const int64_t per_turn = 16 * panels_per_turn(R), groups = (p.n + per_turn - 1) / per_turn;
      const int turns = int((groups + kMaxBlocks - 1) / kMaxBlocks);
      const Launch l = {unsigned((groups + turns - 1) / turns), kWarps * 32, bytes(R), stream, true};
      launch("gemm", gemm_kernel<F, R>, l, p, w, pro, int64_t(row_bytes), turns);
    });
  });
}

}  // namespace engine::cuda
