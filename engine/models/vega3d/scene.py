"""A scene that a model has looked at: questions, captions and grounding of boxes, by the published prompts.

Variant A answers as ScanQA and SQA3D ask, variant B as VSI-Bench does.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from engine.blocks.language import Generation, TextStream
from engine.blocks.scene import Frames, check_boxes
from engine.errors import InputError, TokenizerError
from engine.io.text import StopScanner
from engine.models.vega3d.config import MASS, TEMPERATURE, SceneConfig, SpatialConfig

if TYPE_CHECKING:
    from engine.models.vega3d.model import Vega3D

MAX_ANSWER = 512
VISION = ("<|vision_start|>", "<|vision_end|>")
SYSTEM = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
INSTRUCTION = (
    "The video captures 3D spatial information of a scene. Please focus on the spatial relationships in the video and "
    "answer the following questions.\n"
)
SHORT_ANSWER = 16  # tokens, of VSI-Bench
#: What follows the frames, by task.
TASKS = {
    "scanqa": " {question} Answer the question simply.",
    "sqa3d": " {situation} {question} Answer the question using a single word or phrase.",
    "plain": " {question}",
    "scan2cap": " Given an object located at <coord> , describe the object in detail.",
    "scanrefer": "Identify the object according to the following description.\n{description}",
    "multi3drefer": "Identify the object according to the following description.\n{description}\n"
    "There may be no corresponding object, or there may be one or more objects.",
    "vsi": "These are frames of a video.\n{question}\nPlease answer the question using a single word or phrase.",
    "vsi_choices": "These are frames of a video.\n{question}\nOptions:\n{choices}\n"
    "Answer with the option's letter from the given choices directly.",
}


class ScenePrompt(list[int]):
    """Ids of a prompt with a scene in it; `place` [3] is where `<coord>` stands for."""

    def __init__(self, ids: list[int], scene: Scene, place: np.ndarray | None = None) -> None:
        super().__init__(ids)
        self.scene, self.place = scene, place


@dataclass
class Seen:
    """What a model keeps of frames: embeddings [rows, D] as the model stores them, the gate of each token [T, n, n] (1:
    semantic), and for grounding SigLIP's tokens by pass."""

    rows: np.ndarray
    gates: np.ndarray
    tokens: list[np.ndarray]

    @property
    def nbytes(self) -> int:
        return self.rows.nbytes + self.gates.nbytes + sum(t.nbytes for t in self.tokens)


@dataclass
class Grounding:
    """index: of the best proposal, box: itself; scores f64 [K]: cosines; none: that of 'no such object'.

    empty: 'no such object' scored highest.
    """

    index: int
    box: np.ndarray
    scores: np.ndarray
    none: float
    empty: bool


@dataclass
class Groundings:
    """The boxes chosen, best first: indices [N], boxes [N, 6], their probabilities [N]; scores, none: as Grounding."""

    indices: np.ndarray
    boxes: np.ndarray
    probabilities: np.ndarray
    scores: np.ndarray
    none: float


@dataclass
class Scene:
    """Frames as a model sees them. `ask`, `stream`, `caption`, `ground`, `ground_multi`.

    frames: the ones taken, with their place in the source. pictures: as the towers got them, [T, S, S, 3] uint8.
    coords: world coordinates [T, S, S, 3] or None. coded: whether their codes are in the embeddings.
    """

    model: Vega3D
    key: str
    frames: Frames
    pictures: np.ndarray
    coords: np.ndarray | None
    coded: bool
    seen: Seen
    notes: list[str] = field(default_factory=list)
    _objects: tuple[bytes, np.ndarray] | None = None

    def __repr__(self) -> str:
        return f"<Scene of {len(self.pictures)} frames, {self.model.visual} visual tokens, {self.key[:8]}>"

    @property
    def gates(self) -> np.ndarray:
        """f32 [T, n, n]: the share of the semantic stream in each visual token."""
        return self.seen.gates

    # ------------------------------------------------------------------------------------------ prompts
    @staticmethod
    def layout(m: Vega3D) -> list[int]:
        """What every prompt about a scene begins with: the system's words and the frames.

        Pieces are tokenised one by one, as in the published evaluation.
        """
        first = m.vocab_size
        if isinstance(m.config, SceneConfig):
            return [*_ids(m, SYSTEM, "<|im_start|>user", "\n"), *range(first, first + m.visual)]
        out, (start, end) = _ids(m, SYSTEM, "<|im_start|>user\n"), (_ids(m, t) for t in VISION)
        for f in range(m.frames):
            out += [*start, *range(first + f * m.config.cells, first + (f + 1) * m.config.cells), *end]
        return out

    def prompt(self, text: str | None = None, place: np.ndarray | None = None, ground: bool = False) -> ScenePrompt:
        """Ids of the chat with `text` behind the frames; without a text, what every prompt begins with."""
        m, ids = self.model, self.layout(self.model)
        if text is not None:
            scene = isinstance(m.config, SceneConfig)
            body = _ids(m, *("\n",) * scene, text, "<|im_end|>\n", "<|im_start|>assistant\n")
            if place is not None:
                assert isinstance(m.config, SceneConfig)
                body = [m.place_id if i == m.config.coord else i for i in body]
            ids += body
        if ground:
            assert isinstance(m.config, SceneConfig) and m.config.ground is not None
            ids.append(m.config.ground)
        m._fits(len(ids))
        return ScenePrompt(ids, self, place)

    def _question(
        self, question: str, situation: str | None = None, task: str | None = None, instruction: bool = False,
        choices: Sequence[str] | None = None,
    ) -> ScenePrompt:  # fmt: skip
        for name, value in (("question", question), ("situation", situation or "-")):
            if not isinstance(value, str) or not value.strip():
                raise InputError(f"{name}={value!r} is not a text with words in it")
        known: tuple[str, ...]
        if isinstance(self.model.config, SceneConfig):
            known, default = ("scanqa", "sqa3d", "plain"), "sqa3d" if situation else "scanqa"
            if choices is not None:
                raise InputError("choices= is for Qwen2.5-VL; put them into the question")
        else:
            known, default = ("vsi", "plain"), "vsi"
            if situation or instruction:
                raise InputError("situation= and instruction= are for variant A; put them into the question")
        task = default if task is None else task
        if task not in known:
            raise InputError(f"task={task!r} is not one of {', '.join(map(repr, known))}")
        if (task == "sqa3d") != bool(situation):
            raise InputError(f"task {task!r} and situation={situation!r} do not go together; 'sqa3d' takes a situation")
        if choices is not None:
            if isinstance(choices, str) or not 2 <= len(choices) <= 26 or not all(isinstance(t, str) for t in choices):
                raise InputError(f"choices={choices!r} are not 2 to 26 texts")
            if task != "vsi":
                raise InputError(f"choices= goes with task 'vsi', not {task!r}")
            lettered = "\n".join(f"{chr(65 + i)}. {t}" for i, t in enumerate(choices))
            return self.prompt(TASKS["vsi_choices"].format(question=question, choices=lettered))
        text = TASKS[task].format(question=question, situation=situation)
        if default == "vsi" and task == "plain":
            text = question  # no space stands between frames and text
        return self.prompt(INSTRUCTION + text if instruction else text)

    # ------------------------------------------------------------------------------------------ verbs
    def stream(
        self, question: str, *, situation: str | None = None, task: str | None = None, instruction: bool = False,
        choices: Sequence[str] | None = None, max_new_tokens: int | None = None, stop: Any = (), **sampling: float,
    ) -> TextStream:  # fmt: skip
        """Events of an answer as they come; greedy unless temperature is given.

        Variant A: situation: where the asker stands (SQA3D). task: 'scanqa' (a simple answer; default), 'sqa3d' (a word
        or phrase; default with a situation) or 'plain' (the question alone). instruction: the sentence that training
        put in front. Variant B: task 'vsi' (VSI-Bench, default) or 'plain'; choices: of an answer by letter.
        max_new_tokens: default 512, of 'vsi' 16, or what the context has room for. sampling: see LanguageModel.stream.
        Raises: InputError, ContextError, TokenizerError before any work.
        """
        prompt = self._question(question, situation, task, instruction, choices)
        if max_new_tokens is None and isinstance(self.model.config, SpatialConfig) and task != "plain":
            max_new_tokens = min(SHORT_ANSWER, self.model.context - len(prompt))
        return self._stream(prompt, max_new_tokens, stop, sampling)

    def _stream(self, prompt: ScenePrompt, most: int | None, stop: Any, sampling: dict[str, Any]) -> TextStream:
        options = self.model._options(stop, sampling)
        if most is None:
            most = min(MAX_ANSWER, self.model.context - len(prompt))
        return self.model._streamed(prompt, most, options, StopScanner(options.stop))

    def ask(self, question: str, **options: Any) -> Generation:
        """The answer to a question; arguments as `stream`. Only the question's own tokens are prefilled."""
        return _stripped(self.stream(question, **options).finish())

    def caption(
        self, box: Any, *, max_new_tokens: int | None = None, stop: Any = (), **sampling: float
    ) -> Generation:  # fmt: skip
        """Describes what is in a box (cx, cy, cz, sx, sy, sz), metres in the scene's world (Scan2Cap)."""
        one = check_boxes(box, "box", least=1, limit=1)
        c = self._with_places("caption")
        if c.coord is None:
            raise InputError(f"model {self.model.name!r} has no <coord> token (coord_token_ids): it cannot caption")
        _near(c, one, "box")
        return _stripped(
            self._stream(self.prompt(TASKS["scan2cap"], one[0, :3]), max_new_tokens, stop, sampling).finish()
        )

    def ground(self, description: str, proposals: Any) -> Grounding:
        """Which of the proposals [K, 6] a description means (ScanRefer)."""
        boxes, scores = self._score("scanrefer", description, proposals)
        best = int(scores[:-1].argmax())
        return Grounding(best, boxes[best], scores[:-1], float(scores[-1]), bool(scores.argmax() == len(boxes)))

    def ground_multi(self, description: str, proposals: Any, *, threshold: float = MASS) -> Groundings:
        """All of the proposals [K, 6] that a description means, maybe none (Multi3DRefer).

        The most probable ones until their probabilities reach `threshold` together.
        """
        if isinstance(threshold, bool) or not isinstance(threshold, int | float) or not 0 < threshold <= 1:
            raise InputError(f"threshold={threshold!r} is not in (0, 1]")
        boxes, scores = self._score("multi3drefer", description, proposals)
        p = np.exp((scores - scores.max()) / TEMPERATURE)
        p /= p.sum()
        order = np.argsort(-p[:-1], kind="stable")
        count = int(np.searchsorted(np.cumsum(p[order]), threshold)) + 1
        chosen = order[: 0 if scores.argmax() == len(boxes) else count]
        return Groundings(chosen, boxes[chosen], p[chosen], scores[:-1], float(scores[-1]))

    # ------------------------------------------------------------------------------------------ boxes
    def _score(self, task: str, description: str, proposals: Any) -> tuple[np.ndarray, np.ndarray]:
        boxes = check_boxes(proposals, "proposals", least=1)
        c = self._with_places("ground")
        if not c.grounding or c.ground is None:
            raise InputError(f"model {self.model.name!r} has no grounding heads (ground_head_*) or no <ground> token")
        if not isinstance(description, str) or not description.strip():
            raise InputError(f"description={description!r} is not a text with words in it")
        _near(c, boxes, "proposals")
        prompt = self.prompt(TASKS[task].format(description=description.capitalize()), ground=True)
        return boxes, self.model._scores(self, prompt, boxes)

    def objects(self, boxes: np.ndarray) -> np.ndarray:
        """f32 [K, D] of boxes; those of the last call are kept, for many descriptions are asked of the same boxes."""
        key = boxes.tobytes()
        if self._objects is None or self._objects[0] != key:
            self._objects = key, self.model._objects_of(self, boxes)
        return self._objects[1]

    def _with_places(self, verb: str) -> SceneConfig:
        c = self.model.config
        if not isinstance(c, SceneConfig):
            raise InputError(f"{verb} is of variant A; this model sees pictures alone and knows no places")
        if self.coords is None:
            raise InputError(f"{verb} needs world coordinates; give depth, intrinsics and poses to scene()")
        return c


def _near(c: SceneConfig, boxes: np.ndarray, what: str) -> None:
    """Boxes must lie where voxels are counted."""
    v = c.voxels
    bad = np.flatnonzero(~((boxes[:, :3] >= v.low) & (boxes[:, :3] <= v.high)).all(1))
    if len(bad):
        raise InputError(
            f"{what}[{bad[0]}] has its centre at {boxes[bad[0], :3].tolist()} m, outside {v.low} to {v.high}: are "
            "boxes and poses in one world (axis_align)?"
        )


def _ids(m: Vega3D, *pieces: str) -> list[int]:
    if m.tokenizer is None:
        raise TokenizerError(f"model {m.name!r} has no tokenizer.json; add the file to its folder")
    return [i for piece in pieces for i in m.tokenizer.encode(piece)]


def _stripped(g: Generation) -> Generation:
    text = g.text.strip()
    return replace(g, text=text, message=replace(g.message, content=text))
