"""One generator, the same bits everywhere: C++ on every ISA, torch, CUDA text on the host, interpreted Triton."""

from __future__ import annotations

import ctypes
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from engine.ops.rng import rng
from engine.runtime import device
from engine.runtime.arena import as_tensor

ROOT = Path(__file__).resolve().parents[2]
SM = (80, 86, 89, 90, 100, 120)
# (seed, offset, stream, n): odd lengths, all 64 bits of seed and offset in use
DRAWS = [
    (0, 0, 0, 4),
    (1, 0, 1, 1),
    (0xDEADBEEF12345678, (1 << 40) - 3, 3, 1001),
    (2**64 - 1, 2**64 - 1, 2**31 - 1, 4103),
]
# Counter, key and output of Philox4x32-10 in the test vectors of Random123 (kat_vectors).
KNOWN = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    ((0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344), (0xA4093822, 0x299F31D0),
     (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1)),
]  # fmt: skip


def philox_ints(counter: tuple, key: tuple) -> tuple:
    """The definition in Python integers: nothing that can wrap by accident."""
    x, k = list(counter), list(key)
    for _ in range(10):
        p0, p1 = 0xD2511F53 * x[0], 0xCD9E8D57 * x[2]
        x = [(p1 >> 32) ^ x[1] ^ k[0], p1 & 0xFFFFFFFF, (p0 >> 32) ^ x[3] ^ k[1], p0 & 0xFFFFFFFF]
        k = [(k[0] + 0x9E3779B9) & 0xFFFFFFFF, (k[1] + 0xBB67AE85) & 0xFFFFFFFF]
    return tuple(x)


def expected(seed: int, offset: int, stream: int, n: int) -> np.ndarray:
    low = 0xFFFFFFFF
    words = [
        w
        for c in range((n + 3) // 4)
        for w in philox_ints((c, offset & low, offset >> 32, stream), (seed & low, seed >> 32))
    ]
    return np.array(words[:n], np.uint32)


def draw(isa: str, seed: int, offset: int, stream: int, n: int, kind: str) -> np.ndarray:
    guarded = np.full(n + 32, 0x5A5A5A5A, np.uint32)
    out = as_tensor(guarded[16 : 16 + n].view(np.int32 if kind == "bits" else np.float32))
    with device.use_isa(isa):
        rng(
            out,
            as_tensor(np.array([seed], np.uint64)),
            as_tensor(np.array([offset], np.uint64)),
            stream=stream,
            kind=kind,
        )
    assert (guarded[:16] == 0x5A5A5A5A).all() and (guarded[16 + n :] == 0x5A5A5A5A).all(), "written outside out"
    return out.numpy()


@pytest.mark.parametrize(("counter", "key", "want"), KNOWN)
def test_known_answers_of_the_definition(counter, key, want):
    assert philox_ints(counter, key) == want


@pytest.mark.parametrize("isa", device.available_isas())
@pytest.mark.parametrize(("counter", "key", "want"), [KNOWN[0]])
def test_known_answer_of_the_kernel(isa, counter, key, want):
    seed, offset = key[0] | key[1] << 32, counter[1] | counter[2] << 32
    assert tuple(draw(isa, seed, offset, counter[3], 4, "bits").view(np.uint32)) == want


@pytest.mark.parametrize("isa", device.available_isas())
@pytest.mark.parametrize("d", DRAWS, ids=str)
def test_cpu_bits(isa, d):
    np.testing.assert_array_equal(draw(isa, *d, "bits").view(np.uint32), expected(*d))


@pytest.mark.parametrize("isa", device.available_isas())
@pytest.mark.parametrize("d", DRAWS, ids=str)
def test_cpu_uniform_is_exact(isa, d):
    want = (expected(*d) >> 8).astype(np.float64) * 2.0**-24
    got = draw(isa, *d, "uniform")
    np.testing.assert_array_equal(got.astype(np.float64), want)
    assert got.max() < 1.0


def normal64(bits: np.ndarray) -> np.ndarray:
    pair = bits.astype(np.float64).reshape(-1, 2)
    radius, angle = np.sqrt(-2 * np.log((pair[:, 0] + 0.5) * 2.0**-32)), pair[:, 1] * 2.0**-32 * 2 * np.pi
    return np.stack([radius * np.cos(angle), radius * np.sin(angle)], 1).reshape(-1)


@pytest.mark.parametrize("isa", device.available_isas())
def test_cpu_normal(isa):
    d = (5, 9, 2, 40000)
    got = draw(isa, *d, "normal")
    np.testing.assert_allclose(got, normal64(expected(*d)), rtol=2e-7, atol=1e-9)
    assert abs(got.mean()) < 0.02 and abs(got.std() - 1) < 0.02


@pytest.mark.parametrize("d", DRAWS, ids=str)
def test_torch_bits(d):
    pytest.importorskip("torch")
    from engine.ops.rng import philox_torch

    seed, offset, stream, n = d
    np.testing.assert_array_equal(philox_torch(n, seed, offset, stream).numpy().astype(np.uint32), expected(*d))


# ------------------------------------------------------------------------------------------------------------- CUDA


def nvcc() -> str:
    found = os.environ.get("CUDACXX") or shutil.which("nvcc")
    if not found:
        pytest.skip("no nvcc on PATH and CUDACXX is not set: the CUDA text is not compiled here")
    return found


def test_cuda_text_compiles(tmp_path):
    for arch in ("sm_80", "sm_90a"):
        cubin = tmp_path / f"{arch}.cubin"
        command = [nvcc(), "-std=c++17", "-Werror", "all-warnings", "-Xptxas", "-v,--warn-on-spills", "-cubin"]
        command += [f"-arch={arch}", f"-I{ROOT / 'csrc'}", "-o", str(cubin), str(ROOT / "csrc/ops/rng/rng.cu")]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        assert "0 bytes spill stores, 0 bytes spill loads" in done.stderr
        assert cubin.read_bytes()[:4] == b"\x7fELF"


DRIVER = """
#include "base/philox.h"
#include "ops/rng/rng.h"
extern "C" void words(const uint32_t* c, const uint32_t* k, uint32_t* out) {
  const engine::Philox r = engine::philox(k[0] | uint64_t(k[1]) << 32, c[0], c[1] | uint64_t(c[2]) << 32, c[3]);
  for (int i = 0; i < 4; ++i) out[i] = r.v[i];
}
namespace engine::cuda { void rng(const RngParams&, void*); }
extern "C" int draw(void* out, int64_t n, const uint64_t* seed, const uint64_t* offset, int32_t stream, int32_t kind) {
  engine::cuda::rng({out, n, seed, offset, stream, kind}, nullptr);
  return 0;
}
"""


@pytest.fixture(scope="module")
def emulated(tmp_path_factory):
    """rng.cu, unchanged, compiled by the host compiler against csrc/emu."""
    compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("c++")
    if not compiler:
        pytest.skip("no C++ compiler here: the CUDA text does not run on the host")
    folder = tmp_path_factory.mktemp("emu")
    (folder / "driver.cpp").write_text(DRIVER)
    command = [compiler, "-std=c++17", "-O1", "-shared", "-fPIC", "-DENGINE_EMU", f"-I{ROOT / 'csrc'}", "-x", "c++"]
    command += [str(ROOT / "csrc/ops/rng/rng.cu"), str(folder / "driver.cpp"), str(ROOT / "csrc/emu/emu.cpp")]
    command += [f"-Wl,-T,{ROOT / 'csrc/emu/shared.ld'}", "-pthread", "-o", str(folder / "emu.so")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    library = ctypes.CDLL(str(folder / "emu.so"))

    def run(seed: int, offset: int, stream: int, n: int, kind: int) -> np.ndarray:
        guarded = np.full(n + 32, 0x5A5A5A5A, np.uint32)
        out = guarded[16 : 16 + n]
        args = np.array([seed, offset], np.uint64)
        at = args.ctypes.data
        library.draw(ctypes.c_void_p(out.ctypes.data), ctypes.c_int64(n), ctypes.c_void_p(at), ctypes.c_void_p(at + 8),
                     ctypes.c_int32(stream), ctypes.c_int32(kind))  # fmt: skip
        assert (guarded[:16] == 0x5A5A5A5A).all() and (guarded[16 + n :] == 0x5A5A5A5A).all(), "written outside out"
        return out

    run.library = library
    return run


@pytest.mark.parametrize(("counter", "key", "want"), KNOWN)
def test_known_answers_of_the_header(emulated, counter, key, want):
    c, k, out = np.array(counter, np.uint32), np.array(key, np.uint32), np.zeros(4, np.uint32)
    emulated.library.words(*(ctypes.c_void_p(x.ctypes.data) for x in (c, k, out)))
    assert tuple(out) == want


@pytest.mark.parametrize("d", DRAWS, ids=str)
def test_cuda_text_emulated(emulated, d):
    np.testing.assert_array_equal(emulated(*d, 0), expected(*d))
    np.testing.assert_array_equal(
        emulated(*d, 1).view(np.float32), (expected(*d) >> 8).astype(np.float32) * np.float32(2.0**-24)
    )


def test_cuda_text_emulated_normal(emulated):
    d = (5, 9, 2, 4002)
    np.testing.assert_allclose(emulated(*d, 2).view(np.float32), normal64(expected(*d)), rtol=2e-7, atol=1e-7)


# ----------------------------------------------------------------------------------------------------------- Triton

INTERPRET = """
import json, sys
sys.path.insert(0, sys.argv[1])
import torch
from triton_kernels.rng import rng

def i64(x):
    return torch.tensor([x - (1 << 64) if x >> 63 else x])

out = []
for seed, offset, stream, n, kind in json.load(sys.stdin):
    y = torch.full((n + 8,), 77, dtype=torch.int32 if kind == 0 else torch.float32)
    rng[(-(-n // 64),)](y, n, i64(seed), i64(offset), stream, KIND=kind, BLOCK=16)
    assert (y[n:] == 77).all(), "written outside out"
    out.append(y[:n].view(torch.int32).tolist())
json.dump(out, sys.stdout)
"""

COMPILE = """
import json, sys, warnings
sys.path.insert(0, sys.argv[1])
warnings.simplefilter("ignore")
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton_kernels.rng import rng

for sm in json.loads(sys.argv[2]):
    for kind in (0, 1, 2):
        signature = {"out": "*i32" if kind == 0 else "*fp32", "n": "i32", "seed_ptr": "*i64", "offset_ptr": "*i64",
                     "stream": "i32", "KIND": "constexpr", "BLOCK": "constexpr"}
        source = ASTSource(rng, signature=signature, constexprs={"KIND": kind, "BLOCK": 256})
        # Contraction would change the bits of the normals from one Triton version to the next.
        built = triton.compile(source, target=GPUTarget("cuda", sm, 32), options={"enable_fp_fusion": False})
        assert built.asm["cubin"][:4] == b"\\x7fELF", (sm, kind)
        print(sm, kind, len(built.asm["cubin"]))
"""


def python(code: str, *args: str, stdin: str = "", **environment: str) -> str:
    pytest.importorskip("triton")
    pytest.importorskip("torch")
    done = subprocess.run([sys.executable, "-c", code, str(ROOT), *args], input=stdin, capture_output=True, text=True,
                          env={**os.environ, **environment}, check=False)  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout


def test_triton_interpreted():
    # A process of its own: the mode is fixed when the kernel is decorated.
    jobs = [(*d, kind) for d in DRAWS for kind in (0, 1)] + [(5, 9, 2, 1002, 2)]
    got = json.loads(python(INTERPRET, stdin=json.dumps(jobs), TRITON_INTERPRET="1"))
    for (seed, offset, stream, n, kind), words in zip(jobs, got, strict=True):
        bits, want = np.array(words, np.int32).view(np.uint32), expected(seed, offset, stream, n)
        if kind == 0:
            np.testing.assert_array_equal(bits, want)
        elif kind == 1:
            np.testing.assert_array_equal(bits.view(np.float32), (want >> 8).astype(np.float32) * np.float32(2.0**-24))
        else:
            np.testing.assert_allclose(bits.view(np.float32), normal64(want), rtol=2e-7, atol=1e-7)


def test_triton_compiles_for_every_architecture(tmp_path):
    out = python(COMPILE, json.dumps(SM), TRITON_INTERPRET="0", TRITON_CACHE_DIR=str(tmp_path))
    assert len(out.splitlines()) == 3 * len(SM)
