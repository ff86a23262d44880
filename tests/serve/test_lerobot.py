"""lerobot-shaped methods and the websocket server over a real policy."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "models"))

from _faster import small_folder, small_pi05  # noqa: E402

from engine.errors import InputError  # noqa: E402
from engine.serve.lerobot import LerobotPolicy  # noqa: E402


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """The small pi0.5, for one sample and for two at once."""
    from _flow_engine import load

    reference = small_pi05(3)
    folder = small_folder(tmp_path_factory.mktemp("pi05"), reference)
    return [load("pi05", folder, batch=b) for b in (1, 2)]


def batch(model, count: int = 2) -> dict:
    r, profile = np.random.default_rng(0), model.profile_of_inputs
    images = {v.key: r.integers(0, 256, (count, 20, 20, 3), dtype=np.uint8) for v in profile.views}
    return images | {
        "observation.state": r.uniform(-1, 1, (count, 5)).astype(np.float32),
        "observation.language.tokens": r.integers(0, 31, (count, 9)),
        "observation.language.attention_mask": np.arange(9) < np.array([[9], [6]])[:count],
    }


def test_chunks_and_actions(models) -> None:
    one, two = (LerobotPolicy(m) for m in models)
    h, a = models[0].flow.sizes[2:]
    given, noise = batch(models[0]), np.random.default_rng(1).standard_normal((2, h, a)).astype(np.float32)
    apart, together = one.predict_action_chunk(given, noise), two.predict_action_chunk(given, noise)
    assert apart.shape == (2, h, models[0].options.dims)
    assert np.abs(apart - together).max() <= 1e-5 * np.abs(apart).max()
    few = LerobotPolicy(models[1], n_action_steps=2)
    first, second = few.select_action(given, noise), few.select_action(given)
    assert np.array_equal(np.stack([first, second], 1), together[:, :2])
    few.select_action(given, noise)
    few.reset()
    assert np.array_equal(few.select_action(given, noise), first)


def test_torch_in_torch_out(models) -> None:
    policy, given = LerobotPolicy(models[1]), batch(models[1])
    noise = np.zeros((2, *models[1].flow.sizes[2:]), np.float32)
    want = policy.predict_action_chunk(given, noise)
    got = policy.predict_action_chunk({k: torch.from_numpy(np.asarray(v)) for k, v in given.items()}, noise)
    assert isinstance(got, torch.Tensor)
    assert np.array_equal(got.numpy(), want)


def test_bad_batches(models) -> None:
    policy, given = LerobotPolicy(models[0]), batch(models[0])
    with pytest.raises(InputError, match="n_action_steps=0"):
        LerobotPolicy(models[0], n_action_steps=0)
    with pytest.raises(InputError, match="of one length"):
        policy.predict_action_chunk(given | {"observation.state": np.zeros((1, 5))})
    with pytest.raises(InputError, match="3 tasks"):
        policy.predict_action_chunk(given | {"task": ["a", "b", "c"]})
    with pytest.raises(InputError, match="noise is for 1"):
        policy.predict_action_chunk(given, np.zeros((1, *models[0].flow.sizes[2:])))


def test_committed_actions_are_in_the_chunk(models) -> None:
    """Not zeros, which a robot might execute."""
    policy, given = LerobotPolicy(models[1]), batch(models[1])
    prefix = np.random.default_rng(2).uniform(-1, 1, (2, 1, models[1].options.dims)).astype(np.float32)
    late = given | {"delay": np.ones(2, np.int64), "action_prefix": prefix}
    chunk = policy.predict_action_chunk(late)
    assert np.array_equal(chunk[:, :1], prefix)
    with pytest.raises(InputError, match="predict_action_chunk"):
        policy.select_action(late)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--host", "0.0.0.0"], "reachable from outside"),
        (["--stream", "maybe"], "stream='maybe'"),
        (["nemotron-tiny"], "is not for nemotron-tiny, a Nemotron"),
    ],
)
def test_the_command_refuses_before_it_loads(monkeypatch, capsys, arguments, message) -> None:
    pytest.importorskip("websockets")
    import engine
    from engine import cli

    monkeypatch.setattr(engine, "load", lambda *_, **__: pytest.fail("loaded"))
    monkeypatch.setattr("sys.argv", ["engine", "serve", *arguments])
    with pytest.raises(SystemExit) as end:
        cli.main()
    assert end.value.code == 2 and message in capsys.readouterr().err


def test_served(models) -> None:
    """The stream that arrives is the stream that the model gives."""
    pytest.importorskip("websockets")
    from engine.serve.client import PolicyClient
    from engine.serve.server import PolicyServer

    model, given = models[0], batch(models[0], 1)
    obs = {k: v[0] for k, v in given.items() if "language" not in k} | {
        "tokens": given["observation.language.tokens"][0]
    }
    with PolicyServer(model, port=0) as server, PolicyClient(server.uri) as client:
        model.seed(5)
        packets = list(client.stream(obs))
        model.seed(5)
        want = model.act(obs)
        assert np.array_equal(np.concatenate([p.actions for p in packets if len(p.indices)]), want.actions)
        answer = client.infer(obs)
        assert answer["actions"].shape == want.actions.shape
        assert {"first_ms", "vision_ms", "infer_ms"} <= set(answer["policy_timing"])
        assert not any(k.endswith("_ms_ms") for k in answer["policy_timing"])
        assert set(want.timing) <= set(packets[-1].chunk.timing)
        assert len(list(client.stream(obs, actions=2))[-1].chunk.actions) == model.horizon
