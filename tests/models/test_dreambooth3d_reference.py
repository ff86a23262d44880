"""3DreamBooth's transformer in plain torch against the released module's outputs, and what must not change them."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from _dreambooth import CONFIG, TIME, adapter, det, golden, latent, states, views, weights
from torch import Tensor

from engine.errors import ConfigError, InputError
from engine.models.dreambooth3d import reference as m
from engine.models.dreambooth3d.config import DitConfig, VaeConfig
from engine.models.dreambooth3d.schedule import bucket, latent_frames, noise_levels, rotation_angles
from engine.models.dreambooth3d.weights import KINDS, adapter_shapes, dit_shapes

NEAR = {"atol": 2e-5, "rtol": 0}


def adapters(text: str | Tensor = "off") -> m.Adapters:
    return m.Adapters(adapter("tdb", KINDS["subject"]), adapter("tdapter", KINDS["views"]), text)


def both(w: dict[str, Tensor], given: list[Tensor], how: m.Adapters, time: float = TIME) -> Tensor:
    """[2, z, T, h, w] of the negative and the positive prompt."""
    rows = [m.velocity(w, CONFIG, latent(), time, states(row), given, how) for row in ("uncond", "cond")]
    return torch.stack(rows)


@pytest.mark.parametrize(
    ("name", "count", "text", "adapted"),
    [("A_base_noref", 0, "off", False), ("B_joint_2ref_textlora_all", 2, "all", True),
     ("C_joint_2ref_textlora_off", 2, "off", True), ("D_joint_0ref_textlora_all", 0, "all", True)],
)  # fmt: skip
def test_velocity(name: str, count: int, text: str, adapted: bool) -> None:
    got = both(weights(), views(count), adapters(text) if adapted else m.Adapters())
    torch.testing.assert_close(got, golden(name), **NEAR)


@pytest.mark.parametrize("one_way", [False, True])
@pytest.mark.parametrize("count", [0, 2])
def test_many_samples_are_each_alone(count: int, one_way: bool) -> None:
    """What trainers run: a batch of latents, times, states and views."""
    clean = torch.stack([det(f"in.many{i}", (8, 3, 4, 6), 1) for i in range(3)])
    times, text = torch.tensor([812.5, 33.0, 400.0]), torch.stack([det(f"in.text{i}", (7, 48), 1) for i in range(3)])
    shown = [torch.stack([det(f"in.view{i}{j}", (8, 4, 6), 1) for i in range(3)]) for j in range(count)]
    how = adapters("all")
    got = m.velocity(weights(), CONFIG, clean, times, text, shown, how, one_way=one_way)
    for i in range(3):
        alone = [v[i] for v in shown]
        want = m.velocity(weights(), CONFIG, clean[i], float(times[i]), text[i], alone, how, one_way=one_way)
        torch.testing.assert_close(got[i], want, **NEAR)


def test_streams_behind_the_first_block() -> None:
    for i, row in enumerate(("uncond", "cond")):
        begun = m.begin(weights(), CONFIG, latent(), TIME, states(row), views(), adapters("all"))
        video, refs, text = m.block(weights(), CONFIG, "double_blocks.0", begun)
        torch.testing.assert_close(video.x, golden("E_block0_img")[i], **NEAR)
        torch.testing.assert_close(text.x, golden("E_block0_txt")[i, : len(text.x)], **NEAR)
        for j, ref in enumerate(refs.x.chunk(len(views()))):
            torch.testing.assert_close(ref, golden(f"E_block0_ref{j}")[i], **NEAR)


def test_sampler() -> None:
    got = m.sample(
        weights(), CONFIG, latent(), states("uncond"), states("cond"), views(), adapters(), steps=4, shift=5.0
    )
    torch.testing.assert_close(got[None], golden("F_sampler4_final_latent"), **NEAR)


def test_personalisation_step() -> None:
    given = adapters("all")
    assert given.subject is not None and given.views is not None
    # Copies: others see the same tensors.
    copies = ({k: v.detach().clone() for k, v in part.items()} for part in (given.subject, given.views))
    how = m.Adapters(*copies, "all")
    assert how.subject is not None and how.views is not None
    trained = {f"{kind}:{k}": v.requires_grad_() for kind, part in (("tdb", how.subject), ("tdapter", how.views))
               for k, v in part.items()}  # fmt: skip
    clean, noise = (det(f"train.{n}", (8, 1, 4, 6), 1) for n in ("x0", "eps"))

    def loss() -> Tensor:
        return m.one_frame_loss(weights(), CONFIG, clean, noise, 640.0, states("cond"), views(), how)

    noisy = 0.36 * clean + 0.64 * noise
    got = m.velocity(weights(), CONFIG, noisy, 640.0, states("cond"), views(), how)
    torch.testing.assert_close(got[None].detach(), golden("H_train_pred"), **NEAR)
    optimiser = torch.optim.AdamW(trained.values(), lr=1e-4, weight_decay=0.01)
    first = loss()
    first.backward()
    assert first.item() == pytest.approx(2.945113, rel=1e-4)
    norms = {k: 0.0 if v.grad is None else v.grad.norm().item() for k, v in trained.items()}
    assert sum(n * n for n in norms.values()) ** 0.5 == pytest.approx(0.515915, rel=1e-4)
    for key, want in {
        "tdapter:img_in.proj.lora_B": 0.083994, "tdb:img_in.proj.lora_B": 0.371586,
        "tdapter:double_blocks.0.img_attn_q.lora_B": 0.0031027, "tdb:double_blocks.0.img_attn_q.lora_B": 0.034064,
        "tdapter:double_blocks.1.img_mlp.fc1.lora_A": 0.0022615, "tdb:double_blocks.1.img_mlp.fc1.lora_A": 0.039369,
        "tdapter:double_blocks.2.img_attn_q.lora_A": 0, "tdb:double_blocks.2.img_attn_q.lora_A": 0.017406,
        "tdapter:double_blocks.2.img_mlp.fc2.lora_B": 0, "tdb:double_blocks.2.img_mlp.fc2.lora_B": 0.075841,
        "tdb:double_blocks.2.txt_mlp.fc2.lora_B": 0,
    }.items():  # fmt: skip
        assert norms[f"{key}.weight"] == pytest.approx(want, rel=1e-4), key
    optimiser.step()
    assert loss().item() == pytest.approx(2.941838, rel=1e-4)


# ---- what must hold --------------------------------------------------------------------------------------------------


def test_merged_adapters_equal_live_ones() -> None:
    """On video tokens; references and text keep weights of their own, so they are left out."""
    how = m.Adapters(adapter("tdb", KINDS["views"]))
    live = both(weights(), [], how)
    torch.testing.assert_close(
        both(m.merged(weights(), how.subject or {}), [], m.Adapters()), live, atol=1e-6, rtol=1e-6
    )


def test_modes() -> None:
    """References with their own adapter alone; and a subject's attention alone, its image side twice as strong."""
    views_only = both(weights(), views(1), m.Adapters(views=adapter("tdapter", KINDS["views"])))
    assert (views_only - both(weights(), views(1), m.Adapters())).abs().max() > 1e-3
    part = adapter("tdb", KINDS["attention"])
    twice = {k: 2 * v if "img" in k and "lora_B" in k else v for k, v in part.items()}
    scaled = both(weights(), [], m.Adapters(part, text="all", scale=2.0))
    torch.testing.assert_close(scaled, both(weights(), [], m.Adapters(twice, text="all")), atol=1e-6, rtol=1e-6)


def test_references_look_back() -> None:
    """Their tokens depend on the video's noise from the first block on: keys and values cannot be kept across steps."""

    def first(z: Tensor) -> list[m.Stream]:
        return m.begin(weights(), CONFIG, z, TIME, states("cond"), views(), adapters())

    before, after = (first(z) for z in (latent(), latent() + 0.1))
    torch.testing.assert_close(before[1].x, after[1].x, atol=0, rtol=0)
    one, two = (m.block(weights(), CONFIG, "double_blocks.0", s) for s in (before, after))
    assert (one[1].x - two[1].x).abs().max() > 1e-4


def test_order_of_references_and_spans() -> None:
    """A reference's place is its time; a span is part of 'all' and more than 'off'."""
    straight, swapped = (both(weights(), given, adapters()) for given in (views(), views()[::-1]))
    assert (straight - swapped).abs().max() > 1e-3
    mask = torch.zeros(9, dtype=torch.bool)
    mask[3:5] = True

    def positive(text: str | Tensor) -> Tensor:
        return m.velocity(weights(), CONFIG, latent(), TIME, states("cond"), views(), adapters(text))

    span, off, every = positive(mask), positive("off"), positive("all")
    assert (span - off).abs().max() > 1e-4 and (span - every).abs().max() > 1e-4
    torch.testing.assert_close(positive(torch.ones(9, dtype=torch.bool)), every, atol=0, rtol=0)
    torch.testing.assert_close(positive(torch.zeros(9, dtype=torch.bool)), off, atol=1e-6, rtol=0)


def test_schedule_and_sizes() -> None:
    t = 1000 * noise_levels(50, DitConfig().shift)
    np.testing.assert_allclose(t[:4], [1000.0, 997.738, 995.392, 992.958], atol=5e-4)
    np.testing.assert_allclose(t[-4:], [364.865, 272.727, 155.172, 0.0], atol=5e-4)
    for (h, w, resolution), size in {
        (9, 16, "720p"): (720, 1280), (16, 9, "720p"): (1280, 720), (1, 1, "720p"): (960, 960),
        (3, 4, "720p"): (832, 1104), (9, 21, "720p"): (624, 1456), (9, 16, "480p"): (480, 848),
        (1, 1, "480p"): (640, 640), (3, 4, "480p"): (544, 720),
    }.items():  # fmt: skip
        assert bucket(h, w, resolution) == size
    assert [latent_frames(n) for n in (1, 49, 81, 121)] == [1, 13, 21, 31]
    later = rotation_angles(1, 4, 6, (8, 12, 12), 256.0, first=2)
    np.testing.assert_array_equal(later, rotation_angles(3, 4, 6, (8, 12, 12), 256.0)[48:])


@pytest.mark.parametrize(
    "wrong",
    [lambda: noise_levels(0, 9.0), lambda: noise_levels(50, 0.0), lambda: bucket(0, 1), lambda: bucket(1, -1),
     lambda: bucket(9, 16, "1080p"), lambda: latent_frames(50), lambda: latent_frames(0)],
)  # fmt: skip
def test_wrong_requests(wrong: Callable[[], object]) -> None:
    with pytest.raises(InputError):
        wrong()


def test_parameters_of_the_full_size() -> None:
    count = {k: int(np.prod(s)) for k, s in dit_shapes(DitConfig()).items()}
    assert sum(count.values()) == 8_326_608_160
    assert sum(n for k, n in count.items() if k.startswith("double_blocks.")) == 8_157_072_384
    for modules, tensors, total in ((KINDS["views"], 650, 31_884_304), (KINDS["subject"], 1298, 63_734_800)):
        shapes = adapter_shapes(DitConfig(), 16, modules)
        assert len(shapes) == tensors and sum(int(np.prod(s)) for s in shapes.values()) == total


OFFICIAL = {
    "patch_size": [1, 1, 1], "in_channels": 32, "out_channels": 32, "hidden_size": 2048, "heads_num": 16,
    "mlp_width_ratio": 4, "mlp_act_type": "gelu_tanh", "mm_double_blocks_depth": 54, "mm_single_blocks_depth": 0,
    "rope_dim_list": [16, 56, 56], "rope_theta": 256, "text_states_dim": 3584, "vision_states_dim": 1152,
    "ideal_resolution": "720p", "ideal_task": "t2v",
}  # fmt: skip
DIFFUSERS = {
    "in_channels": 65, "out_channels": 32, "num_attention_heads": 16, "attention_head_dim": 128, "num_layers": 54,
    "num_refiner_layers": 2, "mlp_ratio": 4.0, "patch_size": 1, "patch_size_t": 1, "text_embed_dim": 3584,
    "text_embed_2_dim": 1472, "image_embed_dim": 1152, "rope_theta": 256.0, "rope_axes_dim": [16, 56, 56],
    "target_size": 960, "task_type": "t2v",
}  # fmt: skip


def test_configurations() -> None:
    assert DitConfig.from_json(OFFICIAL) == DitConfig.from_json(DIFFUSERS) == DitConfig()
    assert DitConfig.from_json(DIFFUSERS | {"target_size": 640}).shift == 5.0


@pytest.mark.parametrize(
    ("change", "named"),
    [({"use_meanflow": True}, "use_meanflow"), ({"mm_single_blocks_depth": 2}, "mm_single_blocks_depth"),
     ({"rope_dim_list": [16, 56]}, "rope axes"), ({"heads_num": 12}, "heads"), ({"in_channels": 16}, "channels"),
     ({"ideal_resolution": "1080p"}, "ideal_resolution"), ({"ideal_task": "i2v"}, "task"),
     ({"hidden_size": "2048"}, "hidden_size"), ({"concat_condition": False}, "concat_condition"),
     ({"qk_norm_type": "layer"}, "qk_norm_type"), ({"text_pool_type": "mean"}, "text_pool_type")],
)  # fmt: skip
def test_wrong_configurations(change: dict, named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        DitConfig.from_json(OFFICIAL | change)


def test_target_sizes() -> None:
    for size in ([960], 512):
        with pytest.raises(ConfigError, match="target_size"):
            DitConfig.from_json(DIFFUSERS | {"target_size": size})


@pytest.mark.parametrize(
    ("change", "named"),
    [({"latent_channels": 30}, "divide"), ({"block_out_channels": [128, 200, 512, 1024, 1000]}, "divide"),
     ({"block_out_channels": 128}, "block_out_channels"), ({"in_channels": 4}, "in_channels"),
     ({"downsample_match_channel": False}, "downsample_match_channel"), ({"ffactor_spatial": 12}, "power of two"),
     ({"ffactor_temporal": 16, "ffactor_spatial": 8}, "compressed"), ({"shift_factor": 0.1}, "shift_factor"),
     ({"ffactor_spatial": 8, "block_out_channels": [128, 256, 512, 1024, 512]}, "on one grid")],
)  # fmt: skip
def test_wrong_vae_configurations(change: dict, named: str) -> None:
    assert VaeConfig.from_json({}) == VaeConfig()
    with pytest.raises(ConfigError, match=named):
        VaeConfig.from_json(change)
