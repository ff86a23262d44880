"""Makes random tiny pi0.5 and X-VLA checkpoints with lerobot and records what lerobot computes from them.

Run by the interpreter of the peer environment (it knows nothing of `engine`):

    python tests/peers/faster_lerobot.py OUT --seed 0 --cases 12

OUT/pi05-NN and OUT/xvla-NN hold config.json and model.safetensors as lerobot names things, and peer.safetensors with
inputs, intermediate results and chunks of actions (fp32 unless said; B samples, V views, H actions, A action width):

    both   image_mask [B, V] bool, tokens [B, L] int64, noise [B, H, A], tau_const [N + 1, H], tau_has [N + 1, H],
           tau_delay [N + 1, H], delay [1] int64, prefix [B, H, A], and the chunks const, has, delayed [B, H, .]
    pi05   images [B, V, 3, S, S] in [-1, 1], token_mask [B, L] bool, vision [B, V, T, D],
           k, v [layers, B, P, kv_heads, head_dim], valid [B, P] bool
    xvla   images [B, V, 3, height, width] normalised, state [B, P], domain [B] int64,
           vlm [B, T + L, D], aux [B, (V - 1) T, D]

`const` is lerobot as it is. `has` and `delayed` give every action a time of its own (FASTER, arXiv 2603.19199); for
them three places of lerobot's pi0.5 take times per action instead of per sample, and its X-VLA network is called with
such times by a loop of our own. Rows before `delay` are committed and mean nothing in `delayed`.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.machinery
import importlib.util
import json
import random
import sys
import types
from pathlib import Path

import torch
from safetensors.torch import save_file

MODES = ["ee6d", "joint", "agibot_ee6d", "franka_joint7", "so101_bimanual", "auto"]


# ---- lerobot without what its policies do not need ---------------------------------------------------------------


class _Absent(types.ModuleType):
    """A module in which every name is an empty class."""

    def __getattr__(self, name: str) -> type:
        if name.startswith("__"):
            raise AttributeError(name)
        return type(name, (), {})


def import_lerobot() -> None:
    """On Python 3.11 parts of lerobot do not even parse; the policy modules import without them."""
    root = Path(next(iter(importlib.util.find_spec("lerobot").submodule_search_locations)))
    for name in ("policies", "policies.pi05", "policies.xvla", "policies.rtc"):
        module = types.ModuleType(f"lerobot.{name}")
        module.__path__ = [str(root.joinpath(*name.split(".")))]
        module.__spec__ = importlib.machinery.ModuleSpec(module.__name__, None, is_package=True)
        sys.modules[module.__name__] = module
    for name in ("transforms", "utils.io_utils", "processor", "robots", "motors", "teleoperators", "envs", "datasets"):
        module = _Absent(f"lerobot.{name}")
        module.__path__ = []
        sys.modules[module.__name__] = module


# ---- random weights and times ------------------------------------------------------------------------------------


@torch.no_grad()
def randomise(model: torch.nn.Module, seed: int) -> None:
    """Initial values hide bugs (zero modulation, equal norms), so every tensor gets a life of its own."""
    g = torch.Generator().manual_seed(seed)

    def normal(t: torch.Tensor, mean: float, std: float) -> None:
        t.copy_(mean + std * torch.randn(t.shape, generator=g))

    for name, t in model.named_parameters():
        parts = name.split(".")
        if parts[-1] == "bias" or name.endswith("bias.weight") or ".dense." in name:
            normal(t, 0, 0.1)
        elif t.ndim == 1:  # norms; Gemma's weight is an offset from one
            normal(t, 0 if ".language_model." in name and "paligemma" in name else 1, 0.1)
        elif "action_encoder.fc" in name or "action_decoder.fc" in name or "_proj.fc" in name:
            normal(t, 0, 0.2)
        elif "embed_tokens" in name or "lm_head" in name:
            normal(t, 0, t.shape[-1] ** -0.5 if "paligemma" in name else 0.5)
        elif "emb" in name or "soft_prompt" in name:
            normal(t, 0, 0.3)
        else:
            normal(t, 0, (t[0].numel()) ** -0.5)


def schedule(horizon: int, steps: int, alpha: float, u0: float, delay: int) -> torch.Tensor:
    """Times [steps + 1, horizon]; u0 = 0 gives the constant schedule."""
    i = torch.arange(horizon, dtype=torch.float64)
    n = (i - delay).clamp(min=0) / max(horizon - 1 - delay, 1)
    u = (1 - n**alpha) * u0
    rho = torch.linspace(1, 0, steps + 1, dtype=torch.float64)[:, None]
    return torch.where(i < delay, 0, ((rho - u) / (1 - u)).clamp(0, 1)).float()


def times(r: random.Random, horizon: int) -> dict[str, torch.Tensor]:
    steps, delay = r.choice([3, 4, 5, 10]), r.randrange(1, horizon)
    alpha, u0 = r.choice([0.4, 0.6, 0.7, 1.0]), r.choice([0.5, 0.8, 0.9])
    return {
        "tau_const": schedule(horizon, steps, 1, 0, 0), "tau_has": schedule(horizon, steps, alpha, u0, 0),
        "tau_delay": schedule(horizon, steps, alpha, u0, delay), "delay": torch.tensor([delay]),
    }  # fmt: skip


def write(folder: Path, policy, config: dict, drop: tuple[str, ...], record: dict[str, torch.Tensor]) -> None:
    folder.mkdir(parents=True)
    tensors = {k: v.clone().contiguous() for k, v in policy.state_dict().items() if not k.endswith(drop or ("\0",))}
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    save_file({k: v.clone().contiguous() for k, v in record.items()}, folder / "peer.safetensors")


def saved_config(config, name: str) -> dict:
    """config.json as lerobot would write it."""
    import draccus

    return {"type": name} | json.loads(json.dumps(draccus.encode(config)))


# ---- pi0.5 -------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def patched(*changes):
    """Set (object, attribute, value) for a while."""
    old = [(where, name, getattr(where, name)) for where, name, _ in changes]
    for where, name, value in changes:
        setattr(where, name, value)
    try:
        yield
    finally:
        for where, name, value in old:
            setattr(where, name, value)


def pi05_policy(r: random.Random):
    from lerobot.configs import FeatureType, PolicyFeature
    from lerobot.policies.pi05 import modeling_pi05 as m
    from lerobot.policies.pi05.configuration_pi05 import PI05Config

    kv = r.choice([1, 1, 2])
    heads, head_dim, depth = kv * r.choice([1, 2, 4, 3]), r.choice([6, 8, 10, 16]), r.randint(1, 4)
    gemma = {
        "gemma_2b": m.GemmaConfig(width=r.choice([24, 36, 50, 64]), depth=depth, mlp_dim=r.choice([33, 64, 100]),
                                  num_heads=heads, num_kv_heads=kv, head_dim=head_dim),
        "gemma_300m": m.GemmaConfig(width=r.choice([16, 22, 30, 48]), depth=depth, mlp_dim=r.choice([21, 40, 72]),
                                    num_heads=heads, num_kv_heads=kv, head_dim=head_dim),
    }  # fmt: skip
    patch, vision_heads = r.choice([7, 8, 14]), r.choice([1, 2, 3])
    side, vocab = patch * r.randint(2, 4), r.choice([61, 97, 128])
    vision = {
        "hidden_size": vision_heads * r.choice([6, 8, 10]), "num_hidden_layers": r.randint(1, 2),
        "num_attention_heads": vision_heads, "intermediate_size": r.choice([20, 37, 64]), "patch_size": patch,
        "image_size": side, "projection_dim": gemma["gemma_2b"].width,
    }  # fmt: skip
    tower, expert = m.PaliGemmaForConditionalGenerationWithPiGemma, m.PiGemmaForCausalLM

    def small_tower(config):
        config._vocab_size = config.text_config.vocab_size = config.image_token_index = vocab
        for key, value in vision.items():
            setattr(config.vision_config, key, value)
        config.projection_dim = vision["projection_dim"]
        return tower(config=config)

    def small_expert(config):
        config.vocab_size = vocab
        return expert(config=config)

    cameras = [f"observation.images.camera{i}" for i in range(r.randint(1, 3))]
    config = PI05Config(
        device="cpu", chunk_size=r.randint(2, 12), max_action_dim=r.choice([5, 8, 17, 32]), n_action_steps=1,
        image_resolution=(side, side), tokenizer_max_length=r.randint(4, 20), dtype="float32",
        min_period=r.choice([4e-3, 1e-2]), max_period=r.choice([4.0, 2.0]), num_inference_steps=10,
    )  # fmt: skip
    width = r.randint(2, config.max_action_dim)
    config.input_features = {
        **{name: PolicyFeature(FeatureType.VISUAL, (3, side, side)) for name in cameras},
        "observation.state": PolicyFeature(FeatureType.STATE, (width,)),
    }
    config.output_features = {"action": PolicyFeature(FeatureType.ACTION, (width,))}
    with patched(
        (m, "get_gemma_config", gemma.__getitem__),
        (m, "PaliGemmaForConditionalGenerationWithPiGemma", small_tower),
        (m, "PiGemmaForCausalLM", small_expert),
    ):
        policy = m.PI05Policy(config).eval()
    stated = saved_config(config, "pi05")
    # The variants name the published sizes; here the tensors give the sizes and only head counts are stated.
    for key in ("paligemma_variant", "action_expert_variant"):
        del stated[key]
    stated |= {"num_attention_heads": heads, "head_dim": head_dim, "vision_num_heads": vision_heads}
    return policy, stated, vocab


def norm_per_action(self, x: torch.Tensor, cond: torch.Tensor | None = None):
    """lerobot's norm, except that a modulation with an axis of actions is taken as it is."""
    normed = self._norm(x)
    if cond is None or self.dense is None:
        return (normed * (1.0 + self.weight.float())).type_as(x), None
    modulation = self.dense(cond)
    scale, shift, gate = (modulation if cond.ndim == 3 else modulation[:, None]).chunk(3, -1)
    return normed * (1 + scale) + shift, gate


@torch.no_grad()
def make_pi05(folder: Path, seed: int, case: int) -> None:
    r = random.Random(f"{seed}/pi05/{case}")
    policy, config, vocab = pi05_policy(r)
    from lerobot.policies import pi_gemma
    from lerobot.policies.pi05 import modeling_pi05 as m

    randomise(policy, r.randrange(2**31))
    model, c = policy.model, policy.config
    # They are tied in published weights; here either name may be the one that is kept.
    paligemma = model.paligemma_with_expert.paligemma
    paligemma.lm_head.weight = paligemma.model.language_model.embed_tokens.weight
    g = torch.Generator().manual_seed(r.randrange(2**31))
    batch, views, side, length = 1 + case % 2, len(c.image_features), c.image_resolution[0], c.tokenizer_max_length
    images = torch.rand(batch, views, 3, side, side, generator=g) * 2 - 1
    image_mask = torch.rand(batch, views, generator=g) < 0.6
    image_mask[:, r.randrange(views)] = True
    tokens = torch.randint(0, vocab, (batch, length), generator=g)
    token_mask = torch.arange(length) < torch.randint(1, length + 1, (batch, 1), generator=g)
    noise = torch.randn(batch, c.chunk_size, c.max_action_dim, generator=g)
    prefix = torch.randn(noise.shape, generator=g)
    record = times(r, c.chunk_size)
    steps = len(record["tau_const"]) - 1
    seen = list(images.unbind(1)), list(image_mask.unbind(1)), tokens, token_mask
    record["const"] = model.sample_actions(*seen, noise=noise, num_steps=steps)

    embedded, valid, attention = model.embed_prefix(*seen)
    record["vision"] = torch.stack([model.paligemma_with_expert.embed_image(image) for image in seen[0]], 1)
    _, cache = model.paligemma_with_expert.forward(
        attention_mask=m.prepare_attention_masks_4d(m.make_att_2d_masks(valid, attention)),
        position_ids=torch.cumsum(valid, 1) - 1, past_key_values=None, inputs_embeds=[embedded, None], use_cache=True,
    )  # fmt: skip
    record["k"] = torch.stack([layer.keys.transpose(1, 2) for layer in cache.layers])
    record["v"] = torch.stack([layer.values.transpose(1, 2) for layer in cache.layers])
    sinusoid = m.create_sinusoidal_pos_embedding

    def sinusoid_per_action(time, *args, **kwargs):
        return sinusoid(time.flatten(), *args, **kwargs).unflatten(0, time.shape)

    with patched(
        (pi_gemma.PiGemmaRMSNorm, "forward", norm_per_action),
        (m, "create_sinusoidal_pos_embedding", sinusoid_per_action),
    ):
        for name, tau, delay in (("has", "tau_has", 0), ("delayed", "tau_delay", int(record["delay"]))):
            x = noise.clone()
            for now, after in zip(record[tau][:-1], record[tau][1:]):
                x[:, :delay] = prefix[:, :delay]
                v = model.denoise_step(valid, cache, x, now.expand(batch, -1))
                x = x + (after - now)[None, :, None] * v
            record[name] = x
    record |= {"images": images, "image_mask": image_mask, "tokens": tokens, "token_mask": token_mask, "noise": noise,
               "prefix": prefix, "valid": valid}  # fmt: skip
    drop = [("lm_head.weight",), (), ("language_model.embed_tokens.weight",)][case % 3]
    write(folder, policy, config, drop, record)


# ---- X-VLA -------------------------------------------------------------------------------------------------------


def xvla_policy(r: random.Random, case: int):
    from lerobot.configs import FeatureType, PolicyFeature
    from lerobot.policies.xvla.configuration_xvla import XVLAConfig
    from lerobot.policies.xvla.modeling_xvla import XVLAPolicy

    mode, stages = MODES[case % len(MODES)], r.choice([2, 3, 4])
    groups = [r.choice([1, 2, 3]) for _ in range(stages)]
    heads = [r.choice([1, 2]) for _ in range(stages)]
    width = r.choice([16, 24, 36])
    vision = {
        "model_type": "davit", "dim_embed": [2 * g * h * r.choice([1, 2, 3]) for g, h in zip(groups, heads)],
        "num_heads": heads, "num_groups": groups, "depths": [r.randint(1, 2) for _ in range(stages)],
        "patch_size": [7, 3, 3, 3][:stages], "patch_stride": [4, 2, 2, 2][:stages],
        "patch_padding": [3, 1, 1, 1][:stages], "patch_prenorm": [i > 0 for i in range(stages)],
        "window_size": r.choice([3, 4, 5, 12]), "projection_dim": width,
        "image_pos_embed": {"type": "learned_abs_2d", "max_pos_embeddings": 20},
        "visual_temporal_embedding": {"type": "COSINE", "max_temporal_embeddings": 10},
        "image_feature_source": ["spatial_avg_pool", "temporal_avg_pool"],
    }  # fmt: skip
    text = {
        "d_model": width, "encoder_layers": r.randint(1, 3), "encoder_attention_heads": r.choice([1, 2, 4]),
        "encoder_ffn_dim": r.choice([20, 33]), "vocab_size": r.choice([60, 97]), "max_position_embeddings": 400,
        "pad_token_id": 1, "decoder_layers": 1, "decoder_attention_heads": 1, "decoder_ffn_dim": 4,
    }  # fmt: skip
    policy_heads, cameras = r.choice([1, 2, 3]), r.randint(1, 2)
    proprio = mode == "so101_bimanual" or r.random() < 0.8 or mode in ("ee6d", "joint")
    config = XVLAConfig(
        device="cpu", chunk_size=r.randint(2, 10), n_action_steps=1, dtype="float32",
        florence_config={"text_config": text, "vision_config": vision},
        tokenizer_max_length=r.randint(3, 12), hidden_size=policy_heads * r.choice([8, 10, 16]), depth=r.randint(1, 3),
        num_heads=policy_heads, mlp_ratio=r.choice([2.0, 2.5, 4.0]), num_domains=r.randint(1, 4),
        len_soft_prompts=r.choice([0, 3, 8]), dim_time=r.choice([6, 32]), max_len_seq=512,
        use_hetero_proj=r.random() < 0.3, action_mode=mode, use_proprio=proprio,
        max_state_dim=20 if mode == "so101_bimanual" else r.choice([20, 23, 32]),
        max_action_dim=r.choice([9, 20]), num_image_views=r.choice([None, 3]), num_denoising_steps=10,
    )  # fmt: skip
    height, across = r.randint(33, 70), r.randint(33, 70)
    config.input_features = {
        **{f"observation.images.c{i}": PolicyFeature(FeatureType.VISUAL, (3, height, across)) for i in range(cameras)},
        "observation.state": PolicyFeature(FeatureType.STATE, (8,)),
    }
    config.output_features = {"action": PolicyFeature(FeatureType.ACTION, (7,))}
    return XVLAPolicy(config).eval(), cameras, (height, across), text["vocab_size"]


def predict_per_action(transformer, domain, x, proprio, tau, vlm, aux) -> torch.Tensor:
    """lerobot's transformer with one time per action: tau [B, H]."""
    from lerobot.policies.xvla.soft_transformer import timestep_embedding

    t, rows = transformer, x.shape[1]
    embedded = timestep_embedding(tau.flatten(), t.dim_time).unflatten(0, tau.shape)
    x = t.action_encoder(torch.cat([x, proprio[:, None].expand(-1, rows, -1), embedded], -1), domain)
    context = (t.vlm_proj(vlm, domain), t.aux_visual_proj(aux, domain)) if t.use_hetero_proj else (
        t.vlm_proj(vlm), t.aux_visual_proj(aux))  # fmt: skip
    x = torch.cat([x, *context], 1)
    x = x + t.pos_emb[:, : x.shape[1]]
    if t.len_soft_prompts:
        x = torch.cat([x, t.soft_prompt_hub(domain).view(len(x), t.len_soft_prompts, -1)], 1)
    for block in t.blocks:
        x = block(x)
    return t.action_decoder(t.norm(x[:, :rows]), domain)


@torch.no_grad()
def make_xvla(folder: Path, seed: int, case: int) -> None:
    r = random.Random(f"{seed}/xvla/{case}")
    policy, cameras, size, vocab = xvla_policy(r, case)
    randomise(policy, r.randrange(2**31))
    model, c = policy.model, policy.config
    g = torch.Generator().manual_seed(r.randrange(2**31))
    batch, views = 1 + case % 2, c.num_image_views
    images = torch.randn(batch, views, 3, *size, generator=g)
    image_mask = (torch.arange(views) < cameras).repeat(batch, 1)
    images[:, cameras:] = 0
    tokens = torch.randint(0, vocab, (batch, c.tokenizer_max_length), generator=g)
    state = torch.randn(batch, model.dim_proprio, generator=g)
    domain = torch.randint(0, c.num_domains, (batch,), generator=g)
    shape, draw = (batch, c.chunk_size, model.dim_action), r.randrange(2**31)
    prefix = torch.randn(shape, generator=g)
    record = times(r, c.chunk_size)
    torch.manual_seed(draw)
    noise = torch.randn(shape)
    torch.manual_seed(draw)  # lerobot draws its own noise
    record["const"] = model.generate_actions(
        tokens, images, image_mask, domain, state, steps=len(record["tau_const"]) - 1
    )
    encoded = model.forward_vlm(tokens, images, image_mask)
    record["vlm"], record["aux"] = encoded["vlm_features"], encoded["aux_visual_inputs"]
    for name, tau, delay in (("has", "tau_has", 0), ("delayed", "tau_delay", int(record["delay"]))):
        actions = torch.zeros(shape)
        actions[:, :delay] = prefix[:, :delay]
        for now in record[tau][:-1]:
            t = now[None, :, None]
            proprio, x = model.action_space.preprocess(state, noise * t + actions * (1 - t))
            new = predict_per_action(
                model.transformer, domain, x, proprio, now.expand(batch, -1), record["vlm"], record["aux"]
            )
            actions = torch.where(t > 0, new, actions)
        record[name] = model.action_space.postprocess(actions.clone())
    record |= {"images": images, "image_mask": image_mask, "tokens": tokens, "state": state, "domain": domain,
               "noise": noise, "prefix": prefix}  # fmt: skip
    drop = [("encoder.embed_tokens.weight",), (), ("language_model.shared.weight",)][case % 3]
    write(folder, policy, saved_config(c, "xvla"), drop, record)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--cases", type=int, default=12, help="of each model")
    args = parser.parse_args()
    torch.set_num_threads(1)  # small matrices: a second thread only waits
    import_lerobot()
    for case in range(args.cases):
        make_pi05(args.out / f"pi05-{case:02d}", args.seed, case)
        make_xvla(args.out / f"xvla-{case:02d}", args.seed, case)


if __name__ == "__main__":
    main()
