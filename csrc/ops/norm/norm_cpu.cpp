// norm: RMS or layer norm of rows, or none, with weight, bias, modulation and activation
// layout   x, out row-major f32
// mapping  one task per row
// moves    x twice (the second time from L1), out once
// tried    -
#include "ops/norm/norm.h"

#include "ops/gemm/microkernel.h"

namespace engine::cpu::ENGINE_NS {

void norm(const NormParams& p, Ctx& ctx) {
  const int64_t m = p.rows ? imin(*p.rows, p.m) : p.m;
  for (int64_t t; (t = claim(ctx)) < m;) {
    const int64_t mod = (p.mod_rows ? p.mod_rows[t] : 0) * p.ldmod;
    const auto part = [&](int64_t column) {
      return p.mod && column >= 0 ? span_at(p.mod, p.mod_dtype, mod + column) : Span();
    };
    const float* x = p.x + t * p.ldx;
    float* out = p.out + t * p.ldo;
    if (p.add) {
      const float* more = p.add + t * p.ldadd;
      for (int64_t i = 0; i < p.k; i += 16)
        storen(out + i, add(loadn(x + i, p.k - i), loadn(more + i, p.k - i)), p.k - i);
      x = out;
    }
    if (p.kind != kProNone) {
      norm_row({p.kind, p.w, p.b, part(p.mod_scale), part(p.mod_shift), p.eps}, x, p.k, out);
      x = out;
    }
    if (p.act != kActNone || x != out)
      for (int64_t i = 0; i < p.k; i += 16) storen(out + i, activate(loadn(x + i, p.k - i), p.act), p.k - i);
  }
}

}  // namespace engine::cpu::ENGINE_NS
