// norm: RMS or layer norm of rows, or none, with weight, bias, modulation and activation
// layout   x row-major f32, out f32 or bf16
// mapping  a task is a run of rows, about 4096 values; a bf16 row is made in thread scratch
// moves    x twice (the second time from L1), out once
// tried    -
#include "ops/norm/norm.h"

#include "ops/gemm/microkernel.h"

namespace engine::cpu::ENGINE_NS {
namespace {

constexpr int64_t kTask = 4096;  // values

// Row t of x, normalised, to out, which may be x.
void norm_one(const NormParams& p, int64_t t, float* out) {
  const int64_t mod = (p.mod_rows ? p.mod_rows[t] : 0) * p.ldmod;
  const auto part = [&](int64_t column, int64_t i) {
    return p.mod && column >= 0 ? span_at(p.mod, p.mod_dtype, mod + column + i) : Span();
  };
  const float* x = p.x + t * p.ldx;
  if (p.add) {
    const float* more = p.add + t * p.ldadd;
    for (int64_t i = 0; i < p.k; i += 16)
      storen(out + i, add(loadn(x + i, p.k - i), loadn(more + i, p.k - i)), p.k - i);
    x = out;
  }
  if (p.kind != kProNone) {
    const int64_t group = p.group ? p.group : p.k;
    for (int64_t i = 0; i < p.k; i += group)
      norm_row(
          {p.kind, p.w ? p.w + i : nullptr, p.b ? p.b + i : nullptr, part(p.mod_scale, i), part(p.mod_shift, i), p.eps},
          x + i, group, out + i);
    x = out;
  }
  if (p.act != kActNone || x != out)
    for (int64_t i = 0; i < p.k; i += 16) storen(out + i, activate(loadn(x + i, p.k - i), p.act), p.k - i);
}

}  // namespace

void norm(const NormParams& p, Ctx& ctx) {
  const int64_t m = p.rows ? imin(*p.rows, p.m) : p.m, rows = norm_rows(p.width, m);
  const int64_t run = imax(1, kTask / p.k);
  const bool half = p.out_dtype == kBF16;
  for (int64_t task; (task = claim(ctx)) < ceil_div(rows, run);)
    for (int64_t r = task * run; r < imin(task * run + run, rows); ++r) {
      const int64_t t = p.width ? norm_cell(r, p.width, m) : r;
      float* out = half ? reinterpret_cast<float*>(ctx.scratch) : static_cast<float*>(p.out) + r * p.ldo;
      if (t >= 0)
        norm_one(p, t, out);
      else
        for (int64_t i = 0; i < p.k; i += 16) storen(out + i, zero(), p.k - i);
      if (half)
        for (int64_t i = 0; i < p.k; i += 16)
          storen_bf16(static_cast<uint16_t*>(p.out) + r * p.ldo + i, loadn(out + i, p.k - i), p.k - i);
    }
}

}  // namespace engine::cpu::ENGINE_NS
