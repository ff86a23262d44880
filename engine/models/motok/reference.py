"""MoTok in plain torch: the arbiter of the kernels' results and the model that the tiny trainer trains.

Written for reading: no kernels, differentiable everywhere, and each part's state dict has the key names of its file.
Computes in the dtype of its weights, softmax and schedules in fp32 or better. Every random number comes from outside:
noise, uniforms in [0, 1) and coins. Source: Gu et al. 2026 (arXiv 2603.19227), sections 3 and 4 and appendix A; what
the paper leaves open is a field of the configuration.

Shapes: B samples, T frames, D values per frame, N = T / rate tokens, J joints, S sampled steps, K codes.
"""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn

from engine.errors import InputError
from engine.models.motok.config import Guidance, MoTokConfig
from engine.models.motok.guidance_reference import Targets, guide
from engine.models.motok.planner_reference import ARPlanner, ClipTower, DDMPlanner
from engine.models.motok.tokenizer_reference import Tokenizer, denoise, schedule, wide


class MoTokReference(nn.Module):
    """The parts of a checkpoint, with random weights; `tokenizer`, `ddm`, `ar` and `clip` have their file's keys."""

    def __init__(self, config: MoTokConfig):
        super().__init__()
        self.config = config
        self.tokenizer = Tokenizer(config)
        self.ddm = DDMPlanner(config)
        self.ar = ARPlanner(config)
        self.clip = ClipTower(config.clip)

    def decode(
        self, tokens: Tensor, noise: Tensor, constraints: list[Targets] | None = None,
        guidance: Guidance | None = None, step_noise: Tensor | None = None,
    ) -> tuple[Tensor, list[int]]:  # fmt: skip
        """Tokens to motion.

        Args:
            tokens: [B, N] int64, all of one length.
            noise: [B, T, D]. step_noise: of `denoise`.
            constraints: one per sample; each is met alone, whatever else is in the batch.
            guidance: the configuration's if None.

        Returns:
            A normalised motion [B, T, D], and per sample the evaluations that guidance took.
        """
        c, g, s = self.config, guidance or self.config.guidance, self.tokenizer.condition(tokens)
        if constraints is not None and len(constraints) != len(tokens):
            raise InputError(f"{len(constraints)} constraints for {len(tokens)} samples; give one for each")
        if noise.shape != (*s.shape[:2], c.features):
            raise InputError(f"noise is {list(noise.shape)}; {[*s.shape[:2], c.features]} is needed")
        evals = [0] * len(tokens)
        posterior = schedule(c.diffusion).posterior

        def predict(x: Tensor, t: Tensor) -> Tensor:
            return self.tokenizer.denoiser(x.to(s.dtype), t, s)

        def pull(x: Tensor, k: int) -> Tensor:
            out = []
            for i, rows in enumerate(cast("list[Targets]", constraints)):
                y, spent = guide(x[i], rows, g, k, float(posterior[k]), evals[i])
                evals[i] += spent
                out.append(y)
            return torch.stack(out)

        noise = noise.to(wide(s).dtype)
        motion = denoise(predict, noise, c.diffusion, step_noise, None if constraints is None else pull, g.on)
        return motion, evals
