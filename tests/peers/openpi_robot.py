"""Talks to a policy server with openpi's own client and prints what it saw as JSON.

Run by the interpreter of the peer environment (it knows nothing of `engine`):

    python tests/peers/openpi_robot.py ws://127.0.0.1:8000 [TOKEN]
"""

from __future__ import annotations

import json
import sys

import numpy as np
from openpi_client import action_chunk_broker, image_tools, msgpack_numpy
from openpi_client.websocket_client_policy import WebsocketClientPolicy


def main() -> None:
    uri, token = sys.argv[1], sys.argv[2] if len(sys.argv) > 2 else None
    policy = WebsocketClientPolicy(uri, api_key=token)
    image = np.arange(60 * 80 * 3, dtype=np.uint32).astype(np.uint8).reshape(60, 80, 3)
    obs = {
        "images": {"cam_high": image.transpose(2, 0, 1)},
        "state": np.linspace(-1, 1, 14),
        "gripper": np.float32(0.5),
        "prompt": "pick up the cup",
    }
    plain = policy.infer(obs)
    seen = {
        "numpy": np.__version__,
        "metadata": policy.get_server_metadata(),
        "actions": plain["actions"].tolist(),
        "dtype": str(plain["actions"].dtype),
        "valid": plain["valid"].tolist(),
        "timings": sorted(plain["policy_timing"]) + sorted(plain["server_timing"]),
        "sent": msgpack_numpy.packb(obs).hex(),
        "resized": image_tools.resize_with_pad(image, 224, 224).astype(int).sum().item(),
        "pixels": image_tools.resize_with_pad(image, 32, 32).tolist(),
    }
    # The chunk broker hands out a chunk action by action: what most robots of openpi run.
    broker = action_chunk_broker.ActionChunkBroker(WebsocketClientPolicy(uri, api_key=token), action_horizon=3)
    try:
        seen["broker"] = [broker.infer(obs)["actions"].tolist() for _ in range(4)]
    except Exception as fault:
        seen["broker"] = repr(fault)
    try:
        policy.infer({**obs, "fail": "input"})
    except RuntimeError as fault:
        seen["error"] = str(fault)
    print(json.dumps(seen))


if __name__ == "__main__":
    main()
