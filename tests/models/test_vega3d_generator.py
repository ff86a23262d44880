"""The generator as a feature extractor: against diffusers, and each saving against doing without it."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from _peer_vega import CASES, PeerCase, as_folder, generator_cases, made
from safetensors.numpy import load_file, save_file

import engine
from engine.blocks.weights import Recipe
from engine.errors import CheckpointError, ConfigError, EngineError, InputError
from engine.io.checkpoint import SafetensorsFile
from engine.models.vega3d import generator_reference as reference
from engine.models.vega3d.features import PROMPT_FILE, PROMPT_KEY, Files, GeneratorFeatures
from engine.models.vega3d.generator import averages, crop_of
from engine.models.vega3d.generator_config import DitConfig, Tap, VaeConfig
from engine.models.vega3d.generator_weights import (
    DitLoader,
    canonical_dit,
    canonical_vae,
    checked,
    dit_shapes,
    vae_shapes,
)
from engine.models.vega3d.prompt import FILES as TEXT_ENCODERS
from engine.models.vega3d.prompt import empty_text
from engine.models.vega3d.schedule import noise_level, rotation_angles
from engine.runtime.arena import Arena

peer = pytest.mark.peer
FP32, BF16 = 5e-6, 2e-2  # of the largest value; the largest seen is 2.3e-6 and 5.5e-3


def error(got: np.ndarray, want: np.ndarray) -> float:
    assert got.shape == want.shape
    return float(np.abs(got - want).max() / np.abs(want).max())


def weights(case: PeerCase, dtype: torch.dtype = torch.float32):
    """(VAE, transformer) under original names, as torch tensors."""
    out = []
    for file, view, shapes, config in (
        ("vae", canonical_vae, vae_shapes, VaeConfig.from_json(case.about["vae"])),
        ("transformer", canonical_dit, dit_shapes, DitConfig.from_json(case.about["transformer"])),
    ):
        source = checked(view(SafetensorsFile(case.folder / f"{file}.safetensors")), shapes(config))  # type: ignore[operator, arg-type]
        out.append(({k: torch.from_numpy(np.array(source.read(k))).to(dtype) for k in source.keys()}, config))  # noqa: SIM118
    return out


def loaded(case: PeerCase, folder, **options) -> GeneratorFeatures:
    """The engine on the case, with the transformer's own grid unless told otherwise."""
    height, width = case.io["images"].shape[2:]
    given = {"dtype": "fp32", "grid": None, "size": (width, height), "timestep": case.target,
             "block": case.about["block"], "max_pixels": 1 << 16, "progress": False} | options  # fmt: skip
    return GeneratorFeatures.load(folder, **given)


def noise_for(case: PeerCase, vae: VaeConfig) -> np.ndarray:
    """The noise that leads from the images' latents to the case's."""
    _, alpha, sigma = noise_level(case.target)
    mean, std = (np.float64(v).reshape(1, -1, 1, 1) for v in (vae.mean, vae.std))
    return ((case.io["z"] - alpha * (case.io["mu"] - mean) / std) / sigma).astype(np.float32)


# ------------------------------------------------------------------------------------------------------ peers
@peer
@pytest.mark.parametrize("i", range(CASES))
def test_reference_is_diffusers(i):
    case = generator_cases()[i]
    (vae, vae_config), (dit, dit_config) = weights(case)
    io = {k: torch.from_numpy(v) for k, v in case.io.items()}
    with torch.no_grad():
        z0 = reference.vae_encode(vae, vae_config, io["images"])
        args = (dit, dit_config, io["z"][:, :, None], io["prompt"], case.about["timestep"])
        got = reference.features(*args, case.about["block"])
        velocity = reference.denoise(*args)[:, :, 0]
    mean, std = (torch.tensor(v).reshape(1, -1, 1, 1) for v in (vae_config.mean, vae_config.std))
    assert error(z0.numpy(), ((io["mu"] - mean) / std).numpy()) <= FP32
    assert error(got.numpy(), case.io["features"]) <= FP32
    assert error(velocity.numpy(), case.io["velocity"]) <= FP32


@peer
@pytest.mark.parametrize("i", range(CASES))
def test_engine_is_diffusers(i, tmp_path):
    case = generator_cases()[i]
    folder = as_folder(case, tmp_path / "wan")
    images = case.io["images"].transpose(0, 2, 3, 1)
    want = case.io["features"]
    with loaded(case, folder) as m:
        assert error(m.features(images, noise=noise_for(case, m.vae)), want) <= FP32
    with loaded(case, folder, dtype="bf16") as m:
        assert error(m.features(images, noise=noise_for(case, m.vae)), want) <= BF16


@peer
@pytest.mark.parametrize("i", range(CASES))
def test_longer_texts_are_diffusers(i, tmp_path):
    """Keys and values once at load, and one key that stands for all padding."""
    case = generator_cases("prompt")[i]
    assert len(case.io["prompt"]) > 1
    folder = as_folder(case, tmp_path / "wan")
    images, want = case.io["images"].transpose(0, 2, 3, 1), case.io["features"]
    for dtype, limit in (("fp32", FP32), ("bf16", BF16)):
        with loaded(case, folder, dtype=dtype) as m:
            assert error(m.features(images, noise=noise_for(case, m.vae)), want) <= limit
            for name, plan in m.plans.items():
                assert len(plan) <= m.node_budgets[name]


@peer
@pytest.mark.parametrize("i", range(CASES))
def test_the_empty_text_is_umt5_s(i):
    """Of </s> alone, from either name of the token table and from the original names."""
    folder = made() / f"text-{i:02d}"
    want = load_file(folder / "peer.safetensors")["states"][0]
    assert error(empty_text(folder), want) <= FP32


@peer
def test_the_text_encoder_stands_in_for_a_missing_prompt(case, folder, tmp_path):
    """In the original names, beside the generator; a damaged one is named."""
    to = tmp_path / "wan"
    shutil.copytree(folder, to)
    (to / PROMPT_FILE).unlink()
    d, rng = case.io["prompt"].shape[1], np.random.default_rng(0)
    shapes = {"token_embedding.weight": (4, d), "norm.weight": (d,), "blocks.0.norm1.weight": (d,),
              "blocks.0.norm2.weight": (d,), "blocks.0.ffn.gate.0.weight": (9, d), "blocks.0.ffn.fc1.weight": (9, d),
              "blocks.0.ffn.fc2.weight": (d, 9), "blocks.0.pos_embedding.embedding.weight": (32, 2)}  # fmt: skip
    shapes |= {f"blocks.0.attn.{w}.weight": (d, d) for w in "qkvo"}
    tensors = {k: rng.standard_normal(s).astype(np.float32) for k, s in shapes.items()}
    file = to / TEXT_ENCODERS[0]
    save_file(tensors, file)
    files = Files.of(to)
    files.close()
    np.testing.assert_array_equal(files.prompt, empty_text(file))
    assert files.prompt.shape == (1, d)
    for name, value, message in (
        ("blocks.0.attn.v.weight", np.zeros((d, d + 1), np.float32), r"attn\.v\.weight of the text encoder is"),
        ("token_embedding.weight", np.zeros((1, d), np.float32), "token_embedding"),
        ("norm.weight", np.full(d, np.nan, np.float32), r"norm\.weight"),
        ("blocks.2.norm1.weight", np.zeros(d, np.float32), "without a gap"),
    ):
        save_file({**tensors, name: value}, file)
        with pytest.raises(CheckpointError, match=message):
            Files.of(to)


@pytest.fixture(scope="module")
def case() -> PeerCase:
    """Several frames and blocks, and a grid that pooling divides unevenly."""
    return generator_cases()[10]


@pytest.fixture(scope="module")
def folder(case, tmp_path_factory):
    return as_folder(case, tmp_path_factory.mktemp("case") / "wan")


@peer
def test_original_names_load_the_same(case, folder, tmp_path):
    """The published files hold other names, more than is needed, and a prefix where ComfyUI wrote them."""
    (vae, vae_config), (dit, _) = weights(case)
    vae["decoder.conv1.weight"] = torch.zeros(3)
    vae["encoder.downsamples.5.time_conv.weight"] = torch.zeros(3)
    for prefix in ("", "model.diffusion_model."):
        to = tmp_path / f"wan{len(prefix)}"
        to.mkdir()
        save_file({k: v.numpy() for k, v in vae.items()}, to / "Wan2.1_VAE.safetensors")
        save_file({prefix + k: v.numpy() for k, v in dit.items()}, to / "diffusion_pytorch_model.safetensors")
        (to / "vae").mkdir()
        (to / "vae" / "config.json").write_text(json.dumps(case.about["vae"]))
        c = DitConfig.from_json(case.about["transformer"])
        (to / "config.json").write_text(json.dumps(
            {"_class_name": "WanModel", "model_type": "t2v", "dim": c.dim, "ffn_dim": c.ffn, "freq_dim": c.freq_dim,
             "in_dim": c.channels, "num_heads": c.heads, "num_layers": c.layers, "text_dim": c.text_dim, "eps": c.eps}
        ))  # fmt: skip
        shutil.copy(folder / PROMPT_FILE, to / PROMPT_FILE)
        images = case.io["images"].transpose(0, 2, 3, 1)
        height, width = case.io["images"].shape[2:]
        with loaded(case, folder) as one:
            want = one.features(images)
        # Through the front door: no config.json says what a diffusers folder is.
        for at in (to, folder):
            two = engine.load(at, device="cpu", dtype="fp32", grid=None, size=(width, height), timestep=case.target,
                              block=case.about["block"], max_pixels=1 << 16)  # fmt: skip
            with two:
                assert two.vae == vae_config
                np.testing.assert_array_equal(two.features(images), want)
    with pytest.raises(InputError, match="GeneratorFeatures has no option 'context'"):
        engine.load(folder, context=5)


# ------------------------------------------------------------------------------------------------------ savings
@peer
@pytest.mark.parametrize("i", [0, 4, 6, 10])
def test_folding_and_the_gate_per_head_change_nothing(i):
    """In fp64: modulations, norms, rotary pairs folded; the text as a gate per head; means before the last product."""
    case = generator_cases()[i]
    (_, (dit, c)) = weights(case, torch.float64)
    io = {k: torch.from_numpy(v).double() for k, v in case.io.items()}
    timestep, block = case.about["timestep"], case.about["block"]
    tap = Tap(timestep=case.target, block=block)
    source = canonical_dit(SafetensorsFile(case.folder / "transformer.safetensors"))
    loader = DitLoader(c, tap, source, Arena(), Recipe("f32", None))
    e0, context = loader.modulations(), loader.context(case.io["prompt"])
    rows, columns = (n // 2 for n in case.io["z"].shape[2:])
    angles = torch.from_numpy(rotation_angles(rows, columns, c.head_dim))
    grid = (min(2, rows), min(3, columns))
    x = reference.patches(dit, "patch_embedding", io["z"][:, :, None])
    want = reference.features(dit, c, io["z"][:, :, None], io["prompt"], timestep, block)
    want = reference.pooled(want, rows, columns, replace(tap, grid=grid))
    norm = torch.nn.functional.layer_norm
    for b in range(block + 1):
        f = {k: torch.from_numpy(v) for k, v in loader.fold(f"blocks.{b}", e0, context).items()}
        q, k, v = (norm(x, (c.dim,), eps=c.eps) @ f["qkv"].T + f["qkv_bias"]).chunk(3, -1)
        q, k = reference.rms(q, f["norm_q"], c.eps), reference.rms(k, f["norm_k"], c.eps)

        def heads(t: torch.Tensor) -> torch.Tensor:
            return t.unflatten(-1, (c.heads, c.head_dim)).transpose(1, 2)

        def halves(t: torch.Tensor) -> torch.Tensor:
            one, two = heads(t).chunk(2, -1)
            return torch.cat([one * angles.cos() - two * angles.sin(), two * angles.cos() + one * angles.sin()], -1)

        mixed = (
            torch.nn.functional.scaled_dot_product_attention(halves(q), halves(k), heads(v)).transpose(1, 2).flatten(2)
        )
        x = x + mixed @ f["out"].T + f["out_bias"]
        q = norm(x, (c.dim,), eps=c.eps) @ f["query"].T + f["query_bias"]
        q = reference.rms(q, torch.ones(c.dim).double(), c.eps)
        p = ((q * f["dk"]).unflatten(-1, (c.heads, -1)).sum(-1) - np.log(c.text_len - 1)).sigmoid()
        x = x + f["base"] + p @ f["u"]
        h = torch.nn.functional.gelu(norm(x, (c.dim,), eps=c.eps) @ f["fc1"].T + f["fc1_bias"], approximate="tanh")
        if b < block:
            x = x + h @ f["fc2"].T + f["fc2_bias"]
    means = torch.zeros(grid[0] * grid[1], rows * columns).double()
    for r, entries in enumerate(averages(rows, columns, grid)):
        for cell, share in entries:
            means[r, cell] += share
    got = means @ x + (means @ h) @ f["fc2"].T + f["fc2_bias"]
    # Angles come as fp64 here and there; the only rounding is that of fp64 sums in another order.
    assert error(got.numpy(), want.numpy()) <= 1e-12


@peer
def test_frames_of_a_pass_are_each_alone(case, folder):
    images = case.io["images"].transpose(0, 2, 3, 1)
    rng = np.random.default_rng(0)
    images = np.concatenate([images, rng.uniform(-1, 1, (3, *images.shape[1:])).astype(np.float32)])
    with loaded(case, folder, grid=(2, 3)) as alone:
        want = alone.features(images, seed=7)
        assert not np.array_equal(want[0], alone.features(images[:1], seed=8)[0])
    for per_pass in (2, 3):
        with loaded(case, folder, grid=(2, 3), per_pass=per_pass) as m:
            np.testing.assert_array_equal(m.features(images, seed=7), want)


@peer
def test_pooled_features_are_means_of_all(case, folder):
    images = case.io["images"].transpose(0, 2, 3, 1)
    with loaded(case, folder) as m:
        all_of = torch.from_numpy(m.features(images, seed=3))
        rows, columns = m._generator.rows, m._generator.columns
    for grid in ((1, 1), (2, 3), (rows, 1)):
        with loaded(case, folder, grid=grid) as m:
            want = reference.pooled(all_of, rows, columns, replace(m.tap, grid=grid)).numpy()
            assert error(m.features(images, seed=3), want) <= 1e-6


@peer
def test_plans_are_static_and_within_their_budgets(case, folder):
    with loaded(case, folder, grid=(2, 3), per_pass=2) as m:
        for name, plan in m.plans.items():
            report = plan.audit(m.arena, budget=m.node_budgets[name])
            assert not report.problems, (name, report.problems)
        assert "gate_heads" in str(m.explain())


# ------------------------------------------------------------------------------------------------------ frames
@pytest.mark.parametrize(("shape", "size"), [((384, 384), (832, 480)), ((30, 50), (64, 32)), ((97, 61), (32, 64))])
def test_crops_are_torch_s(shape, size):
    tap = Tap(size=size)
    image = torch.rand(1, 3, *shape, generator=torch.Generator().manual_seed(0))
    want = reference.cover(image, *size)[0].permute(1, 2, 0).reshape(-1, 3).numpy()
    cells, shares = crop_of(*shape, tap)
    got = (image[0].permute(1, 2, 0).reshape(-1, 3).numpy()[cells] * shares[..., None]).sum(1)
    np.testing.assert_allclose(got, want, atol=1e-6)
    cells, shares = crop_of(*shape, replace(tap, crop="stretch"))
    want = (
        torch.nn.functional.interpolate(image, (size[1], size[0]), mode="bilinear")[0].permute(1, 2, 0).reshape(-1, 3)
    )
    got = (image[0].permute(1, 2, 0).reshape(-1, 3).numpy()[cells] * shares[..., None]).sum(1)
    np.testing.assert_allclose(got, want.numpy(), atol=1e-6)


@peer
def test_frames_of_any_size_are_cropped(case, folder):
    """uint8 and floats, larger and smaller than the size: as cropped by torch first."""
    height, width = case.io["images"].shape[2:]
    rng = np.random.default_rng(1)
    with loaded(case, folder, grid=(2, 2)) as m:
        for shape in ((height // 2 + 3, width + 9), (height * 2, width - 5)):
            clip = rng.integers(0, 256, (2, *shape, 3), dtype=np.uint8)
            plain = torch.from_numpy(clip.astype(np.float32) / 127.5 - 1).permute(0, 3, 1, 2)
            want = reference.cover(plain, width, height).permute(0, 2, 3, 1).clamp(-1, 1).numpy()
            assert error(m.features(clip, seed=1), m.features(want, seed=1)) <= 1e-5


# ------------------------------------------------------------------------------------------------------ noise levels
LEVELS = {0: (4, 0.004975120), 50: (52, 0.052631531), 100: (101, 0.101010010), 200: (201, 0.201173350),
          250: (251, 0.251396447), 300: (299, 0.299923837), 400: (400, 0.400542855), 500: (500, 0.500299275),
          700: (700, 0.700482786), 900: (900, 0.900586188), 1000: (999, 0.999599576)}  # fmt: skip


@pytest.mark.parametrize("target", LEVELS)
def test_noise_levels_are_the_published_ones(target):
    timestep, alpha, sigma = noise_level(target)
    assert timestep == LEVELS[target][0]
    assert sigma == pytest.approx(LEVELS[target][1], abs=3e-8)
    assert alpha == pytest.approx(1 - sigma, abs=1e-12)


# ------------------------------------------------------------------------------------------------------ refusals
@peer
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"size": (30, 30)}, "multiples of"),
        ({"size": "large"}, "size 'large'"),
        ({"block": 99}, "block = 99"),
        ({"timestep": 1001}, "timestep = 1001"),
        ({"crop": "fit"}, "crop = 'fit'"),
        ({"grid": (99, 1)}, "larger than the transformer's"),
        ({"grid": 3}, "grid 3"),
        ({"per_pass": 0}, "per_pass=0"),
        ({"dtype": "int8"}, "dtype 'int8'"),
        ({"max_pixels": True}, "max_pixels=True"),
    ],
)
def test_bad_options_are_refused(case, folder, options, message):
    with pytest.raises(EngineError, match=message):
        loaded(case, folder, **options)


@peer
@pytest.mark.parametrize(
    ("frames", "kwargs", "message"),
    [
        (np.zeros((4, 4, 3), np.uint8), {}, r"frames are \[4, 4, 3\]"),
        (np.zeros((0, 4, 4, 3), np.uint8), {}, r"frames are \[0, 4, 4, 3\]"),
        ([np.zeros((4, 4, 3)), np.zeros((5, 4, 3))], {}, "differ in size"),
        (np.zeros((1, 4, 4, 3), np.int64), {}, "must be uint8"),
        (np.full((1, 4, 4, 3), np.nan, np.float32), {}, "finite floats"),
        (np.full((1, 4, 4, 3), 1.5, np.float32), {}, "finite floats"),
        (np.zeros((1, 512, 512, 3), np.uint8), {}, "max_pixels="),
        (np.zeros((1, 4, 4, 3), np.uint8), {"noise": np.zeros((1, 2, 3))}, "noise is"),
        (np.zeros((1, 4, 4, 3), np.uint8), {"seed": -1}, "seed=-1"),
    ],
)
def test_bad_input_is_refused(case, folder, frames, kwargs, message):
    with loaded(case, folder) as m, pytest.raises(InputError, match=message):
        m.features(frames, **kwargs)


@peer
def test_missing_parts_are_named(case, folder, tmp_path):
    for name, error_type, message in (
        (PROMPT_FILE, CheckpointError, "has neither wan_prompt_embedding.safetensors"),
        ("vae/diffusion_pytorch_model.safetensors", CheckpointError, "has no VAE"),
        ("transformer/config.json", ConfigError, "config.json"),
        ("transformer/diffusion_pytorch_model.safetensors", CheckpointError, "transformer"),
    ):
        to = tmp_path / name.replace("/", "-")
        shutil.copytree(folder, to)
        (to / name).unlink()
        with pytest.raises(error_type, match=message):
            Files.of(to).close()
    to = tmp_path / "prompt"
    shutil.copytree(folder, to)
    save_file({PROMPT_KEY: np.zeros((1, 5), np.float32)}, to / PROMPT_FILE)
    with pytest.raises(CheckpointError, match=r"'context'\) is \[1, 5\]"):
        Files.of(to)
    save_file({PROMPT_KEY: np.zeros((512, case.io["prompt"].shape[1]), np.float32)}, to / PROMPT_FILE)
    with pytest.raises(CheckpointError, match="n < 512"):
        Files.of(to)
    tensors = load_file(case.folder / "transformer.safetensors")
    tensors.pop("patch_embedding.weight")
    (to / "transformer" / "diffusion_pytorch_model.safetensors").unlink()
    save_file(tensors, to / "transformer" / "diffusion_pytorch_model.safetensors")
    shutil.copy(folder / PROMPT_FILE, to / PROMPT_FILE)
    with pytest.raises(CheckpointError, match=r"patch_embedding\.weight"):
        loaded(case, to)


def test_parts_that_do_not_belong_together_are_refused():
    with pytest.raises(ConfigError, match="takes 16 latent channels, the VAE has 4"):
        Tap().checked(DitConfig(), VaeConfig(z=4, mean=(0.0,) * 4, std=(1.0,) * 4))


def test_a_plan_from_the_configuration_alone():
    """Of the 1.3B transformer to its last block: bf16 weights as counted, half of them in int8."""
    config = {"_class_name": "WanModel", "num_layers": 2}
    parts = GeneratorFeatures.plan(config)
    per_block = 2 * (3 + 1 + 1) * 1536**2 + 2 * 2 * 1536 * 8960
    assert 2 * per_block < parts["weights"] < 2 * per_block + 0.3e9
    assert GeneratorFeatures.plan(config, quant="int8")["weights"] < parts["weights"] - 0.9 * per_block


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"_class_name": "FluxTransformer2DModel"}, "_class_name"),
        ({"model_type": "i2v"}, "model_type"),
        ({"dim": 100, "num_heads": 3}, "must divide"),
        ({"dim": 8, "num_heads": 2}, "no room for three axes"),
        ({"patch_size": [1, 4, 4]}, "patch_size"),
        ({"num_layers": 0}, "num_layers = 0"),
        ({"_class_name": "VaceWanModel", "vace_layers": [2, 4]}, "vace_layers"),
    ],
)
def test_bad_configurations_are_refused(config, message):
    with pytest.raises(ConfigError, match=message):
        DitConfig.from_json(config)


@pytest.mark.parametrize(
    ("config", "message"),
    [({"dim_mult": []}, "dim_mult"), ({"z_dim": 4}, "latents_mean"), ({"is_residual": True}, "Wan 2.2"),
     ({"latents_std": [0.0] * 16}, "latents_std")],
)  # fmt: skip
def test_bad_vaes_are_refused(config, message):
    with pytest.raises(ConfigError, match=message):
        VaeConfig.from_json(config)
