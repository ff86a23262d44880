"""Makes clips of solids and trains dreambooth3d-tiny on them: about 25 minutes on two cores, everything from one seed.

./run train dreambooth3d [--out FOLDER] [--share 1.0]

Each part is kept under build/ when it is done, so that a run that was stopped goes on behind its last part. What is
kept belongs to the arguments, not to the code: delete it when the code changes.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[3]))

from autoencoder import VAE, encoded, psnr, train_vae
from checkpoint import write
from clips import MOTIONS, caption, clip, draw
from flow import Lessons, train_base, train_views
from solids import VIEWS
from vocabulary import states, tokenizer, train_language

from examples.tiny.fitting import Weights, kept

ROOT = Path(__file__).resolve().parents[3]
SOLIDS = 1500


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "engine/zoo/dreambooth3d-tiny")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--share", type=float, default=1.0, help="of the steps and of the solids: to try things out")
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    start = time.perf_counter()

    def said(what: str) -> None:
        print(f"[{time.perf_counter() - start:.0f} s] {what}", flush=True)

    def share(n: int) -> int:
        return max(2, round(args.share * n))

    shown = [draw(args.seed, i) for i in range(share(SOLIDS))]
    rng = np.random.default_rng([args.seed, 2])
    ways = rng.integers(2, 4, len(shown))
    views = np.stack([s.views for s in shown])
    moves = np.stack([clip(s, MOTIONS[way], int(rng.integers(VIEWS))) for s, way in zip(shown, ways)])
    said(f"{len(shown)} solids")

    tok = tokenizer()
    work = ROOT / f"build/train-dreambooth3d-{args.seed}-{args.share}"
    work.mkdir(parents=True, exist_ok=True)

    def part(name: str, make: Callable[[], Weights]) -> Weights:
        return kept(work, name, lambda: (make(), {}))[0]

    language = part("language", lambda: train_language(tok, share(300), args.seed))
    vae = part("vae", lambda: train_vae(views.reshape(-1, *views.shape[2:]), share(2400), args.seed))
    said(f"VAE: {psnr(vae, VAE, np.concatenate([draw(args.seed, i, held_out=True).views for i in range(8)])):.1f} dB")

    def latents(pictures: np.ndarray) -> torch.Tensor:
        return encoded(vae, VAE, pictures.reshape(-1, *pictures.shape[2:])).unflatten(0, pictures.shape[:2])

    found = [latents(p) for p in (views, moves)]
    scaling = 1 / float(found[0].std())
    said("latents")

    def told(motion: str | None, colours: bool) -> torch.Tensor:
        texts = [caption(s.solid, motion, colours) for s in shown]
        each = sorted(set(texts))
        known = dict(zip(each, states(language, tok, each, "image" if motion is None else "video")))
        return torch.stack([known[t] for t in texts])

    lessons = Lessons(
        found[0] * scaling, found[1] * scaling, torch.from_numpy(ways),
        {colours: torch.stack([told(m, colours) for m in MOTIONS], 1) for colours in (False, True)},
        {colours: told(None, colours) for colours in (False, True)},
        {kind: states(language, tok, [""], kind)[0] for kind in ("video", "image")},
    )  # fmt: skip
    dit = part("transformer", lambda: train_base(lessons, share(1600), args.seed))
    adapter = part("views", lambda: train_views(dit, lessons, share(700), args.seed))

    write(args.out, dit, vae, scaling, adapter, language, tok)
    shutil.rmtree(work)
    size = sum(f.stat().st_size for f in args.out.rglob("*") if f.is_file())
    said(f"{args.out}: {size / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
