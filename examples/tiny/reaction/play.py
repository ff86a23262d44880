"""Plays the reaction task with sync, async and FASTER, the same checkpoint in all three; prints a table, draws a film.

./run demo faster [--model pi05-tiny xvla-tiny] [--episodes 20] [--film 4] [--out FILE.gif]

The inference clock is simulated (an RTX 4060 as the paper measured it), the policy is not.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[3]))

import reaction_episodes as episodes
import reaction_task as task

import engine
from engine.blocks.policy import FlowPolicy

ROOT = Path(__file__).resolve().parents[3]
ZOOM = 3


def table(name: str, model: FlowPolicy, flights: list[task.Balls], seed: int) -> dict[str, list[episodes.Episode]]:
    """Plays every flight in every mode and prints a line for each."""
    ask = episodes.policy(model)
    won = sum(episodes.oracle(f).won for f in flights)
    print(f"{name}: {len(flights)} balls, {model.schedule}")
    print(f"{'mode':<8}{'caught':>14}{'95 % interval':>18}{'TTFA':>9}{'d':>4}{'s':>4}{'reaction':>11}{'(model)':>10}")
    out = {}
    for mode in episodes.RTX4060[name]:
        begun = time.perf_counter()
        played = [episodes.play(ask, model.schedule, mode, f, seed + i) for i, f in enumerate(flights)]
        spent = (time.perf_counter() - begun) / sum(e.requests for e in played) * 1e3
        caught, n = sum(e.won for e in played), len(played)
        low, high = episodes.wilson(caught, n)
        reactions = [e.reaction for e in played if np.isfinite(e.reaction)]
        mean = np.mean(reactions) if reactions else np.inf
        print(f"{mode.name:<8}{f'{caught}/{n} = {caught / n:.0%}':>14}{f'{low:.0%} to {high:.0%}':>18}"
              f"{mode.first:>6.1f} ms{mode.delay:>4}{episodes.executed(model.schedule, mode):>4}{mean:>8.0f} ms"
              f"{mode.reaction.mean:>7.0f} ms   ({spent:.1f} ms a request on this machine)", flush=True)  # fmt: skip
        out[mode.name] = played
    print(f"{'oracle':<8}{f'{won}/{len(flights)} = {won / len(flights):.0%}':>14}   the expert without any latency\n")
    return out


def film(played: dict[str, list[episodes.Episode]], flights: list[task.Balls], count: int, path: Path) -> None:
    """The first `count` episodes, the modes side by side, as an animated GIF of 15 frames a second."""
    try:
        from PIL import Image, ImageDraw
    except ImportError:
        print("no film: it needs Pillow (pip install 'quintet-engine[robot]')")
        return
    side, head = ZOOM * task.SIZE, 34
    frames, caught = [], dict.fromkeys(played, 0)
    for i, flight in enumerate(flights[:count]):
        ticks = len(played["sync"][i].track)
        for tick in [*range(0, ticks, 2), *[ticks - 1] * 8]:
            canvas = Image.new("RGB", (len(played) * (side + 6) - 6, head + 2 * side + 4), "white")
            pen = ImageDraw.Draw(canvas)
            for column, (name, all_of_them) in enumerate(played.items()):
                e, left = all_of_them[i], column * (side + 6)
                paddle = e.track[tick][None]
                views = task.render(flight, np.array([min(float(tick), float(flight.arrival[0]))]), paddle)[0]
                for row, view in enumerate(views):
                    image = Image.fromarray(view).resize((side, side), Image.Resampling.NEAREST)
                    canvas.paste(image, (left, head + row * (side + 4)))
                over = tick == ticks - 1
                word = ("caught" if e.won else "missed") if over else ("" if tick < flight.turn[0] else "it turned")
                colour = {"caught": "green", "missed": "red"}.get(word, "black")
                pen.text((left + 4, 2), f"{name}   {caught[name] + (over and e.won)}/{i + over}", fill="black")
                pen.text((left + 4, 17), word, fill=colour)
            frames.append(canvas.quantize(64))
        for name in played:
            caught[name] += played[name][i].won
    path.parent.mkdir(parents=True, exist_ok=True)
    frames[0].save(path, save_all=True, append_images=frames[1:], duration=66, loop=0)
    print(f"film: {path} ({path.stat().st_size / 1e6:.1f} MB, {len(frames)} frames; above: from the top, below: side)")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", nargs="+", default=sorted(episodes.RTX4060), choices=sorted(episodes.RTX4060))
    parser.add_argument("--episodes", type=int, default=100)
    parser.add_argument("--film", type=int, default=4, help="episodes in the film, 0 for none")
    parser.add_argument("--out", type=Path, help="of the film (default: .cache/demo/faster-<model>.gif)")
    parser.add_argument("--seed", type=int, default=3)
    args = parser.parse_args()
    flights = episodes.flights(max(args.episodes, 1), args.seed)
    for name in args.model:
        with engine.load(name, progress=False) as model:
            assert isinstance(model, FlowPolicy)
            model.warmup()
            played = table(name, model, flights, args.seed)
        if args.film > 0:
            default = ROOT / ".cache/demo" / f"faster-{name}.gif"
            film(played, flights, min(args.film, len(flights)), args.out or default)


if __name__ == "__main__":
    main()
