"""Every kernel has its evidence, none of it is stale, and a random tenth of it is made again and is the same.

QUINTET_EVIDENCE=all makes everything again; QUINTET_EVIDENCE_SEED repeats a draw (default: the day). A difference only
in the version of a compiler skips the unit, and fails where CI is set.
"""

from __future__ import annotations

import os
import time

import pytest

pytest.importorskip("torch")
pytest.importorskip("triton")

from tests.evidence import layers, records, sample, sources

UNITS = sources.units()
SEED = int(os.environ.get("QUINTET_EVIDENCE_SEED") or time.strftime("%Y%m%d"))


def drawn() -> dict[tuple[str, str], list[str] | None]:
    there = {u: r.seconds for u in UNITS if (r := records.load(*u))}
    if os.environ.get("QUINTET_EVIDENCE") == "all":
        return dict.fromkeys(there)
    return sample.choose(there, lambda u: list(records.load(*u).result), SEED)  # type: ignore[union-attr]


def name(unit: tuple[str, str]) -> str:
    return "-".join(unit)


@pytest.mark.parametrize("unit", UNITS, ids=name)
def test_record_is_fresh_and_green(unit):
    room, layer = unit
    record = records.load(room, layer)
    assert record, f"no record; run `./run evidence {room}`"
    files = sources.hashes(room, layer)
    if record.sources != sources.digest(files):
        changed = ", ".join(records.changed(record, files)) or "the record itself"
        pytest.fail(f"changed since the record was made: {changed}; run `./run evidence {room}`", pytrace=False)
    assert sorted(record.result) == sorted(layers.PARTS[layer](room)), f"run `./run evidence {room}`"
    assert not record.failures(), "\n".join(record.failures())


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("unit", drawn().items(), ids=lambda x: name(x[0]))
def test_made_again(unit):
    (room, layer), parts = unit
    record = records.load(room, layer)
    if record.sources != sources.digest(sources.hashes(room, layer)):
        pytest.skip("stale, which another test reports")
    if other := records.other_tools(room, layer, record):
        if os.environ.get("CI"):
            pytest.fail(f"recorded with other tools: {other}; run `./run evidence {room} --all`", pytrace=False)
        pytest.skip(f"other tools: {other}")
    print(f"QUINTET_EVIDENCE_SEED={SEED}: {room} {layer}, {len(parts) if parts else 'all'} parts")
    made = layers.make(room, layer, parts)
    want = {part: record.result[part] for part in made.result}
    lines = records.difference(want, made.result)
    assert not lines, f"QUINTET_EVIDENCE_SEED={SEED}, figures that differ:\n" + "\n".join(lines)


def test_every_triton_kernel_is_interpreted():
    """The check of the interpreter's suite, over the records."""
    from tests.triton import test_interpreted as suite

    found = [records.load(room, "interpreted") for room in suite.OPS]
    if None in found:
        pytest.skip("a record is missing, which another test reports")
    suite.test_every_kernel_ran({k: {"ran": v["programs"]} for r in found for k, v in r.result.items()})


def test_every_cuda_kernel_has_mutants():
    for room, layer in UNITS:
        if layer == "mutants":
            assert len(layers.mutants_parts(room)) >= 5, f"{room}: fewer than five mutants"
