"""Trains nemotron-tiny from nothing and writes it in the published layout.

python examples/tiny/nemotron/train.py                 # two quiet cores: see the README for the time
python examples/tiny/nemotron/train.py --background    # the same, detached; follow train.log
python examples/tiny/nemotron/train.py --resume        # continue from the last checkpoint
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import subprocess
import sys
import time
from pathlib import Path

import data
import evaluate
import quant
import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import save_file
from tokenizer import VOCAB, Template, save_tokenizer, train_tokenizer
from torch import Tensor

from engine.models.nemotron.config import NemotronConfig
from engine.models.nemotron.reference import Mamba2Mixer, MoE, NemotronReference

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[2]

# config.json as published checkpoints spell it; the widths are multiples of 64, so groups of 64 fit everywhere.
CONFIG = {
    "architectures": ["NemotronHForCausalLM"],
    "model_type": "nemotron_h",
    "vocab_size": VOCAB,
    "hidden_size": 128,
    "num_hidden_layers": 8,
    "hybrid_override_pattern": "MEM*EM*E",
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "attention_bias": False,
    "attention_dropout": 0.0,
    "max_position_embeddings": 4096,
    "sliding_window": None,
    "tie_word_embeddings": False,
    "mamba_num_heads": 8,
    "mamba_head_dim": 32,
    "ssm_state_size": 32,
    "n_groups": 2,
    "conv_kernel": 4,
    "use_conv_bias": True,
    "chunk_size": 128,
    "expand": 2,
    "mamba_hidden_act": "silu",
    "mamba_proj_bias": False,
    "mamba_ssm_cache_dtype": "float32",
    "time_step_min": 0.001,
    "time_step_max": 0.1,
    "time_step_floor": 0.0001,
    "use_bias": False,
    "mlp_bias": False,
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 128,
    "moe_shared_expert_intermediate_size": 128,
    "n_shared_experts": 1,
    "intermediate_size": 128,
    "mlp_hidden_act": "relu2",
    "routed_scaling_factor": 2.5,
    "norm_topk_prob": True,
    "n_group": 1,
    "topk_group": 1,
    "layer_norm_epsilon": 1e-5,
    "norm_eps": 1e-5,
    "residual_in_fp32": False,
    "rescale_prenorm_residual": True,
    "initializer_range": 0.02,
    "num_logits_to_keep": 1,
    "use_cache": True,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "torch_dtype": "bfloat16",
}


def model_config() -> NemotronConfig:
    same = {k: v for k, v in CONFIG.items() if k in NemotronConfig.__dataclass_fields__}
    return NemotronConfig(pattern=str(CONFIG["hybrid_override_pattern"]), **same)


@torch.no_grad()
def initialise(model: NemotronReference) -> None:
    model.backbone.embeddings.weight.normal_(std=0.2)
    depth = len(model.backbone.layers)
    for block in model.backbone.layers:
        if isinstance(block.mixer, Mamba2Mixer):
            # Step sizes spread evenly in the logarithm: memories from a few tokens to a thousand.
            dt = torch.exp(torch.linspace(math.log(1e-3), math.log(0.1), len(block.mixer.dt_bias)))
            block.mixer.dt_bias.copy_(dt + torch.log(-torch.expm1(-dt)))
        for name, p in block.mixer.named_parameters():
            if name.endswith(("out_proj.weight", "o_proj.weight", "down_proj.weight")):
                p.mul_(depth**-0.5)


# ---- batches ----------------------------------------------------------------------------------------------------


class Batches:
    """Step n's examples depend on the seed and n alone, so a resumed run sees what an unbroken one would."""

    def __init__(self, tok, template: Template, seed: int, examples: int):
        self.tok, self.template, self.seed, self.examples = tok, template, seed, examples

    def example(self, r: random.Random) -> tuple[list[int], int]:
        p = data.training_problem(r)
        thinking = r.random() < 0.85
        prompt = self.tok.encode(self.template.render(p.messages, p.tools, thinking)).ids
        text = f"{p.thought}\n{data.THINK_END}\n{p.reply}" if thinking else p.reply
        return prompt + self.tok.encode(text + "<|im_end|>").ids, len(prompt)

    def step(self, n: int, rank: int, world: int) -> tuple[list[tuple[Tensor, Tensor]], int]:
        """One worker's share of step n, and how many tokens the whole step learns.

        The share is micro-batches of similar length: ids [b, T] and targets [b, T], -100 where nothing is learned.
        """
        r = random.Random(f"batch {self.seed} {n}")
        examples = sorted((self.example(r) for _ in range(self.examples)), key=lambda e: len(e[0]))
        learned = sum(len(ids) - start for ids, start in examples)
        groups: list[list] = [[]]
        for e in examples[rank::world]:
            if groups[-1] and len(e[0]) > 1.5 * len(groups[-1][0][0]):
                groups.append([])
            groups[-1].append(e)
        out = []
        for group in groups:
            width = max(len(ids) for ids, _ in group)
            ids = torch.zeros(len(group), width, dtype=torch.long)
            targets = torch.full((len(group), width), -100)
            for row, (tokens, start) in enumerate(group):
                ids[row, : len(tokens)] = torch.tensor(tokens)
                targets[row, start - 1 : len(tokens) - 1] = ids[row, start : len(tokens)]
            out.append((ids, targets))
        return out, learned


# ---- workers ----------------------------------------------------------------------------------------------------


class Team:
    """Data-parallel workers of one thread each: faster than one process of two threads, whose every small operation
    would wait for both cores. They meet once a step."""

    def __init__(self, rank: int, world: int, rows: Tensor, barrier):
        self.rank, self.world, self.rows, self.barrier = rank, world, rows, barrier

    def wait(self) -> None:
        if self.world > 1:
            self.barrier.wait(1800)

    def sum(self, t: Tensor) -> Tensor:
        """The same sum of every worker's t, bit for bit, in all of them."""
        if self.world == 1:
            return t
        self.rows[self.rank, : len(t)] = t
        self.wait()
        total = self.rows[:, : len(t)].sum(0)
        self.wait()
        return total


# ---- the optimiser ----------------------------------------------------------------------------------------------


def orthogonalise(g: Tensor) -> Tensor:
    """Nearest (semi-)orthogonal matrix of each g [n, rows, cols], by a Newton-Schulz iteration of degree five."""
    wide = g.shape[-2] <= g.shape[-1]
    x = g if wide else g.transpose(-1, -2)
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(5):
        s = x @ x.transpose(-1, -2)
        x = 3.4445 * x + (-4.775 * s + 2.0315 * s @ s) @ x
    return x if wide else x.transpose(-1, -2)


class Optimiser:
    """Momentum with orthogonalised updates for the matrices of the layers, Adam for everything else."""

    def __init__(self, model: NemotronReference):
        self.params = dict(model.named_parameters())
        self.by_shape: dict[tuple, list[str]] = {}
        for name, p in self.params.items():
            if name.endswith("_proj.weight"):
                self.by_shape.setdefault(tuple(p.shape), []).append(name)
        self.m = {n: torch.zeros_like(p) for n, p in self.params.items()}
        self.v = {n: torch.zeros_like(p) for n, p in self.params.items() if not n.endswith("_proj.weight")}

    @torch.no_grad()
    def step(self, n: int, lr: float) -> None:
        for shape, names in self.by_shape.items():
            grads = []
            for name in names:
                g = self.params[name].grad
                g = torch.zeros(shape) if g is None else g
                self.m[name].lerp_(g, 0.05)
                grads.append(g.lerp(self.m[name], 0.95))
            for name, u in zip(names, orthogonalise(torch.stack(grads)), strict=True):
                self.params[name].mul_(1 - 0.05 * lr).sub_(u, alpha=0.2 * max(shape) ** 0.5 * lr)
        for name, v in self.v.items():
            p = self.params[name]
            if p.grad is None:
                continue
            m = self.m[name].lerp_(p.grad, 0.1)
            v.lerp_(p.grad.square(), 0.02)
            p.sub_(lr * (m / (1 - 0.9**n)) / ((v / (1 - 0.98**n)).sqrt() + 1e-8))

    def tensors(self) -> dict[str, Tensor]:
        return {f"m.{k}": v for k, v in self.m.items()} | {f"v.{k}": v for k, v in self.v.items()}


class Balance:
    """Keeps the experts equally busy without a loss term: a busy expert's selection bias sinks, an idle one's rises."""

    def __init__(self, model: NemotronReference):
        self.load: dict = {}
        for block in model.backbone.layers:
            if isinstance(block.mixer, MoE):
                block.mixer.gate.register_forward_hook(self.count)

    def count(self, gate, inputs, output) -> None:
        if gate.training:
            counts = torch.bincount(output[0].flatten(), minlength=len(gate.weight)).float()
            self.load[gate] = self.load.get(gate, 0) + counts

    def step(self, rate: float, team: Team) -> None:
        for gate, load in self.load.items():
            load = team.sum(load)
            gate.e_score_correction_bias += rate * torch.sign(load.mean() - load)
        self.load.clear()


# ---- the loop ---------------------------------------------------------------------------------------------------


def rate(n: int, steps: int, peak: float) -> float:
    """Warm up, then fall linearly to nothing."""
    return peak * min((n + 1) / 100, 1.05 * (1 - n / steps), 1.0)


def save_checkpoint(file: Path, n: int, model, optimiser: Optimiser) -> None:
    tensors = {f"model.{k}": v for k, v in model.state_dict().items()} | optimiser.tensors()
    part = file.with_suffix(".part")
    save_file({k: v.contiguous() for k, v in tensors.items()}, part, {"step": str(n)})
    part.replace(file)  # a crash while writing leaves the old checkpoint


def load_checkpoint(file: Path, model, optimiser: Optimiser) -> int:
    with safe_open(file, "pt") as f:
        model.load_state_dict({k[6:]: f.get_tensor(k) for k in f.keys() if k.startswith("model.")})  # noqa: SIM118
        for k, t in optimiser.tensors().items():
            t.copy_(f.get_tensor(k))
        return int(f.metadata()["step"])


def export(model: NemotronReference, tok, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    weights = {k: (v if ".gate." in k else v.bfloat16()).contiguous() for k, v in model.state_dict().items()}
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    (folder / "model.safetensors").chmod(0o644)  # the writer makes it private
    (folder / "config.json").write_text(json.dumps(CONFIG, indent=2) + "\n")
    generation = {"bos_token_id": 1, "do_sample": False, "eos_token_id": [2, 11], "pad_token_id": 0}
    (folder / "generation_config.json").write_text(json.dumps(generation, indent=2) + "\n")
    save_tokenizer(tok, HERE / "chat_template.jinja", folder)


def train(rank: int, args: argparse.Namespace, rows: Tensor, barrier) -> None:
    team = Team(rank, args.workers, rows, barrier)
    torch.set_num_threads(1)
    torch.manual_seed(args.seed)
    template = Template(HERE / "chat_template.jinja")
    tok = train_tokenizer(template, args.seed)
    model = NemotronReference(model_config())
    initialise(model)
    optimiser, balance = Optimiser(model), Balance(model)
    batches = Batches(tok, template, args.seed, args.examples)
    args.work.mkdir(parents=True, exist_ok=True)
    checkpoint, first = args.work / "checkpoint.safetensors", 0
    if args.resume and checkpoint.is_file():
        first = load_checkpoint(checkpoint, model, optimiser)
    if rank == 0:
        count = sum(p.numel() for p in model.parameters())
        print(f"{count:,} parameters, {args.workers} workers, from step {first} to {args.steps}", flush=True)

    begun, seen, mean, quiz = time.time(), 0, 0.0, data.held_out(60, seed=1)
    for n in range(first, args.steps):
        micro, learned = batches.step(n, rank, args.workers)
        # The last part trains through the rounding of the formats that the engine serves (straight through:
        # gradients are taken at the rounded weights and applied to the full ones).
        mode = "fp32"
        if n >= args.steps * args.rounding_from:
            mode = random.Random(f"mode {args.seed} {n}").choices(["int4", "bf16"], [2, 1])[0]
        originals = quant.convert(model, mode)
        total = 0.0
        for ids, targets in micro:
            logits = model(ids).flatten(0, 1)
            loss = F.cross_entropy(logits, targets.flatten(), ignore_index=-100, reduction="sum") / learned
            loss.backward()
            total += float(loss.detach())
            seen += ids.numel()
        quant.restore(model, originals)
        params = list(model.parameters())
        flat = [(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in params]
        summed = team.sum(torch.cat([*flat, torch.tensor([total])]))
        total = float(summed[-1])
        for p, g in zip(params, summed[:-1].split([p.numel() for p in params]), strict=True):
            p.grad = g.view_as(p)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        lr = rate(n, args.steps, args.lr)
        optimiser.step(n + 1, lr)
        model.zero_grad()
        balance.step(args.balance * lr / args.lr, team)
        mean = total if n == first else 0.95 * mean + 0.05 * total
        if rank == 0 and (n + 1) % 50 == 0:
            spent = time.time() - begun
            speed = args.workers * seen / spent
            print(f"step {n + 1} loss {mean:.4f} lr {lr:.2e} {spent:.0f} s {speed:.0f} tokens/s", flush=True)
        if rank == 0 and ((n + 1) % 250 == 0 or n + 1 == args.steps):
            save_checkpoint(checkpoint, n + 1, model, optimiser)
        if rank == 0 and ((n + 1) % 500 == 0 or n + 1 == args.steps):
            model.eval()
            for thinking in (True, False):
                print(f"  thinking {thinking}: {evaluate.accuracy(model, tok, template, quiz, thinking)}", flush=True)
            model.train()
    if rank == 0:
        export(model, tok, args.out)
        print(f"wrote {args.out.name}: {sum(f.stat().st_size for f in args.out.iterdir()) / 1e6:.2f} MB", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "engine/zoo/nemotron-tiny")
    parser.add_argument("--work", type=Path, default=ROOT / ".cache/train/nemotron-tiny")
    parser.add_argument("--steps", type=int, default=2400)
    parser.add_argument("--examples", type=int, default=36, help="examples in a step")
    parser.add_argument("--lr", type=float, default=4e-3)
    parser.add_argument("--balance", type=float, default=2e-3)
    parser.add_argument("--rounding-from", type=float, default=0.7, help="share of the steps before rounding begins")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=min(2, os.cpu_count() or 1))
    parser.add_argument("--resume", action="store_true")
    parser.add_argument("--background", action="store_true")
    args = parser.parse_args()
    if args.background:
        args.work.mkdir(parents=True, exist_ok=True)
        log = args.work / "train.log"
        command = [sys.executable, __file__, *(a for a in sys.argv[1:] if a != "--background")]
        with log.open("ab") as out:
            process = subprocess.Popen(
                command, stdout=out, stderr=out, stdin=subprocess.DEVNULL, start_new_session=True
            )
        print(f"process {process.pid}, log {log}")
        return
    numbers = sum(p.numel() for p in NemotronReference(model_config()).parameters()) + 1
    rows = torch.zeros(args.workers, numbers).share_memory_()
    barrier = torch.multiprocessing.get_context("spawn").Barrier(args.workers)
    if args.workers == 1:
        train(0, args, rows, barrier)
    else:
        torch.multiprocessing.spawn(train, (args, rows, barrier), nprocs=args.workers)


if __name__ == "__main__":
    main()
