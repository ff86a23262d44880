"""Personalisation: both adapters trained together on single frames of a subject (arXiv 2603.18524; the released loop).

Latents and the prompt's states are made once; a step is one photo, noised at a random time, seen beside the reference
views. Padding is never computed, and each stream runs its own adapter alone. What a step draws depends on the seed and
its number, so a run that is resumed goes on as if it had never stopped, bit for bit.
"""

from __future__ import annotations

import json
import math
import os
import secrets
import shutil
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from engine.blocks.lru import digest
from engine.blocks.weights import Packer
from engine.errors import CheckpointError, InputError
from engine.io.checkpoint import MappedSource, SafetensorsFile, Source, save
from engine.models.dreambooth3d.config import DitConfig
from engine.models.dreambooth3d.files import ADAPTER, FOLDERS
from engine.models.dreambooth3d.reference import Adapters, one_frame_loss
from engine.models.dreambooth3d.weights import KINDS, adapter_kind, adapter_shapes, dit_shapes
from engine.runtime.arena import Arena

STATE = "state.safetensors"
ALPHA = 32  # what the released files say of a scale that plays no part
DTYPES = {"bf16": torch.bfloat16, "f32": torch.float32}


@dataclass(frozen=True)
class Settings:
    """As released, but for one_way: references that see only one another, so that generation may keep them.

    drop_views: share of steps, from half of them on, that run without references. dtype: of weights and adapters.
    """

    steps: int = 400
    rank: int = 16
    lr: float = 1e-4
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.01
    clip: float = 1.0
    seed: int = 42
    drop_views: float = 0.0
    one_way: bool = False
    dtype: str = "bf16"

    def checked(self) -> Settings:
        """Itself. Raises: InputError for what is out of range."""
        if self.dtype not in DTYPES:
            raise InputError(f"dtype={self.dtype!r} is not one of {', '.join(DTYPES)}")
        if not (type(self.steps) is int and 1 <= self.steps <= 1 << 20 and type(self.rank) is int and self.rank >= 1):
            raise InputError(f"steps={self.steps!r}, rank={self.rank!r}: positive integers are needed")
        if not (0 < self.lr < 1 and 0 <= self.drop_views <= 1 and self.clip > 0):
            raise InputError(f"lr={self.lr!r}, drop_views={self.drop_views!r}, clip={self.clip!r} are out of range")
        return self


@dataclass(frozen=True)
class Photos:
    """What a run learns from, all f32: mean, std [N, z, h, w] of the photos' latents, scaled; views [R, z, h, w], clean
    latents of the references in the order of their times, or none; states [n, text_dim] of the prompt's tokens."""

    mean: np.ndarray
    std: np.ndarray
    views: np.ndarray
    states: np.ndarray

    def checked(self, c: DitConfig) -> Photos:
        """Itself. Raises: InputError where shapes do not belong together, or a value is not finite."""
        shape = self.mean.shape
        if len(shape) != 4 or not shape[0] or shape[1] != c.channels or self.std.shape != shape:
            raise InputError(f"photos are {list(shape)} and {list(self.std.shape)}; [N, {c.channels}, h, w] twice")
        if self.views.ndim != 4 or self.views.shape[1:] != shape[1:]:
            raise InputError(f"views are {list(self.views.shape)}; [R, {', '.join(map(str, shape[1:]))}] are needed")
        if self.states.ndim != 2 or self.states.shape[1] != c.text_dim or not len(self.states):
            raise InputError(f"states are {list(self.states.shape)}; [n, {c.text_dim}] are needed")
        for name, value in vars(self).items():
            if not np.isfinite(value).all():
                raise InputError(f"{name} holds NaN or infinity")
        return self

    @property
    def digest(self) -> str:
        return digest(*(np.ascontiguousarray(value, np.float32) for value in vars(self).values()))


def memory_plan(c: DitConfig, settings: Settings, tokens: int) -> dict[str, int]:
    """Bytes that a run takes: the base, both adapters with gradients and moments, and what a step of so many tokens
    keeps for its way back, about 24 values of a token in a block."""
    size = 2 if settings.dtype == "bf16" else 4
    shapes = [s for kind in FOLDERS for s in adapter_shapes(c, settings.rank, KINDS[kind]).values()]
    base, adapters = (sum(map(math.prod, some)) for some in (dit_shapes(c).values(), shapes))
    return {"base": size * base, "adapters": 4 * size * adapters,
            "activations": 24 * size * tokens * c.width * c.layers}  # fmt: skip


class Personalizer:
    """One run, `step` by step or to its end: trains a new adapter of the subject and, where there are views, theirs."""

    def __init__(
        self, c: DitConfig, base: Source, photos: Photos, settings: Settings, views: Source | None = None
    ) -> None:
        """views: the pre-trained adapter of reference views, under official names; without one it begins as no change.

        Raises: InputError (photos, settings), CheckpointError (tensors that are not there, or not finite; an adapter of
        something else).
        """
        if views is not None and (kind := adapter_kind(views, c)) != "views":
            raise CheckpointError(f"the adapter of the views is one of kind {kind!r}")
        self.c, self.photos, self.settings = c, photos.checked(c), settings.checked()
        self.done, self._dtype = 0, DTYPES[settings.dtype]
        self._base = {k: _read(base, k).to(self._dtype) for k in dit_shapes(c)}
        generator = torch.Generator().manual_seed(settings.seed)
        self.adapters = {
            "subject": fresh_adapter(c, settings.rank, KINDS["subject"], generator),
            "views": {k: _read(views, k) for k in views.keys()}  # noqa: SIM118
            if views is not None
            else fresh_adapter(c, settings.rank, KINDS["views"], generator),
        }
        if not len(photos.views):
            del self.adapters["views"]
        for part in self.adapters.values():
            for key in part:
                part[key] = part[key].to(self._dtype).requires_grad_()
        self._trained = [p for part in self.adapters.values() for p in part.values()]
        self._optimiser = torch.optim.AdamW(
            self._trained, lr=settings.lr, betas=settings.betas, eps=settings.eps, weight_decay=settings.weight_decay
        )

    # ------------------------------------------------------------------------------------------ training
    def step(self) -> float:
        """One photo; returns the loss."""
        p, s = self.photos, self.settings
        epoch, place = divmod(self.done, len(p.mean))
        chosen = np.random.default_rng([s.seed, 0, epoch]).permutation(len(p.mean))[place]
        rng = np.random.default_rng([s.seed, 1, self.done])
        shape = p.mean.shape[1:]
        clean = p.mean[chosen] + p.std[chosen] * rng.standard_normal(shape, np.float32)
        noise = rng.standard_normal(shape, np.float32)
        time = 1000 * (1 / (1 + np.exp(-rng.standard_normal())) * (1 - 2e-5) + 1e-5)
        alone = rng.random() < s.drop_views and 2 * self.done >= s.steps
        views = () if alone else tuple(torch.from_numpy(p.views))
        how = Adapters(self.adapters["subject"], self.adapters.get("views"), "all")
        context = torch.autocast("cpu", torch.bfloat16) if self._dtype == torch.bfloat16 else nullcontext()
        with context:
            loss = one_frame_loss(
                self._base, self.c, torch.from_numpy(clean)[:, None], torch.from_numpy(noise)[:, None], float(time),
                torch.from_numpy(p.states), views, how, one_way=s.one_way,
            )  # fmt: skip
        self._optimiser.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self._trained, s.clip)
        self._optimiser.step()
        self.done += 1
        return loss.item()

    def run(
        self, folder: str | os.PathLike[str], *, save_every: int = 50, resume: bool = False,
        on_step: Callable[[int, float], object] | None = None,
    ) -> Path:  # fmt: skip
        """To the end: returns `checkpoint-N` in the folder, which holds both adapters in the released format.

        on_step: called with the number of steps done and the loss; where it returns False, the run stops behind a saved
        state. resume: go on from the state in the folder, which must be of the same photos and settings.

        Raises: InputError (a state is there and resume is not asked for), CheckpointError (a state of another run, a
        disk that is full: what was there before stays).
        """
        folder = Path(folder)
        if (folder / STATE).exists():
            if not resume:
                raise InputError(f"{folder} holds a run's state; go on with resume=True, or take another folder")
            self._restore(folder / STATE)
        while self.done < self.settings.steps:
            loss = self.step()
            go_on = on_step is None or on_step(self.done, loss) is not False
            if self.done % save_every == 0 or self.done == self.settings.steps or not go_on:
                self.save(folder)
            if not go_on:
                break
        return self.export(folder)

    # ------------------------------------------------------------------------------------------ files
    def _facts(self) -> dict[str, str]:
        """What two states must share to be of one run."""
        return {"photos": self.photos.digest, "settings": json.dumps(asdict(self.settings), sort_keys=True)}

    def save(self, folder: Path) -> Path:
        """The state of the run: the old one stays until the new one is whole."""
        out = {}
        for part, tensors in self.adapters.items():
            for key, value in tensors.items():
                held = self._optimiser.state.get(value, {})
                out[f"{part}.value.{key}"] = _stored(value)
                out |= {f"{part}.{name}.{key}": _stored(held[name]) for name in _MOMENTS if name in held}
        return save(folder / STATE, out, {**self._facts(), "done": str(self.done)})

    def _restore(self, path: Path) -> None:
        with SafetensorsFile(path) as file:
            facts = {k: file.metadata.get(k) for k in ("photos", "settings")}
            if facts != self._facts():
                wrong = next(k for k, v in self._facts().items() if facts[k] != v)
                raise CheckpointError(f"{path} is of a run with other {wrong}; give those, or take another folder")
            self.done = int(file.metadata["done"])
            known = set(file.keys())
            for part, tensors in self.adapters.items():
                for key, value in tensors.items():
                    with torch.no_grad():
                        value.copy_(_read(file, f"{part}.value.{key}"))
                    if f"{part}.{_MOMENTS[0]}.{key}" not in known:
                        continue  # never had a gradient: what feeds only references and text in the last block
                    held = {n: _read(file, f"{part}.{n}.{key}") for n in _MOMENTS}
                    self._optimiser.state[value] = {k: v if k == "step" else v.to(value.dtype) for k, v in held.items()}

    def export(self, folder: Path) -> Path:
        """`checkpoint-N/lora/...` with both adapters under official names; whole or not at all."""
        target = Path(folder) / f"checkpoint-{self.done}"
        draft = target.with_name(f".{target.name}.{secrets.token_hex(6)}")
        try:
            for part, tensors in self.adapters.items():
                modules = sorted({k.rsplit(".lora_", 1)[0] for k in tensors})
                rank = len(tensors[f"{modules[0]}.lora_A.weight"])
                facts = {"r": rank, "lora_alpha": ALPHA, "target_modules": modules}
                about = {"format": "pt", "lora_adapter_metadata": json.dumps(facts)}
                save(draft / "lora" / FOLDERS[part] / ADAPTER, {k: _stored(v) for k, v in tensors.items()}, about)
            (draft / "training_config.json").write_text(json.dumps(asdict(self.settings), indent=2) + "\n")
            if target.exists():
                shutil.rmtree(target)
            draft.rename(target)
        except OSError as fault:
            raise CheckpointError(f"{target} cannot be written: {fault.strerror}; check space and rights") from fault
        finally:
            shutil.rmtree(draft, ignore_errors=True)
        return target


_MOMENTS = ("step", "exp_avg", "exp_avg_sq")  # what AdamW knows of a tensor


def _read(source: Source, name: str) -> Tensor:
    """f32, finite."""
    return torch.from_numpy(np.array(Packer(MappedSource(source), Arena(dry=True)).value(name)))


def _stored(value: Tensor) -> tuple[str, np.ndarray]:
    plain = value.detach().contiguous()
    if plain.dtype == torch.bfloat16:
        return "BF16", plain.view(torch.uint16).numpy()
    return "F32", plain.numpy()


def fresh_adapter(c: DitConfig, rank: int, modules: Sequence[str], generator: torch.Generator) -> dict[str, Tensor]:
    """An adapter that changes nothing yet: A uniform within 1 / sqrt(its width), B zero."""
    out = {}
    for name, shape in adapter_shapes(c, rank, tuple(modules)).items():
        bound = float(np.prod(shape[1:])) ** -0.5 if "lora_A" in name else 0.0
        out[name] = (2 * torch.rand(shape, generator=generator) - 1) * bound
    return out
