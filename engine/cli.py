"""The `engine` command: chat, generate, motion, video, personalize, explain, plan, serve, bench, demo."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

import engine
from engine.blocks.language import LanguageModel
from engine.errors import EngineError, InputError
from engine.io.hub import resolve
from engine.models import family_of
from engine.runtime.model import Model

app = typer.Typer(
    add_completion=False, no_args_is_help=True, help="Quintet: published models, each step one static plan."
)

Name = Annotated[str, typer.Argument(help="zoo name, folder in the published layout, or hub id")]
Quant = Annotated[str | None, typer.Option(help="int8 or int4, made at load")]
DType = Annotated[str, typer.Option(help="auto, float32 or bfloat16")]
Context = Annotated[int | None, typer.Option(help="tokens of KV cache")]
Strict = Annotated[bool, typer.Option(help="refuse slower implementations")]
Tokens = Annotated[int | None, typer.Option(help="new tokens at most")]
Temperature = Annotated[float, typer.Option(help="0 is greedy")]
Seed = Annotated[int, typer.Option()]


def _model(command: str, kind: type[Model], name: str, **options: Any) -> Any:
    """A loaded model of the kind that a command is for; options that nobody gave are left to it."""
    family = family_of(resolve(name))[1]
    if not issubclass(family, kind):
        about = (family.__doc__ or "").splitlines()[0]
        raise InputError(f"`engine {command}` is not for {name}, a {family.__name__}. {about}")
    return engine.load(name, **{k: v for k, v in options.items() if v is not None})


def _say(text: str, kind: str = "answer") -> None:
    """Reasoning is dimmed on a terminal."""
    dim = kind != "answer" and sys.stdout.isatty()
    sys.stdout.write(f"\033[2m{text}\033[0m" if dim else text)
    sys.stdout.flush()


def _speed(result: Any) -> str:
    t = result.timing
    if not t.steps:
        return f"{len(result.tokens)} token"
    return (f"{len(result.tokens)} tokens, {t.tokens_per_second:.0f} tokens/s, ms/token p50 {t.percentile(50):.3f} "
            f"p99 {t.percentile(99):.3f}, prompt {result.prompt_tokens} tokens ({result.reused_tokens} reused) "
            f"in {t.prefill * 1e3:.1f} ms")  # fmt: skip


def _turn(model: Any, messages: list[dict], **options: Any) -> Any:
    """Streams one assistant turn, thinking and answer apart; Ctrl-C ends the turn, not the program."""
    kind = None
    with model.stream(messages, **options) as stream:
        try:
            for event in stream:
                if event.kind != kind:
                    _say(
                        ("" if kind is None else "\n")
                        + {"reasoning": "thinking: ", "tool_call": "tool call: "}.get(event.kind, "answer:   "),
                        event.kind,
                    )
                    kind = event.kind
                text = event.text.replace("\n", "\n          ")
                _say(text, event.kind)
        except KeyboardInterrupt:
            _say(" [stopped]")
    _say("\n")
    return stream.result


@app.command()
def chat(
    name: Name = "nemotron-tiny", quant: Quant = None, dtype: DType = "auto", context: Context = None,
    thinking: bool = True, budget: Annotated[int | None, typer.Option(help="tokens of thinking at most")] = None,
    max_new_tokens: Tokens = None, temperature: Temperature = 0.0, top_p: float = 1.0, seed: Seed = 0,
) -> None:  # fmt: skip
    """Talk to a model. Ctrl-C stops an answer, an empty line or Ctrl-D ends."""
    model = _model("chat", LanguageModel, name, quant=quant, dtype=dtype, context=context)
    messages: list[dict] = []
    while True:
        try:
            text = input("you:      ").strip()
        except (EOFError, KeyboardInterrupt):
            break
        if not text:
            break
        messages.append({"role": "user", "content": text})
        result = _turn(model, messages, thinking=thinking, thinking_budget=budget if thinking else None,
                       max_new_tokens=max_new_tokens, temperature=temperature, top_p=top_p, seed=seed)  # fmt: skip
        print(f"          [{_speed(result)}]")
        messages.append(result.message.to_dict())
    print()


@app.command()
def generate(
    name: Name, prompt: Annotated[str, typer.Argument(help="text to continue; - reads standard input")],
    quant: Quant = None, dtype: DType = "auto", context: Context = None, max_new_tokens: Tokens = None,
    temperature: Temperature = 0.0, top_k: int = 0, top_p: float = 1.0, min_p: float = 0.0,
    repetition_penalty: float = 1.0, seed: Seed = 0, stop: Annotated[list[str] | None, typer.Option()] = None,
) -> None:  # fmt: skip
    """Continue a text."""
    model = _model("generate", LanguageModel, name, quant=quant, dtype=dtype, context=context)
    text = sys.stdin.read() if prompt == "-" else prompt
    sampling = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "min_p": min_p, "seed": seed}
    sampling["repetition_penalty"] = repetition_penalty
    with model.stream(text, max_new_tokens=max_new_tokens, stop=stop or (), **sampling) as stream:
        for event in stream:
            _say(event.text)
    print()
    print(f"[{_speed(stream.result)}]", file=sys.stderr)


@app.command()
def motion(
    text: Annotated[str, typer.Argument(help="what the person does; '' with --constraints alone")],
    out: Annotated[Path, typer.Option(help=".npy, .bvh, .glb, .gif or .mp4")] = Path("motion.bvh"),
    name: Annotated[str, typer.Option(help="zoo name, folder, or hub id")] = "motok-tiny",
    frames: Annotated[int | None, typer.Option(help="length at the model's frame rate")] = None,
    constraints: Annotated[Path | None, typer.Option(help="JSON file of waypoints")] = None,
    planner: Annotated[str | None, typer.Option(help="ddm or ar")] = None,
    solver: Annotated[str | None, typer.Option(help="lbfgs, lbfgs_last, gd or project")] = None,
    cfg: Annotated[float | None, typer.Option(help="scale of classifier-free guidance")] = None,
    quant: Quant = None, dtype: DType = "auto", seed: Seed = 0,
) -> None:  # fmt: skip
    """A motion for a text, waypoints, or both, saved by the suffix of --out."""
    from engine.blocks.motion import Constraints
    from engine.models.motok.model import MoTok

    model = _model("motion", MoTok, name, quant=quant, dtype=dtype)
    points = None if constraints is None else Constraints.read(constraints, model.skeleton)
    guidance = None if solver is None else {"solver": solver}
    made = model.generate(text, frames=frames, constraints=points, planner=planner, seed=seed, cfg=cfg,
                          guidance=guidance)  # fmt: skip
    print(made, *made.residuals, sep="\n")
    print("ms: " + ", ".join(f"{k} {v:.1f}" for k, v in made.stages.items()))
    print(f"written: {made.save(out)}")


References = Annotated[list[Path] | None, typer.Option("--reference", help="a view of the subject; give it again")]


@app.command()
def video(
    name: Name, prompt: Annotated[str, typer.Argument(help="with the subject's name in brackets: 'A [rhs mug] ...'")],
    subject: Annotated[Path | None, typer.Option(help="folder of the subject's adapters")] = None,
    reference: References = None,
    out: Annotated[Path, typer.Option(help=".mp4, .gif, or a new folder of frames")] = Path("video.mp4"),
    frames: Annotated[int | None, typer.Option(help="4n + 1")] = None, aspect: str | None = None,
    resolution: Annotated[str | None, typer.Option(help="480p or 720p")] = None,
    height: Annotated[int | None, typer.Option(help="pixels, with --width instead of --aspect")] = None,
    width: int | None = None, steps: int = 50, guidance: float = 6.0,
    text_lora: Annotated[str, typer.Option(help="off, all or span")] = "off",
    quant: Quant = None, dtype: DType = "auto", seed: Seed = 42,
) -> None:  # fmt: skip
    """A video of a prompt and of a subject, saved by the suffix of --out. Ctrl-C ends it."""
    from engine.models.dreambooth3d.model import DreamBooth3D

    if (height is None) != (width is None):
        raise InputError("--height and --width go together")
    size = None if height is None or width is None else (height, width)
    model = _model("video", DreamBooth3D, name, quant=quant, dtype=dtype, frames=frames, size=size, steps=steps,
                   views=len(reference or ()), spans=text_lora == "span")  # fmt: skip
    shown = model.subject(subject, reference or ()) if subject is not None or reference else None
    made = model.generate(prompt, shown, frames=frames, aspect=aspect, resolution=resolution, size=size, steps=steps,
                          guidance=guidance, seed=seed, text_lora=text_lora, progress=True)  # fmt: skip
    print(made)
    print("ms: " + ", ".join(f"{k} {v:.0f}" for k, v in made.stages.items()))
    print(f"written: {made.save(out)}")


@app.command()
def personalize(
    name: Name,
    photos: Annotated[Path, typer.Option(help="folder of photos from all around")],
    out: Annotated[Path, typer.Option(help="folder for checkpoints")],
    subject: Annotated[str, typer.Option(help="identifier and class, as prompts will name it")],
    reference: References = None, steps: int = 400, rank: int = 16, lr: float = 1e-4, side: int = 512,
    one_way: Annotated[bool, typer.Option(help="references that see only one another, kept between steps")] = False,
    resume: bool = False, dtype: DType = "auto", seed: Seed = 42,
) -> None:  # fmt: skip
    """A subject's adapters from its photos, beside four of them where no references are given; an interrupted run goes
    on with --resume."""
    from engine.blocks.scene.frames import IMAGES
    from engine.models.dreambooth3d.model import DreamBooth3D

    files = sorted(p for p in photos.iterdir() if p.suffix.lower() in IMAGES) if photos.is_dir() else []
    if not files:
        raise InputError(f"{photos} is no folder of pictures ({', '.join(sorted(IMAGES))})")
    chosen = reference or files[:: max(1, len(files) // 4)][:4]
    print("references: " + ", ".join(str(p) for p in chosen))
    model = _model("personalize", DreamBooth3D, name, dtype=dtype, frames=1, size=(side, side), views=0, steps=1)

    def told(done: int, loss: float) -> None:
        print(f"\rstep {done} of {steps}, loss {loss:.4f}", end="", flush=True)

    made = model.personalize(files, chosen, out, name=subject, side=side,
                             resume=resume, steps=steps, rank=rank, lr=lr, one_way=one_way, seed=seed,
                             on_step=told)  # fmt: skip
    print(f"\nwritten: {made}")


@app.command()
def explain(
    name: Name = "nemotron-tiny",
    quant: Quant = None,
    dtype: DType = "auto",
    context: Context = None,
    strict: Strict = False,
) -> None:
    """Which implementation runs each op and why, how weights are stored, memory by part."""
    options: dict[str, Any] = {} if context is None else {"context": context}
    model = engine.load(name, quant=quant, dtype=dtype, strict=strict, **options)
    print(model)
    if hasattr(model, "profile_of_inputs"):
        print(model.profile_of_inputs)
    print(model.explain())
    print(model.memory())


@app.command()
def plan(
    name: Name = "nemotron-tiny", ctx: Annotated[int | None, typer.Option(help="context in tokens")] = None,
    quant: Quant = None, dtype: DType = "auto",
    chunk: Annotated[int | None, typer.Option(help="prompt tokens per prefill step")] = None,
    snapshots: Annotated[int | None, typer.Option(help="states kept for prefix reuse")] = None,
    device: Annotated[str, typer.Option(help="cpu, cuda, or a card that is not here: rtx4090, h100, ...")] = "cpu",
) -> None:  # fmt: skip
    """Memory that a load would take, from config.json alone: no weights are read, no device is touched.

    Ends with status 1 where it does not fit, after saying what to lower.
    """
    from engine.runtime.fit import fit, lower

    config, cls = family_of(resolve(name))
    options = {"dtype": dtype, "quant": quant, "context": ctx, "chunk": chunk, "snapshots": snapshots}
    options = {k: v for k, v in options.items() if v is not None}
    with fit(device) as (where, have, target):
        parts = cls.plan(config, device=target, **options)
        need = sum(parts.values())
        for part, size in (*parts.items(), ("total", need), ("headroom", have - need)):
            print(f"{part:<10} {size / 1e9:9.3f} GB")
        print(f"{where}: {have / 1e9:.3f} GB to use")
        if need <= have:
            return
        change = lower(lambda **changed: sum(cls.plan(config, device=target, **options | changed).values()), have, ctx)
        print(f"does not fit: {change}")
        raise typer.Exit(1)


@app.command()
def serve(
    name: Name = "pi05-tiny", host: str = "127.0.0.1", port: int = 8000,
    token: Annotated[str | None, typer.Option(help="needed on any interface but this machine's own")] = None,
    stream: Annotated[str, typer.Option(help="ask, always or never: rows as they become final")] = "ask",
    quant: Quant = None, dtype: DType = "auto", strict: Strict = False,
) -> None:  # fmt: skip
    """A robot policy over a websocket, in the protocol of openpi's client; Ctrl-C ends it."""
    from engine.blocks.policy import FlowPolicy
    from engine.serve.server import PolicyServer, check_options

    check_options(host, port, token, stream)
    model = _model("serve", FlowPolicy, name, quant=quant, dtype=dtype, strict=strict)
    model.warmup()
    metadata = {"name": model.name, "horizon": model.horizon, "action_dim": model.options.dims,
                "schedule": str(model.schedule)}  # fmt: skip
    server = PolicyServer(model, host=host, port=port, token=token, metadata=metadata, stream=stream)
    print(model)
    print(model.profile_of_inputs)
    print(f"ws://{host}:{port}", flush=True)
    server.run()


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def bench(context: typer.Context) -> None:
    """The benches of a source checkout (same as ./run bench)."""
    sys.path.insert(0, str(Path.cwd()))  # a console script does not look in the folder it is called in
    try:
        from bench.run import main
    except ImportError:
        raise EngineError(
            "benches live in the source checkout, not in the wheel; clone it and use ./run bench"
        ) from None
    main(context.args)


QUESTIONS = (
    ("What is 47 + 85?", True),
    ("What is 612 - 247?", True),
    ("What is 23 * 4?", False),
)


@app.command()
def demo(name: Name = "nemotron-tiny", quant: Quant = None) -> None:
    """A few real questions to the embedded model, streamed, with speeds and what ran."""
    model = _model("demo", LanguageModel, name, quant=quant, context=1024)
    print(f"{model!r}\n")
    model.warmup()
    results, messages = [], []
    for question, thinking in QUESTIONS:
        print(f"question: {question}{'' if thinking else '  (thinking off)'}")
        messages = [{"role": "user", "content": question}]
        results.append(_turn(model, messages, thinking=thinking, max_new_tokens=200))
        print(f"          [{_speed(results[-1])}]\n")
    follow_up = "And what is 31 + 16?"
    print(f"question: {follow_up}  (second turn of the same chat)")
    messages += [results[-1].message.to_dict(), {"role": "user", "content": follow_up}]
    results.append(_turn(model, messages, max_new_tokens=200))
    print(f"          [{_speed(results[-1])}]\n")
    print(model.explain())
    print(model.memory())


def main() -> None:
    """Typed errors as one line, without a traceback."""
    try:
        app(prog_name="engine")
    except EngineError as error:
        print(f"engine: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
