"""Runs in the peer environment: π0.5 or X-VLA at full size in lerobot, bf16, driven by JSON lines on standard input.

    python bench/peers/lerobot_worker.py pi05|xvla THREADS STEPS

Commands: {"do": "step"} one denoising step on a cached prefix, {"do": "chunk", "views": n} the whole chunk of `STEPS`
steps from images and text (lerobot computes absent views too); each answers with seconds.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tests/peers"))
from faster_lerobot import import_lerobot

TEXT = 48  # valid tokens of a prompt


@torch.no_grad()
def fill(model: torch.nn.Module) -> None:
    """Weights of no meaning: windows into one pool of small numbers, where building at random would take minutes."""
    pool = 0.02 * torch.randn(1 << 22)
    for name, t in model.named_parameters():
        if t.ndim == 1:
            t.fill_(0.0 if "bias" in name or "language_model" in name else 1.0)
            continue
        flat = t.view(-1)
        for at in range(0, len(flat), len(pool)):
            n = min(len(pool), len(flat) - at)
            flat[at : at + n] = pool[:n].to(t.dtype)


def materialise(build) -> torch.nn.Module:
    """A module built without memory, then given memory; constants (frequencies, position ids) are made again.

    Every tensor keeps the dtype that lerobot gives it for bfloat16: of π0.5 norms and the vision tower stay fp32.
    """
    with torch.device("meta"):
        empty = build()
    constants = [(n, b.dtype, b.shape) for n, b in empty.named_buffers()]
    model = empty.to_empty(device="cpu").eval()
    fill(model)
    for name, kind, shape in constants:
        owner, _, leaf = name.rpartition(".")
        if leaf == "position_ids":
            value = torch.arange(shape[-1]).expand(shape)
        elif "inv_freq" in leaf:
            value = 10_000.0 ** (-torch.arange(shape[0]) / shape[0])
        else:
            value = torch.zeros(shape)
        setattr(model.get_submodule(owner), leaf, value.to(kind))
    return model


class Pi05:
    def __init__(self, steps: int) -> None:
        from lerobot.configs import FeatureType, PolicyFeature
        from lerobot.policies.pi05 import modeling_pi05 as m
        from lerobot.policies.pi05.configuration_pi05 import PI05Config

        config = PI05Config(device="cpu", dtype="bfloat16", num_inference_steps=steps)
        config.input_features = {
            **{f"observation.images.c{i}": PolicyFeature(FeatureType.VISUAL, (3, 224, 224)) for i in range(3)},
            "observation.state": PolicyFeature(FeatureType.STATE, (14,)),
        }
        config.output_features = {"action": PolicyFeature(FeatureType.ACTION, (14,))}
        self.m, self.steps = m, steps
        self.model = materialise(lambda: m.PI05Pytorch(config))
        self.model.config = config
        self.images = [torch.rand(1, 3, 224, 224) * 2 - 1 for _ in range(3)]
        self.tokens = torch.randint(3, 1000, (1, 200))
        self.token_mask = (torch.arange(200) < TEXT)[None]
        self.noise = torch.randn(1, 50, 32)
        self.cache = None

    def seen(self, views: int):
        masks = [torch.tensor([i < views]) for i in range(3)]
        return self.images, masks, self.tokens, self.token_mask

    def chunk(self, views: int) -> None:
        self.model.sample_actions(*self.seen(views), noise=self.noise, num_steps=self.steps)

    def step(self) -> None:
        if self.cache is None:
            embedded, valid, attention = self.model.embed_prefix(*self.seen(3))
            _, self.cache = self.model.paligemma_with_expert.forward(
                attention_mask=self.m.prepare_attention_masks_4d(self.m.make_att_2d_masks(valid, attention)),
                position_ids=torch.cumsum(valid, 1) - 1, past_key_values=None, inputs_embeds=[embedded, None],
                use_cache=True,
            )  # fmt: skip
            self.valid = valid
        self.model.denoise_step(self.valid, self.cache, self.noise, torch.tensor([0.5]))


class XVLA:
    def __init__(self, steps: int) -> None:
        from lerobot.configs import FeatureType, PolicyFeature
        from lerobot.policies.xvla.configuration_xvla import XVLAConfig
        from lerobot.policies.xvla.modeling_xvla import XVLAPolicy

        vision = {
            "model_type": "davit", "dim_embed": [256, 512, 1024, 2048], "num_heads": [8, 16, 32, 64],
            "num_groups": [8, 16, 32, 64], "depths": [1, 1, 9, 1], "patch_size": [7, 3, 3, 3],
            "patch_stride": [4, 2, 2, 2], "patch_padding": [3, 1, 1, 1], "patch_prenorm": [False, True, True, True],
            "window_size": 12, "projection_dim": 1024,
            "image_pos_embed": {"type": "learned_abs_2d", "max_pos_embeddings": 50},
            "visual_temporal_embedding": {"type": "COSINE", "max_temporal_embeddings": 100},
            "image_feature_source": ["spatial_avg_pool", "temporal_avg_pool"],
        }  # fmt: skip
        text = {
            "d_model": 1024, "encoder_layers": 12, "encoder_attention_heads": 16, "encoder_ffn_dim": 4096,
            "vocab_size": 51289, "max_position_embeddings": 4096, "pad_token_id": 1, "decoder_layers": 1,
            "decoder_attention_heads": 1, "decoder_ffn_dim": 4,
        }  # fmt: skip
        config = XVLAConfig(
            device="cpu", chunk_size=30, n_action_steps=1, dtype="bfloat16", tokenizer_max_length=64, max_state_dim=20,
            florence_config={"text_config": text, "vision_config": vision}, num_image_views=3,
            num_denoising_steps=steps,
        )  # fmt: skip
        config.input_features = {
            **{f"observation.images.c{i}": PolicyFeature(FeatureType.VISUAL, (3, 224, 224)) for i in range(3)},
            "observation.state": PolicyFeature(FeatureType.STATE, (20,)),
        }
        config.output_features = {"action": PolicyFeature(FeatureType.ACTION, (20,))}
        self.steps = steps
        self.model = materialise(lambda: XVLAPolicy(config).to(torch.bfloat16)).model
        self.images = torch.randn(1, 3, 3, 224, 224)
        self.tokens = torch.randint(3, 1000, (1, 64))
        self.state, self.domain = torch.randn(1, 20), torch.tensor([0])
        self.encoded = None

    def chunk(self, views: int) -> None:
        mask = (torch.arange(3) < views)[None]
        self.model.generate_actions(self.tokens, self.images, mask, self.domain, self.state, steps=self.steps)

    def step(self) -> None:
        dtype = next(self.model.transformer.parameters()).dtype
        if self.encoded is None:
            images, mask = self.images.to(dtype), torch.ones(1, 3, dtype=torch.bool)
            self.encoded = self.model.forward_vlm(self.tokens, images, mask)
            self.x = torch.randn(1, 30, 20).to(dtype)
        self.model.transformer(
            domain_id=self.domain, action_with_noise=self.x, proprio=self.state.to(dtype),
            t=torch.tensor([0.5]).to(dtype), **self.encoded,
        )  # fmt: skip


def main() -> None:
    kind, threads, steps = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    torch.set_num_threads(threads)
    import_lerobot()
    policy = {"pi05": Pi05, "xvla": XVLA}[kind](steps)
    print(json.dumps({"seconds": 0}), flush=True)
    for line in sys.stdin:
        command = json.loads(line)
        verb = command.pop("do")
        with torch.inference_mode():
            t0 = time.perf_counter()
            getattr(policy, verb)(**command)
        print(json.dumps({"seconds": time.perf_counter() - t0}), flush=True)


if __name__ == "__main__":
    main()
