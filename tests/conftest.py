from __future__ import annotations

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests"))
sys.path.append(str(ROOT))  # for bench/; behind an installed engine, which must win over the source tree


def pytest_configure(config):
    # Kernels and torch must not spin on the same cores while tests compare them.
    try:
        import torch

        torch.set_num_threads(1)
    except ImportError:
        pass
