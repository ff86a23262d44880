"""The plain-torch MoTok, tokenizer and whole: against golden values and its own definition."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from _motok import check, constrained, error, filled, normal, one_thread, reachable, uniform
from _motok_tiny import TINY, tiny
from torch import Tensor, nn

from engine.errors import InputError
from engine.models.motok.config import FAST27, Diffusion, Guidance, MoTokConfig
from engine.models.motok.guidance_reference import (
    distances,
)
from engine.models.motok.planner_reference import (
    hint,
    sample_ar,
    sample_ddm,
)
from engine.models.motok.reference import MoTokReference
from engine.models.motok.schedule import alpha_bars
from engine.models.motok.tokenizer_reference import (
    Encoder,
    Tokenizer,
    denoise,
    schedule,
)

__all__ = ["one_thread"]

FULL = MoTokConfig.humanml3d()
VARIANTS = [MoTokConfig.humanml3d(1), FULL, MoTokConfig.humanml3d(3), MoTokConfig.kit()]
VARIANT_NAMES = ["DR2", "DR4", "DR8", "KIT"]


# ---- golden: tokenizer and sampler ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return filled(Tokenizer(FULL))


@pytest.fixture(scope="module")
def condition(tokenizer: Tokenizer) -> Tensor:
    return tokenizer.condition(tokenizer.encode(normal("input.x", 1, 64, 263)))


def test_hash() -> None:
    want = [0.32296541100367904, 0.9392699846066535, -0.30673523154109716, -0.061776779126375914, -0.23977054469287395]
    assert uniform("test", 5).tolist() == want


def test_golden_encoder_and_tokens(tokenizer: Tokenizer) -> None:
    h = tokenizer.encoder(normal("input.x", 1, 64, 263))
    check(h.transpose(1, 2), [-0.4297624698, 1.063250618, 0.6522904526, 1.284838093], -1.429047534,
          71.7552358, 18357.90329)  # fmt: skip
    tokens = tokenizer.quantizer(h)
    assert tokens.tolist() == [[831, 358, 445, 673, 110, 602, 684, 471, 810, 110, 282, 58, 943, 588, 781, 252]]
    square = (h[0, :, None] - tokenizer.quantizer.codebook).square().sum(-1).sort(-1).values
    assert float(square[0, 0]) == pytest.approx(567.8544585, rel=1e-9)
    assert float((square[:, 1] - square[:, 0]).min()) == pytest.approx(0.114, abs=5e-4)
    assert torch.equal(square[:, 0], (h[0] - tokenizer.quantizer.codebook[tokens[0]]).square().sum(-1))


def test_golden_condition(condition: Tensor) -> None:
    check(condition, [-0.06350122908, -0.2152177007, 0.05329169447, 0.08009057883], 0.01410723391,
          -135.138746, 4063.036019)  # fmt: skip


def test_golden_denoiser(tokenizer: Tokenizer, condition: Tensor) -> None:
    time, t = tokenizer.denoiser.time_embed, torch.tensor(599)
    check(time.waves(t), [-0.5025964409, -0.2182720698, -0.9394269303, 0.4484211417], None, 46.70893563, 128)
    check(time(t), [0.7759726135, 0.621417338, -0.04235189081, -0.09431435559], None, -1.135552686, 118.3806588)
    check(tokenizer.denoiser(normal("input.xt", 1, 64, 263), t, condition),
          [0.3106600566, 0.7946063971, 0.3766197781, 0.7588289212], -0.4732287806,
          -363.3047972, 18776.26988)  # fmt: skip


@pytest.mark.parametrize(
    ("beta", "golden"),
    [
        ("linear", ([-0.1585649503, -1.2277739, -0.9771427276, 1.571429097], -2.077407963, -920.7307577, 19436.5777)),
        ("cosine", ([0.3112396596, -1.771422242, -0.8019123384, 1.608738709], -1.871032911, -841.960188, 19815.96745)),
    ],
)
def test_golden_sampling(tokenizer: Tokenizer, condition: Tensor, beta: str, golden) -> None:
    check(denoise(lambda x, t: tokenizer.denoiser(x, t, condition), normal("input.noise", 1, 64, 263),
                  Diffusion(beta_schedule=beta)), *golden)  # fmt: skip


# ---- schedules --------------------------------------------------------------------------------------------------


def test_fast27_follows_from_its_rule() -> None:
    want: list[int] = []
    for section, count in enumerate((10, 10, 3, 2, 2)):
        stride, at = 199 / (count - 1), 0.0
        for _ in range(count):
            want.append(200 * section + round(at))
            at += stride
    want[-1] = 997
    assert tuple(want) == FAST27 and len(FAST27) == 27


LINEAR = """.9999 .99268577 .97606241 .95049997 .91671327 .87360499 .8260645 .77359578 .71748636 .65903851 .65634701
.59680883 .53744096 .47931193 .42334634 .36797562 .31862485 .27322768 .23203437 .19514644 .19357201 .077796658
.025879389 .025567492 .0015320895 .0015075211 4.202153e-05"""
COSINE = """.99995872 .9978232 .99334852 .9865557 .97747667 .96558694 .95197589 .93624113 .91845662 .89870592 .89776291
.87605605 .85258227 .82745188 .80078299 .77139301 .74197475 .71141969 .67987142 .64747821 .64598817 .49228517
.34080964 .339333 .094045613 .09313778 9.715044e-06"""


@pytest.mark.parametrize(("beta", "table"), [("linear", LINEAR), ("cosine", COSINE)])
def test_alpha_bars(beta: str, table: str) -> None:
    d = Diffusion(beta_schedule=beta)
    s = schedule(d)
    for got, text in zip(s.alpha_bar.tolist(), table.split(), strict=True):
        assert got == pytest.approx(float(text), rel=6e-8)
    bars = torch.from_numpy(alpha_bars(d))
    assert len(bars) == 1000 and bool((bars.diff() < 0).all())
    assert (float(s.a[0]), float(s.b[0])) == (1.0, 0.0)


@pytest.mark.parametrize("steps", [FAST27, (0, 1, 2, 500, 999), (7,), tuple(range(0, 1000, 20))])
def test_steps_are_those_of_the_definitions(steps: tuple[int, ...]) -> None:
    """ddim keeps the noise that x and the clean estimate imply; ddpm is the posterior by Bayes' rule."""
    d = Diffusion(timesteps=steps)
    s, small = schedule(d), schedule(replace(d, variance="fixed_small"))
    clean, noise = 0.7, -1.3
    for k in range(len(steps)):
        bar, after = float(s.alpha_bar[k]), float(s.alpha_bar[k - 1]) if k else 1.0
        x = math.sqrt(bar) * clean + math.sqrt(1 - bar) * noise
        want = math.sqrt(after) * clean + math.sqrt(1 - after) * noise
        assert float(s.a[k]) * clean + float(s.b[k]) * x == pytest.approx(want, abs=1e-12)
        alpha = bar / after
        assert float(s.sigma[k]) ** 2 == pytest.approx(1 - alpha, rel=1e-9)
        if k == 0:
            assert (float(s.mean_clean[0]), float(s.mean_x[0])) == (pytest.approx(1.0), 0.0)
            continue
        # x' ~ N(sqrt(after) clean, 1 - after), x | x' ~ N(sqrt(alpha) x', 1 - alpha)
        precision = 1 / (1 - after) + alpha / (1 - alpha)
        mean = (math.sqrt(after) * clean / (1 - after) + math.sqrt(alpha) * x / (1 - alpha)) / precision
        assert float(s.mean_clean[k]) * clean + float(s.mean_x[k]) * x == pytest.approx(mean, rel=1e-9)
        assert float(small.sigma[k]) ** 2 == pytest.approx(1 / precision, rel=1e-9)


def test_ddpm_adds_its_noise_and_none_at_the_end() -> None:
    d = Diffusion(sampler="ddpm", timesteps=(0, 300, 700))
    s, noise, extra = schedule(d), normal("n", 1, 4, 5), normal("e", 3, 1, 4, 5)
    x = noise
    for k in (2, 1, 0):
        x = float(s.mean_clean[k]) * x.tanh() + float(s.mean_x[k]) * x + (float(s.sigma[k]) * extra[k] if k else 0)
    seen = []

    def predict(x: Tensor, t: Tensor) -> Tensor:
        seen.append(int(t))
        return x.tanh()

    torch.testing.assert_close(denoise(predict, noise, d, extra), x, rtol=0, atol=1e-14)
    assert seen == [700, 300, 0]
    for bad in (None, extra[:2]):
        with pytest.raises(InputError, match=r"step_noise of \[3, 1, 4, 5\]"):
            denoise(predict, noise, d, bad)


# ---- shapes, keys and sizes -------------------------------------------------------------------------------------


def conv(name: str, out: int, channels: int, kernel: int) -> dict[str, tuple[int, ...]]:
    return {f"{name}.weight": (out, channels, kernel), f"{name}.bias": (out,)}


def linear(name: str, out: int, inputs: int) -> dict[str, tuple[int, ...]]:
    return {f"{name}.weight": (out, inputs), f"{name}.bias": (out,)}


def layer_norm(name: str, width: int) -> dict[str, tuple[int, ...]]:
    return {f"{name}.weight": (width,), f"{name}.bias": (width,)}


def stack_keys(name: str) -> dict[str, tuple[int, ...]]:
    out = {}
    for i in range(3):
        out |= conv(f"{name}.model.{i}.conv1", 512, 512, 3) | conv(f"{name}.model.{i}.conv2", 512, 512, 1)
    return out


def encoder_keys(name: str, channels: int, out: int, down_t: int) -> dict[str, tuple[int, ...]]:
    keys = conv(f"{name}.model.0", 512, channels, 3) | conv(f"{name}.model.{2 + down_t}", out, 512, 3)
    for i in range(2, 2 + down_t):
        keys |= conv(f"{name}.model.{i}.0", 512, 512, 4) | stack_keys(f"{name}.model.{i}.1")
    return keys


def tokenizer_keys(c: MoTokConfig) -> dict[str, tuple[int, ...]]:
    keys = encoder_keys("encoder", c.features, 768, c.down_t) | {"quantizer.codebook": (1024, 768)}
    keys |= conv("decoder.model.0", 512, 768, 3)
    for i in range(2, 2 + c.down_t):
        keys |= stack_keys(f"decoder.model.{i}.0") | conv(f"decoder.model.{i}.2", 512, 512, 3)
    keys |= conv(f"decoder.model.{2 + c.down_t}", 512, 512, 3) | conv(f"decoder.model.{4 + c.down_t}", 768, 512, 3)
    keys |= linear("denoiser.input_proj", 768, c.features) | linear("denoiser.cond_embed", 768, 768)
    keys |= linear("denoiser.time_embed.mlp.0", 768, 256) | linear("denoiser.time_embed.mlp.2", 768, 768)
    for i in range(6):
        block = f"denoiser.blocks.{i}"
        keys |= layer_norm(f"{block}.conv_norm", 768) | conv(f"{block}.conv", 768, 768, c.denoiser.kernel)
        keys |= layer_norm(f"{block}.mlp_block.in_ln", 768) | linear(f"{block}.mlp_block.adaLN_modulation.1", 2304, 768)
        keys |= linear(f"{block}.mlp_block.mlp.0", 768, 768) | linear(f"{block}.mlp_block.mlp.2", 768, 768)
    return (
        keys
        | linear("denoiser.final_layer.linear", c.features, 768)
        | linear("denoiser.final_layer.adaLN_modulation.1", 1536, 768)
    )


def ddm_keys(c: MoTokConfig) -> dict[str, tuple[int, ...]]:
    keys: dict[str, tuple[int, ...]] = {"token_emb.weight": (1026, 768), "position_enc.pe": (5000, 1, 384)}
    keys |= linear("input_process.poseEmbedding", 384, 768) | linear("cond_emb", 384, 512)
    for i in range(6):
        layer = f"seqTransEncoder.layers.{i}"
        keys |= {f"{layer}.self_attn.in_proj_weight": (1152, 384), f"{layer}.self_attn.in_proj_bias": (1152,)}
        keys |= linear(f"{layer}.self_attn.out_proj", 384, 384)
        keys |= linear(f"{layer}.linear1", 1024, 384) | linear(f"{layer}.linear2", 384, 1024)
        keys |= layer_norm(f"{layer}.norm1", 384) | layer_norm(f"{layer}.norm2", 384)
    keys |= linear("output_process.dense", 384, 384) | layer_norm("output_process.LayerNorm", 384)
    keys |= linear("output_process.poseFinal", 1024, 384)
    return keys | encoder_keys("traj_encoder", 3 * c.joints, 384, c.down_t)


def ar_keys(c: MoTokConfig) -> dict[str, tuple[int, ...]]:
    keys: dict[str, tuple[int, ...]] = {"trans_base.tok_emb.weight": (1026, 768)}
    keys |= {"trans_base.pos_embed.embed": (c.max_tokens + 2, 1, 768), "trans_head.head.weight": (1025, 768)}
    keys |= linear("trans_base.cond_emb", 768, 512) | layer_norm("trans_head.ln_f", 768)
    for i in range(9):
        block = f"trans_base.blocks.{i}"
        keys |= layer_norm(f"{block}.ln1", 768) | layer_norm(f"{block}.ln2", 768)
        for part in ("key", "query", "value", "proj"):
            keys |= linear(f"{block}.attn.{part}", 768, 768)
        keys |= linear(f"{block}.mlp.0", 3072, 768) | linear(f"{block}.mlp.2", 768, 3072)
    return keys | encoder_keys("traj_encoder", 3 * c.joints, 768, c.down_t)


def clip_keys() -> dict[str, tuple[int, ...]]:
    keys: dict[str, tuple[int, ...]] = {"token_embedding.weight": (49408, 512), "positional_embedding": (77, 512)}
    keys |= {"text_projection": (512, 512)} | layer_norm("ln_final", 512)
    for i in range(12):
        block = f"transformer.resblocks.{i}"
        keys |= layer_norm(f"{block}.ln_1", 512) | layer_norm(f"{block}.ln_2", 512)
        keys |= {f"{block}.attn.in_proj_weight": (1536, 512), f"{block}.attn.in_proj_bias": (1536,)}
        keys |= linear(f"{block}.attn.out_proj", 512, 512)
        keys |= linear(f"{block}.mlp.c_fc", 2048, 512) | linear(f"{block}.mlp.c_proj", 512, 2048)
    return keys


def sketched(c: MoTokConfig) -> MoTokReference:
    with torch.device("meta"):
        return MoTokReference(c)


@pytest.mark.parametrize("c", VARIANTS, ids=VARIANT_NAMES)
def test_keys_of_the_files(c: MoTokConfig) -> None:
    model = sketched(c)
    for part, want in (
        ("tokenizer", tokenizer_keys(c)),
        ("ddm", ddm_keys(c)),
        ("ar", ar_keys(c)),
        ("clip", clip_keys()),
    ):
        got = {key: tuple(tensor.shape) for key, tensor in getattr(model, part).state_dict().items()}
        assert got == want, part


def millions(*modules: nn.Module) -> float:
    return round(sum(p.numel() for m in modules for p in m.parameters()) / 1e6, 2)


def test_published_sizes() -> None:
    m = sketched(FULL)
    assert millions(m.tokenizer.encoder) == 9.98 and millions(m.tokenizer.decoder) == 11.02
    assert millions(m.tokenizer.denoiser) == pytest.approx(38.4, abs=0.05)
    assert millions(m.ddm) - millions(m.ddm.traj_encoder) == pytest.approx(10.1, abs=0.05)
    assert millions(m.ddm.traj_encoder) == pytest.approx(9.1, abs=0.05)
    assert millions(m.ar) - millions(m.ar.traj_encoder) == pytest.approx(65.8, abs=0.06)
    assert millions(m.ar.traj_encoder) == pytest.approx(9.7, abs=0.05)
    assert millions(m.clip) == 63.43
    fast = sketched(MoTokConfig.humanml3d(1))
    assert millions(fast.tokenizer.denoiser) - millions(m.tokenizer.denoiser) == pytest.approx(
        12 * 768**2 / 1e6, abs=0.02
    )


@pytest.mark.parametrize("dataset", ["humanml3d", "kit"])
@pytest.mark.parametrize("down_t", [1, 2, 3])
def test_from_text_and_joints_to_motion(dataset: str, down_t: int) -> None:
    """Every part once at small sizes, in fp32, at the longest and at the shortest length."""
    c = tiny(dataset=dataset, down_t=down_t, diffusion={"timesteps": [0, 200, 600, 997]})
    model = filled(MoTokReference(c)).float()
    joints, features = c.joints, c.features
    _, constraints = constrained(64, joints=(0, 5), of=joints, scale=c.scale)
    text = model.clip(torch.tensor([[48, 3, 4, 49, 0], [48, 7, 49, 0, 0]]))
    assert text.shape == (2, 14) and features == 12 * joints - 1
    statistic = torch.zeros(3 * joints), torch.ones(3 * joints)
    guide_input = hint(c, constraints.target.float(), constraints.mask, *statistic).expand(2, -1, -1)
    assert guide_input.shape == (2, 64, 3 * joints)
    for frames in (64, 2 * c.rate):
        n = frames // c.rate
        traj, ar_traj = (p.traj_encoder(guide_input[:, :frames]) for p in (model.ddm, model.ar))
        assert traj.shape == (2, n, 24)
        tokens = sample_ddm(model.ddm, c, [n, n], uniform("u", 2, 5, n).abs(), text, traj, torch.zeros(2, 5))
        other = sample_ar(model.ar, c, uniform("v", 2, n).abs(), [n, n], text, ar_traj, torch.ones(2, n))
        for ids in (tokens, other):
            assert ids.shape == (2, n) and int(ids.max()) < c.codes
        motion, evals = model.decode(tokens, normal("noise", 2, frames, features).float())
        assert motion.shape == (2, frames, features) and motion.dtype == torch.float32 and evals == [0, 0]
        assert bool(motion.isfinite().all())
        assert model.tokenizer.encode(motion).shape == (2, n)
    with pytest.raises(InputError, match=f"not a multiple of {c.rate}"):
        model.tokenizer.encode(torch.zeros(1, 64 + 1, features))


def test_hint() -> None:
    _, c = constrained()
    mean, std = uniform("mean", 66), 1 + uniform("std", 66) / 2
    got = hint(FULL, c.target, c.mask, mean, std)
    want = (c.target - mean.view(22, 3)) / std.view(22, 3)
    assert torch.equal(got.view(64, 22, 3)[c.mask], want[c.mask])
    assert torch.equal(got.view(64, 22, 3)[~c.mask], torch.zeros(64, 22, 3).double()[~c.mask])
    marked = MoTokConfig.from_json({"traj": {"hint_mask_channels": True}})
    got = hint(marked, c.target, c.mask, mean, std)
    assert got.shape == (64, marked.traj.channels) == (64, 88) and torch.equal(got[:, 66:], c.mask.double())


def test_the_denoiser_is_local() -> None:
    """Two blocks of kernel 5 see four frames to either side."""
    c = tiny()
    model = filled(Tokenizer(c)).denoiser
    x, s, t = normal("x", 1, 32, 263), normal("s", 1, 32, 20), torch.tensor([500])
    want, moved = model(x, t, s), x.clone()
    moved[:, 16] += 1
    changed = (model(moved, t, s) - want).abs().amax((0, 2)) > 1e-9
    assert changed.nonzero()[:, 0].tolist() == list(range(12, 21))
    head = filled(Tokenizer(tiny(denoiser={**TINY["denoiser"], "kernel": 0}))).denoiser
    changed = (head(moved, t, s) - head(x, t, s)).abs().amax((0, 2)) > 1e-9
    assert changed.nonzero()[:, 0].tolist() == [16]
    assert not any(".conv" in key for key in head.state_dict())


def test_dilations_run_down() -> None:
    stack = Encoder(tiny(), 8, 8).model[2][1].model
    assert [block.conv1.dilation[0] for block in stack] == [9, 3, 1]


def test_single_precision() -> None:
    c = tiny()
    exact, single = (filled(MoTokReference(c)).to(dtype) for dtype in (torch.float64, torch.float32))
    x, noise, tokens = normal("x", 1, 64, 263), normal("noise", 1, 64, 263), torch.arange(16)[None]
    text = uniform("t", 1, 14)
    assert error(single.tokenizer.encoder(x.float()), exact.tokenizer.encoder(x)) < 1e-5
    assert error(single.ddm(tokens, text.float()), exact.ddm(tokens, text)) < 1e-5
    assert error(single.ar(tokens, text.float()), exact.ar(tokens, text)) < 1e-5
    assert error(single.decode(tokens, noise)[0], exact.decode(tokens, noise)[0]) < 1e-4


# ---- guided decoding --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def small() -> MoTokReference:
    return filled(MoTokReference(tiny()))


@pytest.mark.parametrize("sampler", ["ddim", "ddpm"])
@pytest.mark.parametrize("on", ["x0", "mu"])
@pytest.mark.parametrize("solver", ["lbfgs", "lbfgs_last", "project"])
def test_guided_decoding(small: MoTokReference, solver: str, on: str, sampler: str) -> None:
    """Guidance comes closer than none, one sample's motion does not depend on its neighbours, and calls add up."""
    model = filled(MoTokReference(tiny(diffusion={"sampler": sampler})))
    tokens, noise = torch.stack([torch.arange(8), torch.arange(8, 16)]), normal("noise", 2, 32, 263)
    extra = normal("steps", 27, 2, 32, 263)
    _, one = reachable(frames=32)
    _, two = reachable(frames=32, joints=(0, 3, 15), every=7)
    g = Guidance(solver=solver, on=on)
    free, _ = model.decode(tokens, noise, step_noise=extra)
    motion, evals = model.decode(tokens, noise, [one, two], g, extra)
    for i, c in enumerate((one, two)):
        assert float(distances(motion[i], c).mean()) < 0.2 * float(distances(free[i], c).mean())
        alone, spent = model.decode(tokens[i : i + 1], noise[i : i + 1], [c], g, extra[:, i : i + 1])
        # One sample's products round otherwise than two samples', and L-BFGS makes the difference larger.
        assert spent == pytest.approx(evals[i : i + 1], rel=0.05)
        torch.testing.assert_close(alone[0], motion[i], rtol=0, atol=1e-3)
    if solver == "project":
        assert evals == [0, 0] and float(distances(motion[0], one).max()) < 1e-9
    else:
        calls = sum(g.calls(k) for k in range(27))
        assert all(4 * calls < e <= 6 * calls for e in evals)
    limit = replace(g, max_evals=60)
    assert max(model.decode(tokens, noise, [one, two], limit, extra)[1]) <= 60


def test_what_decoding_refuses(small: MoTokReference) -> None:
    _, c = constrained(frames=32)
    tokens, noise = torch.zeros(2, 8, dtype=torch.long), torch.zeros(2, 32, 263)
    with pytest.raises(InputError, match="1 constraints for 2 samples"):
        small.decode(tokens, noise, [c])
    with pytest.raises(InputError, match=r"noise is \[2, 31, 263\]"):
        small.decode(tokens, noise[:, 1:])
