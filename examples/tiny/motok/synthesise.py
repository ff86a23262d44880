"""People who walk, run, wave, sit, kick, jump, raise their arms and punch, made by formulas, with sentences about it.

Poses are directions of bones in the heading's frame (x left, y up, z ahead), placed with the canonical skeleton's bone
lengths. The root follows from the feet: the one that stands does not move, the lowest touches the floor. So feet do
not slide, whatever the speed and the turn.
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass

import numpy as np

from engine.blocks.motion import HUMANML3D, from_joints
from engine.blocks.motion.features import place_along

FPS = 20.0
SHORTEST, LONGEST = 40, 196
GAITS = ("walk", "run")
ACTIONS = ("walk", "run", "wave", "sit", "kick", "jump", "raise", "punch")
ON_THE_SPOT = ACTIONS[2:]
HELD_OUT = 12  # one sentence of so many is never trained on

_LENGTHS = np.linalg.norm(HUMANML3D.offsets, axis=-1)
# Left and right: hip, knee, ankle, foot; collar, shoulder, elbow, wrist.
_LEGS = ((1, 4, 7, 10), (2, 5, 8, 11))
_ARMS = ((13, 16, 18, 20), (14, 17, 19, 21))
_SPINE = (3, 6, 9, 12, 15)


@dataclass(frozen=True)
class Script:
    """What a person does: a gait, an action on the spot, or one after the other.

    gait, action: None where there is none. speed: 0 slow, 1 as usual, 2 fast. turn: -1 right, 0 straight, 1 left. side:
    0 left, 1 right, of the hand or foot.
    """

    gait: str | None
    action: str | None
    speed: int
    turn: int
    side: int

    @property
    def labels(self) -> np.ndarray:
        """[actions] bool: which occur."""
        return np.array([name in (self.gait, self.action) for name in ACTIONS])


def draw_script(rng: np.random.Generator) -> Script:
    kind = rng.integers(3)
    gait = GAITS[rng.integers(2)] if kind != 1 else None
    action = ON_THE_SPOT[rng.integers(len(ON_THE_SPOT))] if kind else None
    turn = int(rng.choice([0, 0, -1, 1])) if gait else 0
    return Script(gait, action, int(rng.integers(3)), turn, int(rng.integers(2)))


# ---- motion ---------------------------------------------------------------------------------------------------------


class Pose:
    """Angles of T frames, in radians; [T] each, for left and right where there are two."""

    def __init__(self, frames: int) -> None:
        def zeros() -> np.ndarray:
            return np.zeros(frames)

        self.thigh, self.knee, self.toe = [zeros(), zeros()], [zeros(), zeros()], [zeros(), zeros()]
        # Of the upper arm: how far it is raised ahead, and sideways; of the forearm: how far it is bent.
        self.ahead, self.aside, self.elbow = [zeros(), zeros()], [zeros() + 0.12, zeros() + 0.12], [zeros(), zeros()]
        self.sway = zeros()  # of the forearm, sideways
        self.lean, self.twist = zeros(), zeros()
        self.lift = zeros()  # metres above the floor
        self.yaw = zeros()

    def directions(self) -> np.ndarray:
        """[T, J, 3] of the bones in the heading's frame."""
        frames = len(self.lean)
        out = np.zeros((frames, HUMANML3D.joints, 3))
        for side, (leg, arm) in enumerate(zip(_LEGS, _ARMS)):
            sign = 1.0 - 2.0 * side
            hip, knee, ankle, foot = leg
            out[:, hip] = [sign, 0, 0]
            thigh, shin = self.thigh[side], self.thigh[side] - self.knee[side]
            out[:, knee] = _swing(thigh, 0.04 * sign)
            out[:, ankle] = _swing(shin, 0.0)
            toe = self.toe[side]
            out[:, foot] = np.stack([0.15 * sign + 0 * toe, np.sin(toe) - 0.35, np.cos(toe)], -1)
            collar, shoulder, elbow, wrist = arm
            out[:, collar] = [0.9 * sign, 0.3, 0]
            out[:, shoulder] = [0.95 * sign, -0.3, 0]
            up, out_, bend = self.ahead[side], self.aside[side], self.elbow[side]
            out[:, elbow] = _arm(up, out_, sign)
            out[:, wrist] = _arm(up + bend, out_, sign)
            out[:, wrist, 0] += np.sin(self.sway) * (np.abs(bend) > 1.2)
        spine = np.stack([0 * self.lean, np.cos(self.lean), np.sin(self.lean)], -1)
        out[:, _SPINE] = spine[:, None]
        out[:, 15, 2] += 0.4
        upper = [j for chain in _ARMS for j in chain]
        out[:, upper] = _turned(out[:, upper], self.twist[:, None])
        return out / np.linalg.norm(np.where(out == 0, 1e-12, out), axis=-1, keepdims=True)


def _swing(angle: np.ndarray, aside: float) -> np.ndarray:
    """A bone that hangs down, swung ahead."""
    return np.stack([aside + 0 * angle, -np.cos(angle), np.sin(angle)], -1)


def _arm(ahead: np.ndarray, aside: np.ndarray, sign: float) -> np.ndarray:
    return np.stack([sign * np.sin(aside), -np.cos(ahead) * np.cos(aside), np.sin(ahead) * np.cos(aside)], -1)


def _turned(v: np.ndarray, angle: np.ndarray) -> np.ndarray:
    """v [..., 3] about +Y."""
    c, s = np.cos(angle), np.sin(angle)
    return np.stack([v[..., 0] * c + v[..., 2] * s, v[..., 1], v[..., 2] * c - v[..., 0] * s], -1)


def _ease(t: np.ndarray) -> np.ndarray:
    """From 0 to 1 over [0, 1], smooth at both ends."""
    t = np.clip(t, 0, 1)
    return t * t * (3 - 2 * t)


def walk(pose: Pose, script: Script, weight: np.ndarray, rng: np.random.Generator) -> None:
    """A gait; weight [T] in [0, 1]: how much of it."""
    run = script.gait == "run"
    pace = (0.75, 1.0, 1.3)[script.speed] * rng.uniform(0.92, 1.08)
    rate = (1.25 if run else 0.95) * pace**0.5  # strides a second
    reach = (0.5 if run else 0.36) * pace**0.5 * rng.uniform(0.95, 1.05)
    phase = np.cumsum(2 * np.pi * rate / FPS * (0.25 + 0.75 * weight)) + rng.uniform(0, 2 * np.pi)
    for side in (0, 1):
        p = phase + np.pi * side
        pose.thigh[side] += weight * (reach * np.sin(p) + (0.12 if run else 0.04))
        pose.knee[side] += weight * ((1.35 if run else 1.05) * np.clip(np.cos(p - 0.1), 0, 1) ** 1.3 + 0.1)
        pose.toe[side] += weight * 0.9 * np.clip(np.cos(p - 0.6), 0, 1)  # or the swinging foot is the lower one
        pose.ahead[side] += -weight * (0.75 if run else 0.5) * reach / 0.36 * np.sin(p)
        pose.elbow[side] += weight * (1.45 if run else 0.3)
    pose.lean += weight * (0.16 if run else 0.03)
    pose.twist += weight * 0.12 * np.sin(phase)
    bend = rng.uniform(1.0, 1.6) / max(float(weight.sum()), 50.0)  # radians a frame: a bend, not a circle
    pose.yaw += np.cumsum(weight * bend) * script.turn


def act(pose: Pose, script: Script, weight: np.ndarray, clock: np.ndarray, rng: np.random.Generator) -> None:
    """An action on the spot; weight [T] fades it in and out, clock [T] are the seconds since it began."""
    pace = (0.75, 1.0, 1.3)[script.speed] * rng.uniform(0.92, 1.08)
    side, w, t = script.side, weight, clock * pace
    size = rng.uniform(0.9, 1.1)
    if script.action == "wave":
        pose.ahead[side] += w * 0.9 * size
        pose.aside[side] += w * 1.0
        pose.elbow[side] += w * 1.9
        pose.sway += w * 0.7 * np.sin(2 * np.pi * 1.5 * t)
    elif script.action == "raise":
        up = 0.5 - 0.5 * np.cos(2 * np.pi * 0.4 * t)
        for i in (0, 1):
            pose.ahead[i] += w * (0.3 + 2.6 * up) * size
            pose.aside[i] += w * 0.15
    elif script.action == "punch":
        for i in (0, 1):
            hit = np.clip(np.sin(2 * np.pi * 0.9 * t + np.pi * (i ^ side)), 0, 1)
            pose.ahead[i] += w * (0.5 + 1.0 * hit) * size
            pose.elbow[i] += w * (2.1 - 1.9 * hit)
            pose.twist += w * 0.25 * hit * (1 - 2 * i)
        pose.lean += w * 0.1
    elif script.action == "kick":
        swing = np.clip(np.sin(2 * np.pi * 0.6 * t), 0, 1)
        back = np.clip(np.sin(2 * np.pi * 0.6 * t + 1.2), 0, 1) * (1 - swing)
        pose.thigh[side] += w * (1.35 * swing - 0.3 * back) * size
        pose.knee[side] += w * (0.25 * swing + 0.9 * back)
        pose.lean += -w * 0.2 * swing
        for i in (0, 1):
            pose.aside[i] += w * 0.4
    elif script.action == "sit":
        down = _ease(t / 1.1) * w
        for i in (0, 1):
            pose.thigh[i] += down * 1.4 * size
            pose.knee[i] += down * 1.45 * size
            pose.ahead[i] += down * 0.7
            pose.elbow[i] += down * 0.5
        pose.lean += down * 0.25
    elif script.action == "jump":
        beat = (0.75 * t) % 1.0
        crouch = np.exp(-(((beat - 0.2) / 0.12) ** 2)) + 0.7 * np.exp(-(((beat - 0.78) / 0.1) ** 2))
        air = np.clip(np.sin(np.pi * (beat - 0.32) / 0.36), 0, 1) * ((beat > 0.32) & (beat < 0.68))
        for i in (0, 1):
            pose.thigh[i] += w * 0.75 * crouch
            pose.knee[i] += w * 1.4 * crouch
            pose.toe[i] += -w * 0.5 * air
            pose.ahead[i] += w * (2.2 * air - 0.6 * crouch)
        pose.lean += w * 0.3 * crouch
        pose.lift += w * 0.32 * air * size


def joints_of(script: Script, frames: int, rng: np.random.Generator) -> np.ndarray:
    """[T, J, 3] metres of a person who follows the script; starts at the origin and looks along +Z."""
    pose, t = Pose(frames), np.arange(frames) / FPS
    end = frames / FPS
    change = end * rng.uniform(0.4, 0.6) if script.gait and script.action else end if script.gait else 0.0
    if script.gait:
        after = 1 - _ease((t - change) / 0.5) if script.action else np.ones(frames)
        walk(pose, script, after, rng)
    if script.action:
        act(pose, script, _ease((t - change) / 0.4) if change else np.ones(frames), np.clip(t - change, 0, None), rng)
    pose.lean += 0.02 * np.sin(2 * np.pi * 0.3 * t + rng.uniform(0, 6))  # nobody stands like a statue
    return _placed(pose)


def _placed(pose: Pose) -> np.ndarray:
    """The root from the feet: the lower foot stands still, unless the person is in the air."""
    body = place_along(pose.directions(), np.zeros((len(pose.lean), 3)), HUMANML3D, _LENGTHS)
    world = _turned(body, pose.yaw[:, None])
    feet = world[:, [10, 11]]
    height = feet[..., 1].min(1)
    share = 1 / (1 + np.exp(-(feet[:, 1, 1] - feet[:, 0, 1]) / 0.015))  # of the left foot in what stands
    moves = -np.diff(feet[..., [0, 2]], axis=0)
    middle = (share[1:] + share[:-1])[:, None] / 2
    step = middle * moves[:, 0] + (1 - middle) * moves[:, 1]
    step[(pose.lift[1:] + pose.lift[:-1]) > 0.01] = 0
    root = np.zeros((len(world), 3))
    root[1:, [0, 2]] = np.cumsum(step, 0)
    root[:, 1] = _smooth(-height) + pose.lift + 0.02
    return world + root[:, None]


def _smooth(x: np.ndarray) -> np.ndarray:
    kernel = np.array([1.0, 2.0, 3.0, 2.0, 1.0]) / 9
    return np.convolve(np.pad(x, 2, mode="edge"), kernel, "valid")


def features_of(joints: np.ndarray) -> np.ndarray:
    """[T - 1, 263] fp32 of joints [T, J, 3]."""
    return from_joints(joints, HUMANML3D, retarget=False).astype(np.float32)


# ---- words ----------------------------------------------------------------------------------------------------------

_WHO = ("a person", "someone", "a man", "a woman", "the figure", "a human")
_VERBS = {
    "walk": ("walks forward", "walks", "is walking ahead", "strolls forward"),
    "run": ("runs forward", "runs", "jogs ahead", "is running"),
    "wave": ("waves", "is waving", "waves hello", "greets by waving"),
    "sit": ("sits down", "takes a seat", "is sitting down", "lowers into a seat"),
    "kick": ("kicks", "is kicking", "gives a kick", "kicks the air"),
    "jump": ("jumps", "is jumping", "jumps up and down", "hops in place"),
    "raise": ("raises both arms", "lifts the arms overhead", "puts both hands up", "is raising the arms"),
    "punch": ("punches", "is boxing", "throws punches", "punches the air"),
}
_PACE = (("slowly", "at a slow pace", "calmly"), ("", "", "at a normal pace"), ("quickly", "fast", "at a high pace"))
_TURN = {0: ("", "", "in a straight line"), 1: ("in a curve to the left", "turning left", "and turns left"),
         -1: ("in a curve to the right", "turning right", "and turns right")}  # fmt: skip
_SIDED = {"wave": "with the {} hand", "kick": "with the {} foot", "punch": "with the {} hand first"}
_THEN = (", then ", " and then ", " then ", ", and after that ")


def sentence(script: Script, rng: np.random.Generator) -> str:
    """One way to say it."""

    def pick(words: tuple[str, ...]) -> str:
        return words[rng.integers(len(words))]

    parts = []
    if script.gait:
        parts.append(" ".join(x for x in (pick(_VERBS[script.gait]), pick(_PACE[script.speed]),
                                          pick(_TURN[script.turn])) if x))  # fmt: skip
    if script.action:
        words = [pick(_VERBS[script.action])]
        if script.action in _SIDED and rng.random() < 0.5:
            words.append(_SIDED[script.action].format(("left", "right")[script.side]))
        if not script.gait:
            words.append(pick(_PACE[script.speed]))
        parts.append(" ".join(x for x in words if x))
    return f"{pick(_WHO)} {pick(_THEN).join(parts)}"


def is_held_out(text: str) -> bool:
    return zlib.crc32(text.encode()) % HELD_OUT == 0


def said(script: Script, rng: np.random.Generator, held_out: bool = False) -> str:
    """A sentence that is trained on, or one that is not."""
    while True:
        text = sentence(script, rng)
        if is_held_out(text) == held_out:
            return text


@dataclass(frozen=True)
class Clip:
    script: Script
    text: str
    features: np.ndarray  # [T, 263] fp32


def clips(count: int, seed: int = 0, held_out: bool = False) -> list[Clip]:
    """Clips of whole tokens' lengths, 40 to 196 frames."""
    rng, out = np.random.default_rng(seed), []
    for _ in range(count):
        script = draw_script(rng)
        # What takes two parts takes longer; nobody walks out of sight.
        shortest, longest = (80, LONGEST) if script.gait and script.action else (SHORTEST, 128)
        frames = 4 * int(rng.integers(shortest // 4, longest // 4 + 1))
        features = features_of(joints_of(script, frames + 1, rng))
        out.append(Clip(script, said(script, rng, held_out), features))
    return out


def held_out(n: int = 100, seed: int = 12345) -> list[Clip]:
    """Prompts that training never sees, each with a motion that fits it."""
    return clips(n, seed, held_out=True)
