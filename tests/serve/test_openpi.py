"""openpi's published client, in an environment of its own, against this server."""

from __future__ import annotations

import json
import logging
import os
import subprocess
from pathlib import Path

import numpy as np
import pytest
from fakes import DIMS, HORIZON, FakePolicy

from engine.blocks.observation import ImageRule
from engine.serve.server import PolicyServer
from engine.serve.wire import decode, encode

pytestmark = [pytest.mark.peer, pytest.mark.timeout(120)]
ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def seen():
    pytest.importorskip("websockets")
    python = Path(os.environ.get("QUINTET_PEER_OPENPI", ROOT / ".venvs/openpi/bin/python"))
    if not python.is_file():
        pytest.fail(f"no peer environment at {python}: run `./run peers`, or set QUINTET_PEER_OPENPI")
    logging.getLogger("engine.serve.server").setLevel(logging.CRITICAL)
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    policy = FakePolicy()
    with PolicyServer(policy, port=0, token="s3cret", metadata={"horizon": HORIZON}) as server:
        command = [str(python), str(ROOT / "tests/peers/openpi_robot.py"), server.uri, "s3cret"]
        done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False, timeout=100)
    if done.returncode:
        pytest.fail(f"the client failed:\n{done.stderr[-3000:]}")
    return json.loads(done.stdout), policy


def test_plain_answers(seen):
    answer, policy = seen
    assert answer["metadata"] == {"horizon": HORIZON} and answer["dtype"] == "float32"
    assert np.shape(answer["actions"]) == (HORIZON, DIMS) and all(answer["valid"])
    assert "infer_ms" in answer["timings"]
    obs = policy.calls[0]
    assert obs["images"]["cam_high"].shape == (3, 60, 80) and obs["images"]["cam_high"].dtype == np.uint8
    assert (obs["state"] == np.linspace(-1, 1, 14)).all() and obs["gripper"] == np.float32(0.5)


def test_errors_reach_it(seen):
    assert "InputError: no camera image" in seen[0]["error"]


def test_its_bytes_are_ours(seen):
    sent = bytes.fromhex(seen[0]["sent"])
    assert encode(decode(sent)) == sent


def test_its_resize_is_ours(seen):
    pytest.importorskip("PIL")
    image = np.arange(60 * 80 * 3, dtype=np.uint32).astype(np.uint8).reshape(60, 80, 3)
    ours = ImageRule("pad-pil", (32, 32)).shape(image)
    assert (ours == np.array(seen[0]["pixels"])).all()


def test_the_chunk_broker(seen):
    assert [a[1] for a in seen[0]["broker"]] == [0, 1, 2, 0], seen[0]["broker"]
