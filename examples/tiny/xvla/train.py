"""Trains xvla-tiny from nothing and writes it as lerobot lays out an X-VLA checkpoint.

python examples/tiny/xvla/train.py                 # two quiet cores: see the README for the time
python examples/tiny/xvla/train.py --background    # the same, detached; follow train.log
python examples/tiny/xvla/train.py --resume        # continue from the last checkpoint
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

from engine.blocks.observation import ActionSpace, InputProfile, lerobot_xvla
from engine.blocks.schedule import HorizonSchedule
from engine.models.xvla.config import XVLAConfig
from engine.models.xvla.reference import XVLAReference

SCHEDULE = HorizonSchedule(horizon=30, steps=10, alpha=0.7, u0=0.9)
MAX_DELAY = 12
TEXT = 8
CONFIG = {
    "type": "xvla",
    "dtype": "bfloat16",
    "chunk_size": SCHEDULE.horizon,
    "n_action_steps": SCHEDULE.horizon,
    "num_denoising_steps": SCHEDULE.steps,
    "florence_config": {
        "text_config": {
            "d_model": 96,
            "encoder_layers": 2,
            "encoder_attention_heads": 3,
            "encoder_ffn_dim": 192,
            "vocab_size": 640,
            "max_position_embeddings": 64,
        },
        "vision_config": {
            "dim_embed": [32, 64, 96],
            "depths": [1, 1, 1],
            "num_heads": [1, 2, 3],
            "num_groups": [1, 2, 3],
            "patch_size": [7, 3, 3],
            "patch_stride": [4, 2, 2],
            "patch_padding": [3, 1, 1],
            "mlp": [64, 128, 192],
            "window_size": 7,
            "patch_prenorm": [False, True, True],
            "projection_dim": 96,
            "image_pos_embed": {"type": "learned_abs_2d", "max_pos_embeddings": 8},
            "visual_temporal_embedding": {"type": "COSINE", "max_temporal_embeddings": 4},
            "image_feature_source": ["spatial_avg_pool", "temporal_avg_pool"],
        },
    },
    "image_resolution": [task.SIZE, task.SIZE],
    "hidden_size": 96,
    "depth": 3,
    "num_heads": 3,
    "mlp_dim": 192,
    "num_domains": 2,
    "len_soft_prompts": 4,
    "dim_time": 16,
    "max_len_seq": 128,
    "use_hetero_proj": False,
    "action_mode": "auto",
    "max_action_dim": 4,
    "max_state_dim": 4,
    "use_proprio": True,
    "num_image_views": 2,
    "tokenizer_max_length": TEXT,
    "tokenizer_padding_side": "right",
}


def config() -> XVLAConfig:
    inputs = {k: {"type": "VISUAL", "shape": [3, task.SIZE, task.SIZE]} for k in task.CAMERAS}
    inputs["observation.state"] = {"type": "STATE", "shape": [2]}
    outputs = {"action": {"type": "ACTION", "shape": [2]}}
    return XVLAConfig.from_json(CONFIG | {"input_features": inputs, "output_features": outputs})


def build() -> nn.Module:
    model = XVLAReference(config())
    with torch.no_grad():
        # Unit embeddings would drown what the images say.
        embed = model.vlm.multi_modal_projector.image_position_embed
        for table in (embed.row_embeddings, embed.column_embeddings, model.vlm.language_model.shared):
            table.weight.mul_(0.3)
        model.vlm.language_model.encoder.embed_positions.weight.mul_(0.3)
        model.transformer.pos_emb.normal_(std=0.3)
    model.probe = Probe(config().language.width)
    return model


def profile() -> InputProfile:
    space = ActionSpace("auto", CONFIG["max_action_dim"], 2)
    return lerobot_xvla(task.CAMERAS, space, proprio_dim=CONFIG["max_state_dim"], slots=CONFIG["num_image_views"],
                        max_tokens=TEXT, state_norm="zscore", action_norm="zscore")  # fmt: skip


def context(model: XVLAReference, batch: Batch, draws: int) -> tuple[tuple[Tensor, Tensor, Tensor], Tensor]:
    """(context, proprio, domain) of each observation, once for all of its draws; and the tokens of the views."""
    views = model.embed_images(batch.images.flatten(0, 1)).unflatten(0, batch.images.shape[:2])
    domain = torch.zeros(len(views), dtype=torch.long)
    text = model.vlm.language_model.shared(batch.tokens)
    first = model.vlm.language_model.encoder(torch.cat([views[:, 0], text], 1))
    seen = model.transformer.context(first, views[:, 1:].flatten(1, 2), domain)
    seen, proprio, domain = (x.repeat_interleave(draws, 0) for x in (seen, batch.proprio, domain))
    return (seen, proprio, domain), views


def loss(model: nn.Module, batch: Batch, noise: Tensor, tau: Tensor) -> tuple[Tensor, Tensor]:
    """Squared error of the clean action."""
    assert isinstance(model, XVLAReference)
    (seen, proprio, domain), views = context(model, batch, batch.draws)
    got = model.predict(noised(batch.actions, noise, tau), proprio, tau, seen, domain)
    return (got - batch.actions).square(), views


def sample(model: nn.Module, batch: Batch, noise: Tensor, tau: Tensor) -> Tensor:
    assert isinstance(model, XVLAReference)
    (seen, proprio, domain), _ = context(model, batch, 1)
    return model.steps(seen, proprio, domain, noise, tau, batch.actions, batch.delay)[-1]


def rho(uniform: Tensor) -> Tensor:
    """Uniform, as the paper says."""
    return uniform * 0.999 + 0.001


RECIPE = Recipe(
    "xvla-tiny", CONFIG, SCHEDULE, MAX_DELAY, build, profile, loss, sample, rho,
    special=("<s>", "<pad>", "</s>", "<unk>"),
    norm_mode="MEAN_STD",
    sidecar={"schedule": "has", "alpha": SCHEDULE.alpha, "u0": SCHEDULE.u0, "num_steps": SCHEDULE.steps,
             "ready_threshold": 0.01, "max_delay": MAX_DELAY, "robot_dims": 2},
)  # fmt: skip

if __name__ == "__main__":
    main(RECIPE, __doc__, __file__, steps=1100, observations=96, draws=1, lr=2e-3)
