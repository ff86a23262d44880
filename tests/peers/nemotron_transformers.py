"""Makes random nemotron_h checkpoints with transformers and records what transformers computes from them.

Run by the interpreter of the peer environment (it knows nothing of `engine`):

    python tests/peers/nemotron_transformers.py OUT --seed 0 --cases 24

OUT/case-NN holds config.json and model.safetensors as `save_pretrained` writes them, and peer.safetensors:
ids [T] int64, logits [T, V] fp32, greedy [64] int64 (continuation of ids), margin [64] fp32 (its top-1 minus top-2).
"""

from __future__ import annotations

import argparse
import random
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import NemotronHConfig, NemotronHForCausalLM

GREEDY = 64
LENGTHS = [1, 2, 3, 4, 15, 16, 17, 31, 33, 299, 64, 65, 100, 127, 128, 129, 130, 200, 5, 256, 257, 63, 300, 255]
PATTERNS = [
    "MEM*EME", "M", "*", "E", "-", "M*", "EM", "MEM*E", "M-M*-", "*M*M", "MMM", "E*E", "MEMEM*EMEMEM*", "-M*E", "M*ME-",
    "EEM", "**M", "M*M*M*", "MEME", "ME*-ME*-", "MEMEM*E", "M-", "*E", "MEM*EMEMEME",
]  # fmt: skip
NORM_LIKE = ("norm.weight", "norm_f.weight")


def config_of(r: random.Random, case: int) -> NemotronHConfig:
    pattern = PATTERNS[case % len(PATTERNS)]
    kv = r.choice([1, 2, 3])
    groups = r.choice([1, 2, 3, 4])
    routing = r.choice([1, 1, 2, 4])
    experts = routing * r.choice([2, 3, 4]) if routing > 1 else r.randint(4, 16)
    kept = r.randint(1, routing)
    top = r.randint(1, min(4, experts // routing * kept))
    return NemotronHConfig(
        vocab_size=r.choice([97, 160, 256, 301]),
        hidden_size=r.choice([40, 64, 72, 96, 100, 128]),
        hybrid_override_pattern=pattern,
        num_attention_heads=kv * r.choice([1, 2, 3, 4]),
        num_key_value_heads=kv,
        head_dim=r.choice([8, 12, 16, 20, 32]),
        mamba_num_heads=groups * r.choice([1, 2, 3, 4]),
        mamba_head_dim=r.choice([8, 12, 16, 20]),
        n_groups=groups,
        ssm_state_size=r.choice([8, 12, 16, 24, 32]),
        conv_kernel=r.choice([2, 3, 4, 4]),
        use_conv_bias=r.random() < 0.7,
        use_bias=r.random() < 0.3,
        mlp_bias=r.random() < 0.3,
        chunk_size=r.choice([8, 16, 64, 128]),
        n_routed_experts=experts,
        num_experts_per_tok=top,
        n_group=routing,
        topk_group=kept,
        norm_topk_prob=r.random() < 0.8,
        routed_scaling_factor=r.choice([1.0, 2.5]),
        moe_intermediate_size=r.choice([24, 33, 40, 64]),
        moe_shared_expert_intermediate_size=r.choice([36, 48, 100]),
        intermediate_size=r.choice([50, 88, 128]),
        tie_word_embeddings=False,
        max_position_embeddings=1024,
    )


@torch.no_grad()
def randomise(model: NemotronHForCausalLM, seed: int) -> None:
    """Default initialisation hides bugs (zero bias, D = 1, equal norms), so every tensor gets a life of its own."""
    g = torch.Generator().manual_seed(seed)

    def normal(t: torch.Tensor, mean: float, std: float) -> None:
        t.copy_(mean + std * torch.randn(t.shape, generator=g))

    for name, t in [*model.named_parameters(), *model.named_buffers()]:
        if name.endswith("A_log"):
            t.copy_(torch.log(1 + 15 * torch.rand(t.shape, generator=g)))
        elif name.endswith("dt_bias"):
            normal(t, -3, 1)
        elif name.endswith(".D"):
            normal(t, 0, 1)
        elif name.endswith(NORM_LIKE):
            normal(t, 1, 0.1)
        elif name.endswith("e_score_correction_bias"):
            normal(t, 0, 0.3)
        elif name.endswith("bias"):
            normal(t, 0, 0.1)
        elif name.endswith("embeddings.weight"):
            normal(t, 0, 1)
        else:
            fan_in = t.shape[-1] if "conv1d" not in name else t.shape[-1] * t.shape[-2]
            normal(t, 0, fan_in**-0.5)


def patch_time_step(model: NemotronHForCausalLM) -> None:
    """transformers 5.23.0 clamps dt to time_step_min in prefill only; the published model does not clamp."""
    for layer in model.model.layers:
        if hasattr(layer.mixer, "time_step_limit"):
            layer.mixer.time_step_limit = (0.0, float("inf"))


def generate(model: NemotronHForCausalLM, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """GREEDY tokens after ids [1, T], and the logits [GREEDY, V] that chose them."""
    # Its cache needs an attention layer somewhere; without one the sequence is recomputed for each token.
    cached = "full_attention" in model.config.layer_types
    model.generation_config.eos_token_id = None
    out = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=GREEDY, do_sample=False, output_logits=True,
        return_dict_in_generate=True, pad_token_id=0, use_cache=cached,
    )  # fmt: skip
    return out.sequences[0, ids.shape[1] :], torch.stack(out.logits)[:, 0]


@torch.no_grad()
def make(folder: Path, seed: int, case: int) -> None:
    for attempt in range(50):
        r = random.Random(f"{seed}/{case}/{attempt}")
        model = NemotronHForCausalLM(config_of(r, case)).eval()
        randomise(model, r.randrange(2**31))
        patch_time_step(model)
        model.set_experts_implementation("eager")  # the grouped one refuses odd widths
        ids = torch.tensor([[r.randrange(model.config.vocab_size) for _ in range(LENGTHS[case % len(LENGTHS)])]])
        logits = model(ids, use_cache=False).logits[0]
        greedy, steps = generate(model, ids)
        best = steps.topk(2).values
        margin = best[:, 0] - best[:, 1]
        if margin.min() > 2e-4 * logits.abs().max():
            break  # else: a choice that hangs on rounding proves nothing, draw again
    else:
        raise SystemExit(f"case {case}: no draw without near-ties")
    model.generation_config.eos_token_id = 2
    model.save_pretrained(folder)
    record = {"ids": ids[0], "logits": logits.float(), "greedy": greedy, "margin": margin.float()}
    save_file({k: v.clone().contiguous() for k, v in record.items()}, folder / "peer.safetensors")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--cases", type=int, default=24)
    args = parser.parse_args()
    torch.set_num_threads(1)  # small matrices: a second thread only waits
    for case in range(args.cases):
        make(args.out / f"case-{case:02d}", args.seed, case)


if __name__ == "__main__":
    main()
