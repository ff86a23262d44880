"""One of two processes that share guidance's branches: `python _half.py RANK STORE BASE SUBJECT OUT`."""

from __future__ import annotations

import sys
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch.distributed as dist
from _dreambooth import FRAMES, SIZE, picture

import engine
from engine.errors import CancelledError
from engine.models.dreambooth3d.video import Video


def main(rank: int, store: str, base: str, trained: str, out: Path) -> None:
    patience = timedelta(seconds=60)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2, timeout=patience)
    m = engine.load(base, dtype="fp32", frames=FRAMES, size=SIZE, steps=6, text=192, tile=64, overlap=0.25, keep=2,
                    progress=False)  # fmt: skip
    subject = m.subject(trained, [picture(0)])
    made = {}
    for name, options in (("plain", {}), ("refresh", {"refresh": 2}), ("one_way", {"one_way": True})):
        video = m.generate("A [rhs mug]", subject, frames=FRAMES, size=SIZE, steps=3, parallel="guidance", **options)
        assert isinstance(video, Video)
        made[name] = video.latent
    try:  # one of the two ends it
        m.generate("A [rhs mug]", subject, frames=FRAMES, size=SIZE, steps=3, parallel="guidance",
                   callback=lambda i, n, x: not (rank == 1 and i == 1))  # fmt: skip
    except CancelledError:
        made["ended"] = np.ones(1, np.float32)
    assert sum(name.endswith(f".branch{rank}") for name in m.plans) == 2  # each process has its own branch's alone
    np.savez(out, **made)  # type: ignore[arg-type]
    dist.barrier()
    dist.destroy_process_group()  # its threads would end the process with an abort otherwise, now and then


if __name__ == "__main__":
    main(int(sys.argv[1]), *sys.argv[2:5], Path(sys.argv[5]))
