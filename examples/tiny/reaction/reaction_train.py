"""What the trainers of pi05-tiny and xvla-tiny share: the mixed schedule, batches, the loop, the checkpoint folder.

The recipe is FASTER's (arXiv 2603.19199, section 4): no new parameters, no teacher. Each draw has a delay d, whose
committed actions are given clean, and with probability 0.5 the times of the horizon-aware schedule instead of one time
for all actions; so one set of weights runs under both schedules, with or without committed actions.

Shapes: n observations, k draws of each, B = n * k, H actions, A channels.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import reaction_task as task
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor, nn

from engine.blocks.observation import InputProfile, Preprocessor, TextEncoder
from engine.blocks.schedule import HorizonSchedule
from engine.io.statistics import Statistics
from engine.io.text.tokenizer import Tokenizer as Encoder

ROOT = Path(__file__).resolve().parents[3]
MIX = 0.5  # share of the draws with horizon-aware times
PROBE = 0.5  # weight of the probe's error
SAVE = 100  # steps between checkpoints
SPLIT = r" ?\p{N}+| ?\p{L}+| ?[^\s\p{L}\p{N}]+|\s+"


@dataclass
class Batch:
    """images [n, V, 3, S, S] and tokens [n, L] with image_mask and token_mask; proprio [n, P] (P may be 0).

    actions [B, H, A] as the model has them, delay [B].
    """

    images: Tensor
    image_mask: Tensor
    tokens: Tensor
    token_mask: Tensor
    proprio: Tensor
    actions: Tensor
    delay: Tensor
    target: Tensor

    @property
    def draws(self) -> int:
        return len(self.actions) // len(self.images)


@dataclass
class Recipe:
    """One policy: how it is made, what it learns, and the schedule that it is trained for.

    build: a model from scratch with a `probe` (see `Probe`). profile: of its inputs. loss: squared errors of the
    actions [B, H, A] and the tokens of the views [n, V, T, D], from a model, a batch, noise and times. sample: chunks
    [n, H, A] of the first draw of each observation, from a model, a batch, noise and times [N + 1, n, H]. rho: the
    distribution of the global time, from uniform numbers.
    """

    name: str
    config: dict
    schedule: HorizonSchedule
    max_delay: int
    build: Callable[[], nn.Module]
    profile: Callable[[], InputProfile]
    loss: Callable[[nn.Module, Batch, Tensor, Tensor], tuple[Tensor, Tensor]]
    sample: Callable[[nn.Module, Batch, Tensor, Tensor], Tensor]
    rho: Callable[[Tensor], Tensor]
    special: tuple[str, ...]
    norm_mode: str
    sidecar: dict


class Probe(nn.Linear):
    """Reads off each view where the ball will arrive along the axis that the view shows; only while training.

    The eyes of so small a policy learn from scratch, and through the actions alone that takes far longer. It reads as
    the policy does, by attention with the same weights for every token: a layer with weights of its own for each place
    of the image learns as well, and leaves tokens that the policy cannot read.
    """

    def __init__(self, width: int, views: int = 2) -> None:
        super().__init__(width, views + 1)

    def forward(self, tokens: Tensor) -> Tensor:
        """tokens of the views [n, V, T, D] -> [n, V]."""
        *values, score = super().forward(tokens).unbind(-1)
        own = torch.stack([value[:, view] for view, value in enumerate(values)], 1)
        return (score.softmax(-1) * own).sum(-1)


# ---- the schedule -----------------------------------------------------------------------------------------------


def local_times(rho: Tensor, delay: Tensor, schedule: HorizonSchedule, aware: Tensor) -> Tensor:
    """Flow time of each action, [B, H]: global times rho [B], delays [B], aware [B] bool (else one time for all).

    The same rule as `HorizonSchedule.at`, at any global time.
    """
    place = torch.arange(schedule.horizon)[None]
    n = (place - delay[:, None]).clamp(min=0) / (schedule.horizon - 1 - delay[:, None]).clamp(min=1)
    hit = (1 - n**schedule.alpha) * schedule.u0 * aware[:, None]
    tau = ((rho[:, None] - hit) / (1 - hit)).clamp(0, 1)
    return torch.where(place < delay[:, None], 0.0, tau)


def noised(actions: Tensor, noise: Tensor, tau: Tensor) -> Tensor:
    """[B, H, A]: what the network sees; committed and finished actions are clean."""
    return tau[..., None] * noise + (1 - tau[..., None]) * actions


# ---- batches ----------------------------------------------------------------------------------------------------


def train_tokenizer(special: tuple[str, ...]) -> Tokenizer:
    """Byte-level BPE on the prompts of the task; the special tokens come first, and each bin is one token."""
    tok = Tokenizer(models.BPE(ignore_merges=True))
    tok.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tok.decoder = decoders.ByteLevel()
    texts = [f"Task: {task.PROMPT}, State: {b} {b};\nAction: " for b in range(-1, 256)] + [task.PROMPT] * 100
    trainer = trainers.BpeTrainer(
        vocab_size=640,
        special_tokens=list(special),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tok.train_from_iterator(texts, trainer)
    tok.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in special])
    return tok


def statistics(horizon: int, max_delay: int, count: int = 4096) -> Statistics:
    """Of many demonstrations, per dimension, in metres."""
    s = task.samples(count, horizon, max_delay, np.random.default_rng(2**31))

    def of(x: np.ndarray) -> dict[str, np.ndarray]:
        flat = x.reshape(-1, x.shape[-1])
        q01, q99 = np.quantile(flat, [0.01, 0.99], axis=0)
        out = {"mean": flat.mean(0), "std": flat.std(0), "min": flat.min(0), "max": flat.max(0), "q01": q01, "q99": q99}
        return {k: v.astype(np.float32) for k, v in out.items()}

    return Statistics(of(s.state), of(s.actions), "the trainer")


class Batches:
    """Step n's examples depend on the seed and n alone, so a resumed run sees what an unbroken one would."""

    def __init__(self, recipe: Recipe, encoder: TextEncoder, stats: Statistics, seed: int) -> None:
        self.recipe, self.seed = recipe, seed
        self.pre = Preprocessor(recipe.profile(), stats, encoder)
        self.length = self.pre.profile.max_tokens

    def step(self, n: int, observations: int, draws: int) -> Batch:
        horizon, rng = self.recipe.schedule.horizon, np.random.default_rng((self.seed, n))
        s = task.samples(observations, horizon, self.recipe.max_delay, rng, draws)
        profile = self.pre.profile
        scale, offset = profile.image.affine()
        images = torch.from_numpy(s.views.astype(np.float32) * scale + offset).permute(0, 1, 4, 2, 3).contiguous()
        slots = len(profile.views)
        mask = torch.arange(slots).expand(observations, -1) < images.shape[1]
        if slots > images.shape[1]:
            blank = images.new_zeros(observations, slots - images.shape[1], *images.shape[2:])
            images = torch.cat([images, blank], 1)
        tokens = torch.zeros(observations, self.length, dtype=torch.long)
        for row, state in enumerate(s.state):
            ids = self.pre._tokens({"task": task.PROMPT}, state)
            tokens[row, : len(ids)] = torch.from_numpy(ids.astype(np.int64))
            tokens[row, len(ids) :] = -1
        proprio = np.zeros((observations, profile.proprio_dim), np.float32)
        if profile.proprio_dim:
            proprio[:, :2] = self.pre.state_norm.normalize(s.state)
        space, flat = profile.action, s.actions.reshape(-1, horizon, 2)
        actions = space.pad(self.pre.action_map.normalizer.normalize(flat).astype(np.float32))
        return Batch(
            images, mask, tokens.clamp(min=0), tokens >= 0, torch.from_numpy(proprio), torch.from_numpy(actions),
            torch.from_numpy(s.delay.reshape(-1)), torch.from_numpy(flat.astype(np.float32)),
        )  # fmt: skip

    def metres(self, actions: Tensor) -> Tensor:
        """Chunks of the model [..., A] as commands [..., 2]."""
        scale, offset = (torch.from_numpy(x) for x in self.pre.action_affine())
        return actions[..., :2] * scale + offset


# ---- the loop ---------------------------------------------------------------------------------------------------


def rate(n: int, steps: int, peak: float) -> float:
    """Warm up, then fall linearly to nothing."""
    return peak * min((n + 1) / 100, 1.2 * (1 - n / steps), 1.0)


class Optimiser:
    """AdamW whose state is plain tensors; weight decay on matrices only."""

    def __init__(self, model: nn.Module, decay: float = 0.01) -> None:
        matrices = [p for p in model.parameters() if p.ndim > 1]
        others = [p for p in model.parameters() if p.ndim <= 1]
        groups = [{"params": matrices, "weight_decay": decay}, {"params": others, "weight_decay": 0.0}]
        self.names = {p: name for name, p in model.named_parameters()}
        self.inner = torch.optim.AdamW(groups, lr=0.0, betas=(0.9, 0.98))

    def step(self, lr: float) -> None:
        for group in self.inner.param_groups:
            group["lr"] = lr
        self.inner.step()
        self.inner.zero_grad()

    def tensors(self) -> dict[str, Tensor]:
        out = {}
        for p, state in self.inner.state.items():
            out |= {f"{key}.{self.names[p]}": value for key, value in state.items()}
        return out

    def restore(self, tensors: dict[str, Tensor]) -> None:
        """From `tensors`; parameters that nothing reads have no state."""
        for p, name in self.names.items():
            if f"step.{name}" in tensors:
                self.inner.state[p] = {key: tensors[f"{key}.{name}"] for key in ("step", "exp_avg", "exp_avg_sq")}


def save_checkpoint(file: Path, n: int, spent: float, model: nn.Module, optimiser: Optimiser) -> None:
    tensors = {f"model.{k}": v for k, v in model.state_dict().items()} | optimiser.tensors()
    part = file.with_suffix(".part")
    save_file({k: v.contiguous() for k, v in tensors.items()}, part, {"step": str(n), "seconds": f"{spent:.1f}"})
    part.replace(file)  # a crash while writing leaves the old checkpoint


def load_checkpoint(file: Path, model: nn.Module, optimiser: Optimiser) -> tuple[int, float]:
    """(steps done, seconds spent on them)."""
    with safe_open(file, "pt") as f:
        tensors = {k: f.get_tensor(k) for k in f.keys()}  # noqa: SIM118
        model.load_state_dict({k: tensors[f"model.{k}"] for k in model.state_dict()})
        optimiser.restore(tensors)
        return int(f.metadata()["step"]), float(f.metadata()["seconds"])


@torch.no_grad()
def quiz(recipe: Recipe, model: nn.Module, batches: Batches, count: int = 128) -> dict[str, float]:
    """Median distance in cm between sampled and demonstrated actions at the end of held-out chunks, by schedule, and of
    the first action that is not committed."""
    batch, out = batches.step(2**30, count, 1), {}
    noise = torch.randn(batch.actions.shape, generator=torch.Generator().manual_seed(0))
    held = recipe.schedule
    for name, schedule in (("has", held), ("const", HorizonSchedule.constant(held.horizon, held.steps))):
        tables = [schedule.at(int(d)).tau for d in batch.delay]
        tau = torch.from_numpy(np.stack(tables, 1))
        got = batches.metres(recipe.sample(model, batch, noise, tau))
        error = (got - batch.target).abs().amax(-1) * 100
        out[f"{name} last"] = float(error[:, -1].median())
        out[f"{name} p90"] = float(error[:, -1].quantile(0.9))
        out[f"{name} first"] = float(error.gather(1, batch.delay[:, None]).median())
    return out


def draw(recipe: Recipe, count: int, seed: int, n: int, channels: int) -> tuple[Tensor, Tensor, Tensor]:
    """Global times [B], which of them are horizon-aware [B], and noise [B, H, A] of step n."""
    g = torch.Generator().manual_seed(seed * 1_000_003 + n)
    rho = recipe.rho(torch.rand(count, generator=g))
    aware = torch.rand(count, generator=g) < MIX
    return rho, aware, torch.randn(count, recipe.schedule.horizon, channels, generator=g)


def learn(recipe: Recipe, model: nn.Module, batch: Batch, seed: int, n: int) -> Tensor:
    """The loss of step n: over actions that are neither committed nor finished, whose values nothing integrates."""
    rho, aware, noise = draw(recipe, len(batch.actions), seed, n, batch.actions.shape[-1])
    tau = local_times(rho, batch.delay, recipe.schedule, aware)
    error, views = recipe.loss(model, batch, noise, tau)
    weight = (tau > 0).float()
    place = batch.actions[:: batch.draws, -1, : views.shape[1]]  # by its end a chunk has arrived
    seen = (model.probe(views) - place).square().mean()
    return (error.mean(-1) * weight).sum() / weight.sum() + PROBE * seen


def train(recipe: Recipe, args: argparse.Namespace) -> None:
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    args.work.mkdir(parents=True, exist_ok=True)
    tok = train_tokenizer(recipe.special)
    stats = statistics(recipe.schedule.horizon, recipe.max_delay)
    model, batches = recipe.build(), Batches(recipe, Encoder(tok), stats, args.seed)
    optimiser = Optimiser(model)
    checkpoint, first, before = args.work / "checkpoint.safetensors", 0, 0.0
    if args.resume and checkpoint.is_file():
        first, before = load_checkpoint(checkpoint, model, optimiser)
    count = sum(p.numel() for p in model.parameters())
    print(f"{count:,} parameters, {args.threads} threads, from step {first} to {args.steps}", flush=True)
    begun, mean = time.time(), 0.0
    for n in range(first, args.steps):
        batch = batches.step(n, args.observations, args.draws)
        loss = learn(recipe, model, batch, args.seed, n)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        lr = rate(n, args.steps, args.lr)
        optimiser.step(lr)
        mean = float(loss.detach()) if n == first else 0.98 * mean + 0.02 * float(loss.detach())
        spent, last = before + time.time() - begun, n + 1 == args.steps
        if (n + 1) % 50 == 0 or last:
            print(f"step {n + 1} loss {mean:.4f} lr {lr:.2e} {spent:.0f} s", flush=True)
        if (n + 1) % SAVE == 0 or last:
            save_checkpoint(checkpoint, n + 1, spent, model, optimiser)
        if (n + 1) % 250 == 0 or last:
            model.eval()
            print("  cm:", {k: round(v, 2) for k, v in quiz(recipe, model, batches).items()}, flush=True)
            model.train()
    export(recipe, model, tok, stats, args.out)
    size = sum(f.stat().st_size for f in args.out.iterdir()) / 1e6
    print(f"wrote {args.out.name}: {size:.2f} MB after {before + time.time() - begun:.0f} s", flush=True)


# ---- the folder -------------------------------------------------------------------------------------------------


def export(recipe: Recipe, model: nn.Module, tok: Tokenizer, stats: Statistics, folder: Path) -> None:
    """Write the folder as lerobot does, in bf16, with faster.json beside it."""
    folder.mkdir(parents=True, exist_ok=True)
    state = {k: v for k, v in model.state_dict().items() if not k.startswith("probe.")}
    weights = {f"model.{k}": v.detach().bfloat16().contiguous() for k, v in state.items()}
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    state_file = "policy_preprocessor_step_5_normalizer_processor.safetensors"
    vectors = {f"observation.state.{k}": v for k, v in stats.state.items()}
    vectors |= {f"action.{k}": v for k, v in stats.actions.items()}
    save_file({k: torch.from_numpy(np.ascontiguousarray(v)) for k, v in vectors.items()}, folder / state_file)
    mode = recipe.norm_mode
    norm_map = {"VISUAL": "IDENTITY", "STATE": mode, "ACTION": mode}
    inputs = {k: {"type": "VISUAL", "shape": [3, task.SIZE, task.SIZE]} for k in task.CAMERAS}
    inputs["observation.state"] = {"type": "STATE", "shape": [2]}
    outputs = {"action": {"type": "ACTION", "shape": [2]}}
    config = recipe.config | {"input_features": inputs, "output_features": outputs, "normalization_mapping": norm_map}
    steps = [
        {"registry_name": "rename_observations_processor", "config": {"rename_map": {}}},
        {"registry_name": "to_batch_processor", "config": {}},
        {
            "registry_name": "tokenizer_processor",
            "config": {
                "max_length": config["tokenizer_max_length"],
                "task_key": "task",
                "padding_side": "right",
                "padding": "max_length",
                "truncation": True,
            },
        },
        {"registry_name": "device_processor", "config": {"device": "cpu", "float_dtype": None}},
        {
            "registry_name": "normalizer_processor",
            "config": {"eps": 1e-8, "features": inputs | outputs, "norm_map": norm_map},
            "state_file": state_file,
        },
    ]
    tok.save(str(folder / "tokenizer.json"))
    for name, content in (
        ("config.json", config),
        ("policy_preprocessor.json", {"name": "policy_preprocessor", "steps": steps}),
        ("faster.json", recipe.sidecar),
    ):
        (folder / name).write_text(json.dumps(content, indent=2) + "\n")
    for file in folder.iterdir():
        file.chmod(0o644)  # the safetensors writer makes its files private


def main(recipe: Recipe, doc: str | None, script: str, **defaults: float) -> None:
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "engine/zoo" / recipe.name)
    parser.add_argument("--work", type=Path, default=ROOT / ".cache/train" / recipe.name)
    parser.add_argument("--steps", type=int, default=defaults["steps"])
    parser.add_argument("--observations", type=int, default=defaults["observations"], help="in a step")
    parser.add_argument("--draws", type=int, default=defaults["draws"], help="of delay, time and noise, for each")
    parser.add_argument("--lr", type=float, default=defaults["lr"])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--resume", action="store_true", help="continue from the last checkpoint")
    parser.add_argument("--background", action="store_true", help="detached; follow train.log")
    args = parser.parse_args()
    if not args.background:
        train(recipe, args)
        return
    args.work.mkdir(parents=True, exist_ok=True)
    log = args.work / "train.log"
    command = [sys.executable, script, *(a for a in sys.argv[1:] if a != "--background")]
    with log.open("ab") as out:
        process = subprocess.Popen(command, stdout=out, stderr=out, stdin=subprocess.DEVNULL, start_new_session=True)
    print(f"process {process.pid}, log {log}")
