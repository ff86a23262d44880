"""From states of prompts and latents of references to a clean latent: what is kept between requests, and the steps."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import numpy as np

from engine.blocks.lru import Lru, digest
from engine.errors import InputError
from engine.models.dreambooth3d.dit import Denoiser, Shape
from engine.models.dreambooth3d.dit_weights import TimeTables
from engine.models.dreambooth3d.parallel import Share
from engine.runtime.plan import Plan, capture

TEXT_CACHE = 1 << 30  # bytes of refined tokens


def _name(kind: str, shape: Shape, share: Share | None) -> str:
    """Of a step's plan."""
    return f"{kind}.{shape.name}" + ("" if share is None else f".branch{share.branch}")


class Sampler:
    """Requests to a Denoiser, one after another. All arrays f32.

    plans: where the plans are kept, by name: those of texts now, those of a shape when it is first asked for.
    """

    def __init__(self, denoiser: Denoiser, tables: TimeTables, plans: dict[str, Plan]) -> None:
        self._d, self._tables, self._plans = denoiser, tables, plans
        self._texts = Lru[np.ndarray](TEXT_CACHE)
        self._sigmas = np.zeros(0)
        self._views = np.zeros((0, denoiser.c.channels), np.float32)
        self._placed: tuple[Shape, str] | None = None  # the shape, and what has run of its references
        for name, step in denoiser.text_steps().items():
            plans[name] = capture(step, name)

    # ------------------------------------------------------------------------------------------ texts
    def tokens(self, sigmas: np.ndarray, states: np.ndarray, glyphs: np.ndarray | None = None) -> np.ndarray:
        """[steps, n, D]: states [n, text_dim] of a prompt refined for each step, behind the tokens of quoted texts'
        glyphs [m, glyph_dim].

        Raises: InputError for no states, and for more tokens than there is room for.
        """
        d, quoted = self._d, 0 if glyphs is None else len(glyphs)
        n = len(states)
        if not n or n + quoted > d.text:
            raise InputError(f"a prompt of {n + quoted} tokens; this load has room for 1 to {d.text} (text= at load)")
        key = digest(*(np.ascontiguousarray(x) for x in (sigmas, states, *(() if glyphs is None else (glyphs,)))))
        if (found := self._texts.get(key)) is not None:
            return found
        out = np.empty((len(sigmas) - 1, quoted + n, d.c.width), np.float32)
        if glyphs is not None and quoted:
            assert d.glyphs is not None
            d.glyphs.rows(0, quoted).write(glyphs)
            d.count.write(np.array([quoted], np.int32))
            self._plans["glyphs"].replay()
            out[:, :quoted] = d.refined.rows(0, quoted).host()
        d.states.rows(0, n).write(states)
        d.count.write(np.array([n], np.int32))
        self._plans["read"].replay()
        for i, gates in enumerate(self._tables.gates(sigmas[:-1], states)):
            d.place_gates(gates)
            self._plans["refine"].replay()
            out[i, quoted:] = d.refined.rows(0, n).host()
        self._texts.put(key, out, out.nbytes)
        return out

    # ------------------------------------------------------------------------------------------ steps
    def forget_subject(self) -> None:
        """The weights or the references have changed."""
        self._placed = None

    def place_views(self, views: np.ndarray) -> None:
        """Clean latents [references, cells, channels], in the order of their times."""
        self.forget_subject()
        self._views = np.ascontiguousarray(views.reshape(-1, views.shape[-1]), np.float32)

    def sample(
        self, shape: Shape, noise: np.ndarray, sigmas: np.ndarray, guidance: float, texts: list[np.ndarray], *,
        refresh: int = 1, one_way: bool = False, marked: Sequence[bool] = (), share: Share | None = None,
        computed: Sequence[bool] = (),
        each: Callable[[int, np.ndarray], bool] | None = None,
    ) -> np.ndarray | None:  # fmt: skip
        """The clean latent [video, channels] from noise of that shape; texts: tokens of each branch's prompt.

        refresh: the references run in every such step, and in the others keep their keys and values: an approximation
        beyond 1. one_way: the references see only themselves, and run once per subject: for adapters trained so.
        marked: which tokens of the last prompt are of a subject's name, where those have weights of their own.
        share: this process's, where another one runs the other branch.
        computed: which steps run; the others repeat the last one's velocity: an approximation. Default: all.
        each: called behind every step with its number and the latent; where it returns False, the rest is left out and
        the result is None.

        Raises: InputError (shapes that do not belong together, no room for what is to be kept).
        """
        d, steps = self._d, len(sigmas) - 1
        if refresh < 1 or noise.shape != (shape.video, d.c.channels) or any(len(t) != steps for t in texts):
            raise InputError(
                f"refresh={refresh}, noise {list(noise.shape)}, texts of {[len(t) for t in texts]} steps; at least 1, "
                f"[{shape.video}, {d.c.channels}] and {steps} steps are needed"
            )
        kept = bool(shape.shown) and (one_way or refresh > 1)
        if kept and d.kept < (1 if one_way else shape.branches):
            raise InputError(
                "references that are kept between steps need room for their keys and values: kept= at load"
            )
        if sum(marked) != shape.named or (marked and len(marked) != texts[-1].shape[1]):
            raise InputError(f"{sum(marked)} of {len(marked)} tokens are marked, where the shape has {shape.named}")
        order = np.argsort(~np.array(marked, bool), kind="stable")
        if computed and len(computed) != steps:
            raise InputError(f"{len(computed)} of {steps} steps are told whether they run")
        if share is not None and shape.branches != 2:
            raise InputError("two processes share the two branches of guidance, and this request has one")
        self._prepare(shape, sigmas, kept, one_way, share)
        d.place_moves(sigmas, guidance, shape.branches)
        for branch, tokens in zip(range(2 - shape.branches, 2), texts, strict=True):
            # Texts have no positions, so their order is free.
            d.place_text(branch, tokens[:, order] if branch and shape.named else tokens, shape)
        latent = d.latent.rows(0, shape.video)
        latent.write(noise)
        whole, short = (self._plans.get(_name(kind, shape, share)) for kind in ("step", "kept"))
        moves, velocity, ran = np.diff(sigmas).astype(np.float32), None, 0
        for i in range(steps):
            before = latent.read() if share is not None or computed else None
            if before is not None and velocity is not None and not computed[i]:
                latent.write(before + velocity * moves[i])
            else:
                d.place_step(i)
                plan = short if kept and (one_way or ran % refresh) else whole
                assert plan is not None
                plan.replay()
                ran += 1
                if before is not None and share is not None:
                    latent.write(before + share.summed(latent.read() - before))
                if before is not None and computed:
                    velocity = (latent.read() - before) / moves[i]
            wants = each is None or each(i, latent.read())
            if share is not None:  # both processes end together
                wants = share.summed(np.array([wants], np.float32))[0] == 2
            if not wants:
                return None
        return latent.read()

    def _prepare(self, shape: Shape, sigmas: np.ndarray, kept: bool, one_way: bool, share: Share | None) -> None:
        """Schedule, positions and plans of a request, where they differ from the last one's."""
        d = self._d
        d.fits(shape)
        if not np.array_equal(sigmas, self._sigmas):
            self._sigmas = np.zeros(0)
            d.place_schedule(len(sigmas) - 1, self._tables.modulations(sigmas[:-1]))
            self._sigmas = sigmas.copy()
        branch = None if share is None else share.branch
        wanted: dict[str, Callable[[], Callable[[], None]]] = {}
        if not (kept and one_way):
            wanted[_name("step", shape, share)] = partial(d.step, shape, branch=branch)
        if kept:
            wanted[_name("kept", shape, share)] = partial(d.step, shape, kept=True, branch=branch)
        first = ""  # the plan of the references alone
        if shape.shown and one_way and kept:
            first, wanted[f"alone.{shape.name}"] = "alone", partial(d.keep_views, shape, alone=True)
        elif shape.shown and d.savings.shared:
            first, wanted[f"views.{shape.name}"] = "views", partial(d.keep_views, shape)
        for name, make in wanted.items():
            if name not in self._plans:
                self._plans[name] = capture(make(), name)
        if (shape, first) != self._placed:
            self._placed = None
            d.place_shape(shape)
            if shape.shown:
                chosen = slice(None) if shape.seen is None else list(shape.seen)
                d.views.rows(0, shape.shown).write(self._views[: shape.views * shape.cells][chosen])
            if first:
                self._plans[f"{first}.{shape.name}"].replay()
            self._placed = (shape, first)
