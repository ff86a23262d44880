"""The plain-torch planners and text tower of MoTok: golden values, slow loops, refusals."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from _motok import check, error, filled, normal, one_thread, single_waves, uniform
from _motok_tiny import tiny
from torch import Tensor

from engine.errors import InputError
from engine.models.motok.config import MoTokConfig
from engine.models.motok.planner_reference import (
    ARPlanner,
    ClipTower,
    DDMPlanner,
    best,
    guided_logits,
    pick,
    sample_ar,
    sample_ddm,
)
from engine.models.motok.schedule import masked_counts
from engine.models.motok.tokenizer_reference import (
    Quantizer,
)

__all__ = ["one_thread"]

FULL = MoTokConfig.humanml3d()
VARIANTS = [MoTokConfig.humanml3d(1), FULL, MoTokConfig.humanml3d(3), MoTokConfig.kit()]
VARIANT_NAMES = ["DR2", "DR4", "DR8", "KIT"]


# ---- golden: planners and text ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def ddm() -> DDMPlanner:
    return filled(DDMPlanner(FULL), "ddm.")


def golden_ids() -> Tensor:
    n = torch.arange(16)
    return torch.where(n % 3 == 0, 1024, (7 * n * n + 3) % 1024)[None]


def test_golden_ddm(ddm: DDMPlanner) -> None:
    ids, text = golden_ids(), uniform("input.clip", 1, 512)
    exact = ddm.position_enc.pe.clone()
    assert (exact - single_waves(5000, 384))[:64].abs().max() < 1e-5
    ours = ddm(ids, text)
    ddm.position_enc.pe.copy_(single_waves(5000, 384))
    cond = ddm(ids, text)
    check(cond.transpose(1, 2), [-2.073007143, -2.021128563, -2.002463918, -2.052453883], -2.168094084,
          -189.8878703, 15775.19807, 1e-8)  # fmt: skip
    check(ddm(ids, torch.zeros_like(text)).transpose(1, 2), [-1.936185297, -1.893723191, -1.881746028, -1.932079757],
          None, -220.6518172, 15787.90478, 1e-8)  # fmt: skip
    check(ddm(ids[:, :12], text).transpose(1, 2), [-2.060909321, -2.009492332, -1.97881037, -2.016665021],
          None, -12.22842016, 11653.80055, 1e-8)  # fmt: skip
    ddm.position_enc.pe.copy_(exact)
    assert error(ours, cond) < 1e-6  # positions as the formula says move nothing that matters


def test_padding_is_not_seen(ddm: DDMPlanner) -> None:
    ids, text, traj = golden_ids(), uniform("input.clip", 1, 512), uniform("input.traj", 1, 16, 384)
    short = ddm(ids[:, :12], text, traj[:, :12])
    ids[:, 12:] = ddm.pad
    torch.testing.assert_close(ddm(ids, text, traj)[:, :12], short, rtol=0, atol=1e-12)


def test_golden_ar() -> None:
    n, model = torch.arange(8), filled(ARPlanner(FULL), "ar.")
    ids, text = ((7 * n * n + 3) % 1024)[None], uniform("input.clip", 1, 512)
    ours = model(ids, text)
    model.trans_base.pos_embed.embed.copy_(single_waves(51, 768))
    logits = model(ids, text)
    assert logits.shape == (1, 9, 1025) and error(ours, logits) < 1e-6
    check(logits, [-0.7245825787, 0.5158677203, 0.4477128554, 0.002608673911], 0.1329961268,
          -145.8160591, 9055.714929, 1e-8)  # fmt: skip


def test_golden_clip() -> None:
    model = filled(ClipTower(FULL.clip), "clip.")
    ids = torch.zeros(1, 77, dtype=torch.long)
    ids[0, :6] = torch.tensor([49406, 320, 2533, 4160, 525, 49407])
    want = model(ids)
    check(want, [-1.027897487, -0.1635132148, -0.02444161335, -1.110352436], 1.184055109, 2.332927415, 597.9586973)
    torch.testing.assert_close(model(ids[:, :6]), want, rtol=0, atol=1e-12)  # padding behind the end is not seen
    with pytest.raises(InputError, match="at most 77"):
        model(torch.zeros(1, 78, dtype=torch.long))


# ---- the discrete planner ---------------------------------------------------------------------------------------


def test_masked_counts() -> None:
    assert masked_counts(49, 10) == [49, 48, 46, 42, 38, 31, 24, 17, 9, 1]
    assert masked_counts(1, 10) == [1] * 10 and masked_counts(0, 10) == [0] * 10 and masked_counts(5, 1) == [5]
    share = (torch.linspace(0, 1, 10) * math.pi * 0.5).double().cos()  # angles in fp32, as the original has them
    for n in range(1, 200):
        assert masked_counts(n, 10) == [max(1, round(float(s))) for s in share * n]


def test_pick_is_the_inverse_of_the_sums() -> None:
    p = torch.tensor([0.0, 0.25, 0.0, 0.5, 0.25, 0.0], dtype=torch.float64)
    for u, want in ((0.0, 1), (0.2499, 1), (0.2501, 3), (0.7499, 3), (0.7501, 4), (1 - 2**-53, 4)):
        assert int(pick(p.log(), torch.tensor(u, dtype=torch.float64))) == want
    logits, u = normal("logits", 50, 40), uniform("u", 50).abs()
    mass = logits.softmax(-1).cumsum(-1)
    for row in range(50):
        want = next(i for i in range(40) if mass[row, i] > u[row] * mass[row, -1])
        assert int(pick(logits, u)[row]) == want


def test_best_keeps_so_many_and_the_lowest_of_equals() -> None:
    kept = best(torch.tensor([1.0, 3.0, 2.0, 3.0, 2.0, 2.0]), 3)
    assert kept.isfinite().nonzero()[:, 0].tolist() == [1, 2, 3]
    assert FULL.topk == 103 and int(best(normal("l", 1024), FULL.topk).isfinite().sum()) == 103


def test_quantizer_takes_the_lowest_of_equals() -> None:
    q = Quantizer(tiny())
    q.codebook[7] = q.codebook[3]
    q.codebook[30] = q.codebook[3]
    assert q(q.codebook[[7, 3, 30, 5]]).tolist() == [3, 3, 3, 5]


def tiny_ddm(c: MoTokConfig) -> DDMPlanner:
    return filled(DDMPlanner(c), "ddm.")


def slow_ddm(model: DDMPlanner, c: MoTokConfig, ids: list[int], free: list[bool], uniforms: Tensor, text: Tensor,
             traj: Tensor, coins: list[bool], w: float) -> list[int]:  # fmt: skip
    """The planner's loop for one sample, token by token."""
    scores = [0.0 if f else 1e5 for f in free]
    ids = [c.codes if f else i for i, f in zip(ids, free, strict=True)]
    count = sum(free)
    for i in range(c.ddm.steps):
        n = max(1, math.floor(math.cos(i / (c.ddm.steps - 1) * math.pi / 2) * count + 0.5 - 1e-9))
        chosen = sorted(range(len(ids)), key=lambda j: (scores[j], j))[:n]
        for j in chosen:
            ids[j] = c.codes
        seen, none = torch.tensor([ids]), torch.zeros_like(text)
        cond = model(seen, text, traj)
        uncond = model(seen, text, torch.zeros_like(traj)) if coins[i] else model(seen, none, traj)
        logits = (uncond + w * (cond - uncond))[0]
        scores = [1e5] * len(ids)
        for j in chosen:
            order = sorted(range(c.codes), key=lambda k: (-float(logits[j, k]), k))[: c.topk]
            weights = [math.exp(float(logits[j, k])) for k in sorted(order)]
            mass = np.cumsum(weights)
            at = sorted(order)[int(np.argmax(mass > float(uniforms[i, j]) * mass[-1]))]
            ids[j], scores[j] = at, float(logits[j].softmax(-1)[at])
    return ids


@pytest.mark.parametrize("edited", [False, True])
def test_ddm_sampling_token_by_token(edited: bool) -> None:
    c = tiny()
    model, lengths, longest = tiny_ddm(c), [13, 6, 16], 16
    uniforms, text = uniform("u", 3, 5, longest).abs(), uniform("t", 3, 14)
    traj, coins = uniform("m", 3, longest, 24), uniform("c", 3, 5) > 0
    known = ((uniform("k", 3, longest) + 1) * 20).long()
    edit = uniform("e", 3, longest) > 0
    more = {"known": known, "edit": edit} if edited else {}
    got = sample_ddm(model, c, lengths, uniforms, text, traj, coins, 2.0, **more)
    for b, n in enumerate(lengths):
        free = edit[b, :n].tolist() if edited else [True] * n
        want = slow_ddm(model, c, known[b, :n].tolist(), free, uniforms[b, :, :n], text[b : b + 1],
                        traj[b : b + 1, :n], coins[b].tolist(), 2.0)  # fmt: skip
        assert got[b, :n].tolist() == want and (got[b, n:] == model.pad).all()
        assert bool((got[b, :n] < c.codes).all())
        if edited:
            keep = ~edit[b, :n]
            assert torch.equal(got[b, :n][keep], known[b, :n][keep])


def test_nothing_to_edit_changes_nothing() -> None:
    c = tiny()
    known = torch.arange(8)[None]
    got = sample_ddm(tiny_ddm(c), c, [8], torch.zeros(1, 5, 8), known=known, edit=torch.zeros(1, 8).bool())
    assert torch.equal(got, known)


def test_guided_logits() -> None:
    text, traj, none = uniform("t", 2, 4), uniform("m", 2, 3, 4), torch.zeros(2, 4).double()
    seen: list[tuple[Tensor, Tensor | None]] = []

    def predict(t: Tensor, m: Tensor | None) -> Tensor:
        seen.append((t, m))
        return t[:, None] * 2 + (0 if m is None else m)

    off = torch.tensor([False, True])
    got = guided_logits(predict, text, traj, 3.0, off, none)
    assert len(seen) == 2 and torch.equal(seen[0][0], text) and seen[0][1] is traj
    uncond = torch.stack([traj[0], 2 * text[1][None].expand(3, -1)])  # sample 0 lost its text, 1 its trajectory
    want = uncond + 3 * (2 * text[:, None] + traj - uncond)
    torch.testing.assert_close(got, want)
    for t, m, w, passes in ((text, traj, 1.0, 1), (None, traj, 3.0, 1), (None, None, 3.0, 1), (text, None, 3.0, 2)):
        seen.clear()
        guided_logits(predict, t, m, w, off, none)
        assert len(seen) == passes
        assert torch.equal(seen[0][0], none if t is None else text) and seen[0][1] is m
    assert torch.equal(seen[1][0], none) and seen[1][1] is None


def test_even_odd_needs_no_coins() -> None:
    c = tiny(cfg_alternate="even_odd")
    model, u = tiny_ddm(c), uniform("u", 2, 5, 8).abs()
    text, traj = uniform("t", 2, 14), uniform("m", 2, 8, 24)
    coins = (torch.arange(5) % 2 == 1).expand(2, 5)
    want = sample_ddm(model, tiny(), [8, 8], u, text, traj, coins)
    assert torch.equal(sample_ddm(model, c, [8, 8], u, text, traj), want)
    with pytest.raises(InputError, match=r"coins of \[2, 5\]"):
        sample_ddm(model, tiny(), [8, 8], u, text, traj)


def test_what_sampling_refuses() -> None:
    c = tiny()
    ddm, ar = tiny_ddm(c), filled(ARPlanner(c), "ar.")
    u, known = torch.zeros(1, 5, 8), torch.zeros(1, 8, dtype=torch.long)
    with pytest.raises(InputError, match=r"\[1, 5, 9\]"):
        sample_ddm(ddm, c, [9], u)
    with pytest.raises(InputError, match="together"):
        sample_ddm(ddm, c, [8], u, known=known)
    with pytest.raises(InputError, match="not in 0 to 39"):
        sample_ddm(ddm, c, [8], u, known=known - 1, edit=known.bool())
    with pytest.raises(InputError, match="at most 16"):
        sample_ar(ar, c, torch.zeros(1, 17))
    with pytest.raises(InputError, match="4 tokens"):
        sample_ar(ar, c, torch.zeros(1, 4), [5])


# ---- the autoregressive planner ---------------------------------------------------------------------------------


def test_ar_is_causal_and_sees_the_trajectory_one_step_ahead() -> None:
    c = tiny()
    model, text = filled(ARPlanner(c), "ar."), uniform("t", 1, 14)
    ids, traj = torch.arange(6)[None], uniform("m", 1, 6, 24)
    logits = model(ids, text, traj)
    assert logits.shape == (1, 7, 41)
    for n in range(6):
        torch.testing.assert_close(model(ids[:, :n], text, traj), logits[:, : n + 1], rtol=0, atol=1e-12)
        moved = traj.clone()
        moved[:, n] += uniform("more", 24)  # not a constant, which the norms would take away
        changed = (model(ids, text, moved) - logits).abs().amax((0, 2)) > 1e-6
        assert changed.tolist() == [p >= n for p in range(7)]


@pytest.mark.parametrize("known_length", [False, True])
def test_ar_sampling_token_by_token(known_length: bool) -> None:
    c = tiny()
    model = filled(ARPlanner(c), "ar.")
    uniforms, text, traj = uniform("u", 4, 16).abs(), uniform("t", 4, 14), uniform("m", 4, 16, 24)
    uniforms[0, 5] = uniforms[2, 0] = 1 - 1e-9  # END is the last index
    coins, lengths = uniform("c", 4, 16) > 0, [16, 3, 9, 1] if known_length else None
    got = sample_ar(model, c, uniforms, lengths, text, traj, coins, 1.5)
    ends = 0
    for b in range(4):
        ids: list[int] = []
        one, path, none = text[b : b + 1], traj[b : b + 1], torch.zeros(1, 14).double()
        for n in range(lengths[b] if lengths else 16):
            seen = torch.tensor([ids], dtype=torch.long)
            cond = model(seen, one, path)[0, -1]
            uncond = (model(seen, one, path * 0) if coins[b, n] else model(seen, none, path))[0, -1]
            logits = uncond + 1.5 * (cond - uncond)
            mass = (logits[: model.end] if lengths else logits).softmax(-1).cumsum(-1)
            new = next(i for i in range(len(mass)) if mass[i] > uniforms[b, n] * mass[-1])
            if new == model.end:
                ends += 1
                break
            ids.append(new)
        assert got[b].tolist() == ids + [model.pad] * (16 - len(ids))
    assert known_length or ends >= 2
