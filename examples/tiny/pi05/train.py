"""Trains pi05-tiny from nothing and writes it as lerobot lays out a pi0.5 checkpoint.

python examples/tiny/pi05/train.py                 # two quiet cores: see the README for the time
python examples/tiny/pi05/train.py --background    # the same, detached; follow train.log
python examples/tiny/pi05/train.py --resume        # continue from the last checkpoint
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[3]))
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "reaction"))

import reaction_task as task
from reaction_train import Batch, Probe, Recipe, main, noised

from engine.blocks.observation import InputProfile, lerobot_pi05
from engine.blocks.schedule import HorizonSchedule
from engine.models.pi05.config import Pi05Config
from engine.models.pi05.reference import Pi05Reference, PrefixCache

SCHEDULE = HorizonSchedule(horizon=50, steps=10, alpha=0.6, u0=0.9)
MAX_DELAY = 12
TEXT = 20
CONFIG = {
    "type": "pi05",
    "dtype": "bfloat16",
    "chunk_size": SCHEDULE.horizon,
    "n_action_steps": SCHEDULE.horizon,
    "num_inference_steps": SCHEDULE.steps,
    "max_state_dim": 8,
    "max_action_dim": 4,
    "tokenizer_max_length": TEXT,
    "image_resolution": [task.SIZE, task.SIZE],
    "patch_size": 14,
    "vision_hidden_size": 96,
    "vision_num_hidden_layers": 2,
    "vision_num_heads": 3,
    "vision_intermediate_size": 192,
    "hidden_size": 96,
    "num_hidden_layers": 3,
    "intermediate_size": 256,
    "num_attention_heads": 4,
    "num_key_value_heads": 1,
    "head_dim": 32,
    "vocab_size": 640,
    "expert_hidden_size": 64,
    "expert_intermediate_size": 192,
    "min_period": 4e-3,
    "max_period": 4.0,
}


def config() -> Pi05Config:
    inputs = {k: {"type": "VISUAL", "shape": [3, task.SIZE, task.SIZE]} for k in task.CAMERAS}
    inputs["observation.state"] = {"type": "STATE", "shape": [2]}
    return Pi05Config.from_json(CONFIG | {"input_features": inputs})


def build() -> nn.Module:
    model = Pi05Reference(config())
    vlm = model.paligemma_with_expert.paligemma.model
    with torch.no_grad():
        # Tokens enter the trunk times sqrt(width): of the size of the image tokens after it.
        vlm.language_model.embed_tokens.weight.normal_(std=config().trunk.width ** -0.5)
        vlm.vision_tower.vision_model.embeddings.position_embedding.weight.normal_(std=0.3)
        model.action_out_proj.weight.mul_(0.1)
    model.probe = Probe(config().trunk.width)
    return model


def profile() -> InputProfile:
    size = (task.SIZE, task.SIZE)
    return lerobot_pi05(task.CAMERAS, 2, model_dim=CONFIG["max_action_dim"], size=size, max_tokens=TEXT)


def prefill(model: Pi05Reference, batch: Batch, draws: int) -> tuple[PrefixCache, Tensor]:
    """The prefix of each observation once, for all of its draws; and the tokens of the views [n, V, T, D]."""
    views = model.embed_images(batch.images)
    x = torch.cat([views.flatten(1, 2), model.embed_tokens(batch.tokens)], 1)
    cache = model.prefill(x, torch.cat([batch.image_mask.repeat_interleave(views.shape[2], 1), batch.token_mask], 1))
    if draws > 1:
        again = [[x.repeat_interleave(draws, 0) for x in part] for part in (cache.k, cache.v)]
        valid, positions = (x.repeat_interleave(draws, 0) for x in (cache.valid, cache.positions))
        cache = PrefixCache(valid, positions, *again)
    return cache, views


def loss(model: nn.Module, batch: Batch, noise: Tensor, tau: Tensor) -> tuple[Tensor, Tensor]:
    """Squared error of the velocity noise - action."""
    assert isinstance(model, Pi05Reference)
    cache, views = prefill(model, batch, batch.draws)
    got = model.velocity(noised(batch.actions, noise, tau), tau, cache)
    return (got - (noise - batch.actions)).square(), views


def sample(model: nn.Module, batch: Batch, noise: Tensor, tau: Tensor) -> Tensor:
    assert isinstance(model, Pi05Reference)
    return model.steps(prefill(model, batch, 1)[0], noise, tau, batch.actions, batch.delay)[-1]


def rho(uniform: Tensor) -> Tensor:
    """Beta(1.5, 1), as pi0.5 is trained: more often near the noise."""
    return uniform ** (1 / 1.5) * 0.999 + 0.001


RECIPE = Recipe(
    "pi05-tiny", CONFIG, SCHEDULE, MAX_DELAY, build, profile, loss, sample, rho,
    special=("<pad>", "<eos>", "<bos>", "<unk>"),
    norm_mode="QUANTILES",
    sidecar={"schedule": "has", "alpha": SCHEDULE.alpha, "u0": SCHEDULE.u0, "num_steps": SCHEDULE.steps,
             "ready_threshold": 0.01, "max_delay": MAX_DELAY, "discrete_state_input": True, "robot_dims": 2},
)  # fmt: skip

if __name__ == "__main__":
    main(RECIPE, __doc__, __file__, steps=1900, observations=96, draws=1, lr=2e-3)
