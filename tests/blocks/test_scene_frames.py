"""Frames of a scene: what may be given, which frames are taken, how they are resized."""

from __future__ import annotations

import struct
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.blocks.scene import (
    at_most,
    center_crop,
    check_frames,
    fit_width,
    frames,
    read_frames,
    resize,
    smart_resize,
    uniform,
)
from engine.errors import InputError

Image = pytest.importorskip("PIL.Image")


def pictures(count, height=6, width=8, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (count, height, width, 3), dtype=np.uint8)


# ---- sampling


def test_which_frames():
    assert uniform(10, 4).tolist() == [0, 3, 6, 9]
    assert uniform(11, 4).tolist() == [0, 3, 6, 10]  # 0, 3.33, 6.67, 10
    assert uniform(3, 5).tolist() == [0, 0, 1, 1, 2]
    assert uniform(7, 1).tolist() == [0] and uniform(1, 3).tolist() == [0, 0, 0]
    assert at_most(3, 5).tolist() == [0, 1, 2] and at_most(5, 5).tolist() == [0, 1, 2, 3, 4]
    assert at_most(11, 4).tolist() == [0, 3, 6, 10]
    assert uniform(298, 32)[:6].tolist() == [0, 9, 19, 28, 38, 47]  # 9.58 apart
    for total, count in ((0, 3), (3, 0), (3, 1025), (3, True), (3, 2.0), (10**6 + 1, 3), ("3", 3)):
        with pytest.raises(InputError, match=r"to choose from|may be taken"):
            uniform(total, count)
        with pytest.raises(InputError):
            at_most(total, count)


@given(st.integers(1, 5000), st.integers(1, 64))
@settings(max_examples=60, deadline=None)
def test_sampling_covers_the_source(total, count):
    for indices in (uniform(total, count), at_most(total, count)):
        assert indices.dtype == np.int64 and indices[0] == 0 and (np.diff(indices) >= 0).all()
        assert indices[-1] == (total - 1 if count > 1 else 0)
    assert len(uniform(total, count)) == count and len(at_most(total, count)) == min(total, count)
    if total >= count:
        assert len(set(uniform(total, count).tolist())) == count


# ---- what may be given


def test_arrays_and_lists():
    p = pictures(5)
    whole = read_frames(p)
    assert (whole.pixels == p).all() and whole.indices.tolist() == [0, 1, 2, 3, 4] and whole.total == 5
    some = read_frames(p, 3)
    assert (some.pixels == p[[0, 2, 4]]).all() and some.total == 5 and some.indices.tolist() == [0, 2, 4]
    assert (read_frames(p[:2], 4).pixels == p[[0, 0, 0, 1]]).all()
    assert (read_frames(p[:2], 4, "at_most").pixels == p[:2]).all()
    channels_first = p.transpose(0, 3, 1, 2)
    for source in (list(p), tuple(p), [Image.fromarray(x) for x in p], channels_first, list(channels_first)):
        assert (read_frames(source).pixels == p).all()
    assert (read_frames(Image.fromarray(p[3])).pixels == p[3:4]).all()
    assert (read_frames([Image.fromarray(p[0]).convert("RGBA")]).pixels == p[:1]).all()
    assert read_frames([Image.new("L", (4, 3), 7)]).pixels.tolist() == np.full((1, 3, 4, 3), 7).tolist()


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_floats_are_rounded_to_the_nearest_level(dtype):
    # 0.4 of a level goes down, 0.6 up; a byte over 255 comes back as it was.
    levels = np.array([0, 10.4, 10.6, 200, 254.6, 255]) / 255
    p = np.tile(levels.astype(dtype)[None, :, None, None], (1, 1, 2, 3))
    expected = [0, 10, 11, 200, 255, 255]
    assert read_frames(p).pixels[0, :, 0, 0].tolist() == expected
    every = np.arange(256, dtype=np.uint8).reshape(1, 16, 16, 1).repeat(3, -1)
    if dtype != np.float16:
        assert (read_frames((every / 255).astype(dtype)).pixels == every).all()


def test_torch_images():
    torch = pytest.importorskip("torch")
    p = pictures(2)
    assert (read_frames(torch.from_numpy(p)).pixels == p).all()
    assert (read_frames([torch.from_numpy(x).permute(2, 0, 1).float() / 255 for x in p]).pixels == p).all()


@pytest.mark.parametrize(
    "source, message",
    [
        (np.zeros((2, 2, 4, 5), np.uint8), r"frame 0 has shape \[2, 4, 5\]"),
        (np.zeros((4, 5, 3), np.uint8), r"uint8 \[4, 5, 3\]; \[T, H, W, 3\]"),
        (np.zeros((2, 4, 5, 3), np.int32), "frame 0 is int32"),
        (np.full((1, 4, 5, 3), 1.5), "floats from 1.5 to 1.5"),
        (np.full((1, 4, 5, 3), np.nan), "floats from nan"),
        (np.full((1, 4, 5, 3), -0.1), "floats from -0.1"),
        ([], "0 frames"),
        (np.zeros((0, 4, 5, 3), np.uint8), "0 frames"),
        ([np.zeros((4, 5, 3), np.uint8), np.zeros((5, 4, 3), np.uint8)], "frames 0 and 1 have 4 x 5 and 5 x 4 pixels"),
        ([[[1, 2], [3]]], "frame 0 is not an array"),
        ([Image.new("I;16", (4, 4))], "mode I;16: a depth map"),
        ([Image.new("F", (4, 4))], "mode F: a depth map"),
        ([Image.new("L", (8193, 1))], "8193"),
        (7, "int64"),
    ],
)
def test_what_may_not_be_given(source, message):
    with pytest.raises(InputError, match=message):
        read_frames(source)


def test_bounds():
    with pytest.raises(InputError, match="1025 frames; 1 to 1024 can be taken at once, give count"):
        read_frames(np.zeros((1025, 1, 1, 3), np.uint8))
    one = np.broadcast_to(np.zeros(3, np.uint8), (8192, 8192, 3))
    with pytest.raises(InputError, match="5 frames of 8192 x 8192 pixels"):
        read_frames([one] * 5)
    with pytest.raises(InputError, match="sampling = 'last'"):
        read_frames(pictures(1), sampling="last")


# ---- folders


def test_folder_in_natural_order(tmp_path):
    p = pictures(4)
    for name, picture in zip(("frame_10.png", "frame_2.png", "Frame_1.PNG", "frame_02.bmp"), p):
        Image.fromarray(picture).save(tmp_path / name)
    (tmp_path / "frame_1.txt").write_text("a pose")
    (tmp_path / ".frame_0.png").write_bytes(b"of a file system")
    # frame_02 and frame_2 are the same number; the name decides.
    assert (read_frames(tmp_path).pixels == p[[2, 3, 1, 0]]).all()
    taken = read_frames(str(tmp_path), 2)
    assert (taken.pixels == p[[2, 0]]).all() and taken.indices.tolist() == [0, 3] and taken.total == 4
    assert (read_frames([tmp_path / "frame_10.png", str(tmp_path / "frame_2.png")]).pixels == p[:2]).all()
    assert (read_frames(tmp_path / "frame_2.png").pixels == p[1:2]).all()


def test_orientation_tag(tmp_path):
    p = np.zeros((4, 6, 3), np.uint8)
    p[0, 0] = 255
    exif = Image.Exif()
    exif[0x0112] = 6  # shown turned clockwise
    Image.fromarray(p).save(tmp_path / "a.png", exif=exif)
    got = read_frames(tmp_path).pixels[0]
    assert got.shape == (6, 4, 3) and (got[0, 3] == 255).all() and got.sum() == 3 * 255


def test_faults_of_folders(tmp_path, monkeypatch):
    with pytest.raises(InputError, match="holds 0 images"):
        read_frames(tmp_path)
    Image.fromarray(pictures(1)[0]).save(tmp_path / "a1.png")
    good = (tmp_path / "a1.png").read_bytes()
    for bad in (b"", b"no picture", good[: len(good) // 2]):
        (tmp_path / "a2.png").write_bytes(bad)
        with pytest.raises(InputError, match=r"a2\.png cannot be read as an image"):
            read_frames(tmp_path)
        assert read_frames(tmp_path, 1).total == 2, "only what is taken is read"
    Image.fromarray(np.ones((4, 4), np.uint16)).save(tmp_path / "a2.png")
    with pytest.raises(InputError, match=r"a2\.png is a picture of mode I;16"):
        read_frames(tmp_path)
    with pytest.raises(InputError, match=r"b\.png cannot be read"):
        read_frames(tmp_path / "b.png")
    with pytest.raises(InputError, match="neither a file nor a folder"):
        read_frames(tmp_path / "nowhere")
    monkeypatch.setitem(sys.modules, "PIL", None)
    with pytest.raises(InputError, match=r"need Pillow: pip install 'quintet-engine\[scene\]'"):
        read_frames(tmp_path)
    with pytest.raises(InputError, match="need Pillow"):
        resize(pictures(1), (3, 3))


# ---- videos


def film(path, count=30, codec="libx264", gop=10, options=None):
    """A video whose frames differ in level, with a white corner; what a plain decode makes of it."""
    av = pytest.importorskip("av")
    # Two of three frames are stored behind the one that follows them.
    reorder = {"bf": "2", "b_strategy": "0", "sc_threshold": "0"} if codec == "libx264" else {}
    with av.open(str(path), "w", options=options or {}) as container:
        stream = container.add_stream(codec, rate=25, options=reorder)
        stream.height, stream.width, stream.pix_fmt, stream.gop_size = 48, 64, "yuv420p", gop
        for i in range(count):
            picture = np.full((48, 64, 3), 8 * i, np.uint8)
            picture[:16, :16] = 255
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode())
    with av.open(str(path)) as container:
        return np.stack([f.to_ndarray(format="rgb24") for f in container.decode(video=0)])


@pytest.mark.parametrize(
    "name, codec, gop",
    [
        ("a.mp4", "libx264", 10),
        ("b.mov", "libx264", 250),
        ("c.mkv", "libx264", 7),
        ("d.ts", "libx264", 10),  # a search lands behind its keyframe
        ("e.avi", "libx264", 10),  # has no times of showing
        ("f.avi", "mpeg4", 5),
    ],
)
def test_video(tmp_path, name, codec, gop):
    plain = film(tmp_path / name, codec=codec, gop=gop)
    assert len(plain) == 30 and (np.diff(plain[:, 40, 40, 0].astype(int)) > 0).all()
    for count in (1, 4, 13, 30, None):
        got = read_frames(tmp_path / name, count)
        assert got.total == 30 and len(got.indices) == (count or 30)
        assert (got.pixels == plain[got.indices]).all()
    assert (read_frames(tmp_path / name, 40).pixels == plain[np.linspace(0, 29, 40).astype(int)]).all()
    assert len(read_frames(tmp_path / name, 40, "at_most").pixels) == 30


class Film:
    """Ten frames, shown at 0, 10, .. 90, a keyframe every fourth; counts what is decoded."""

    def __init__(self):
        self.place, self.decoded = 0, 0

    def seek(self, time, stream):
        self.place = time // 10

    def decode(self, stream):
        while self.place < 10:
            self.place += 1
            self.decoded += 1
            yield type("Frame", (), {"pts": 10 * (self.place - 1)})


def test_only_what_is_needed_is_decoded():
    times, keys = list(range(0, 100, 10)), [0, 40, 80]
    for wanted, decoded in (([0], 1), ([0, 9], 1 + 2), ([5, 6], 3), ([3, 4, 8], 4 + 1 + 1)):
        source = Film()
        got = [(i, frame.pts) for i, frame in frames._by_time(source, None, times, keys, wanted)]
        assert got == [(i, 10 * i) for i in wanted] and source.decoded == decoded
        source = Film()
        assert [i for i, _ in frames._in_order(source, None, times, keys, wanted)] == wanted
        assert source.decoded == wanted[-1] + 1


def test_video_without_times():
    def packet(pts, key=True):
        return type("Packet", (), {"pts": pts, "is_keyframe": key, "is_discard": pts == 7, "size": 1})

    def times(packets, reorders=False):
        stream = type("Stream", (), {"codec_context": type("Context", (), {"has_b_frames": reorders})})
        film = type("Film", (), {"name": "a.mp4", "demux": lambda self, stream: packets})()
        return frames._times(film, stream)

    stored = [packet(0), packet(20, False), packet(10, False), packet(30)]
    assert times(stored, True) == ([0, 10, 20, 30], [0, 30])
    assert times([packet(7), *stored]) == ([0, 10, 20, 30], [0, 30]), "what an edit list hides is no frame"
    # No times, some twice, or those of storing where frames are stored in another order.
    for packets, reorders in (
        ([packet(None)] * 3, False),
        ([packet(1)] * 3, False),
        (list(map(packet, (1, 2, 3))), True),
    ):
        assert times(packets, reorders) == ([0, 1, 2], [])
    assert times(list(map(packet, (1, 2, 3)))) == ([1, 2, 3], [1, 2, 3])
    with pytest.raises(InputError, match=r"a\.mp4 holds no frames"):
        times([])


def test_video_that_is_turned(tmp_path):
    film(tmp_path / "a.mp4", 2)
    data = (tmp_path / "a.mp4").read_bytes()
    matrix = struct.pack(">9i", 1 << 16, 0, 0, 0, 1 << 16, 0, 0, 0, 1 << 30)
    at = data.index(matrix, data.index(b"tkhd"))
    clockwise = struct.pack(">9i", 0, 1 << 16, 0, -1 << 16, 0, 0, 0, 0, 1 << 30)
    (tmp_path / "b.mp4").write_bytes(data[:at] + clockwise + data[at + len(matrix) :])
    upright, turned = (read_frames(tmp_path / name).pixels for name in ("a.mp4", "b.mp4"))
    assert upright[0, 2, 2].min() > 240 and (turned == np.rot90(upright, -1, axes=(1, 2))).all()


def test_faults_of_videos(tmp_path, monkeypatch):
    film(tmp_path / "a.mp4", options={"movflags": "faststart"})
    good = (tmp_path / "a.mp4").read_bytes()
    hole = good[: len(good) * 2 // 3] + bytes(200) + good[len(good) * 2 // 3 + 200 :]
    playlist = f"#EXTM3U\n#EXT-X-TARGETDURATION:10\n#EXTINF:10,\nfile://{tmp_path}/a.mp4\n".encode()
    for bad in (b"", b"no film" * 100, good[:40], good[: len(good) // 2], good[:-100], hole, playlist):
        (tmp_path / "b.mp4").write_bytes(bad)
        with pytest.raises(InputError, match=r"b\.mp4.*(convert it again|has no video in it)"):
            read_frames(tmp_path / "b.mp4", 30)
    av = pytest.importorskip("av")
    with av.open(str(tmp_path / "c.mp4"), "w") as container:
        stream = container.add_stream("aac", rate=8000)
        silence = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        silence.rate = 8000
        container.mux(stream.encode(silence))
        container.mux(stream.encode())
    with pytest.raises(InputError, match="has no video in it"):
        read_frames(tmp_path / "c.mp4")
    monkeypatch.setattr(frames, "MAX_LISTED", 29)
    with pytest.raises(InputError, match="more than 29 frames"):
        read_frames(tmp_path / "a.mp4", 3)
    monkeypatch.setattr(frames, "MAX_LISTED", 30)
    monkeypatch.setattr(frames, "MAX_PIXELS", 3 * 48 * 64)
    assert len(read_frames(tmp_path / "a.mp4", 3).pixels) == 3
    with pytest.raises(InputError, match="4 frames of 48 x 64 pixels"):
        read_frames(tmp_path / "a.mp4", 4)
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(InputError, match=r"need the package av: pip install 'quintet-engine\[scene\]'"):
        read_frames(tmp_path / "a.mp4", 3)


# ---- resizing


def pillow(picture, height, width):
    return np.asarray(Image.fromarray(picture).resize((width, height), Image.Resampling.BICUBIC))


def test_resize_is_pillows_bicubic():
    p = pictures(2, 37, 50)
    got = resize(p, (24, 24))
    assert got.dtype == np.uint8 and all((a == pillow(b, 24, 24)).all() for a, b in zip(got, p))
    # The default of a PIL image is bicubic, too.
    assert (got[0] == np.asarray(Image.fromarray(p[0]).resize((24, 24)))).all()
    assert resize(p, (37, 50)) is p


def test_center_crop():
    # 480 x 640 to height 384: 512 wide, 64 columns off at each side.
    p = pictures(1, 480, 640)
    assert (center_crop(p)[0] == pillow(p[0], 384, 512)[:, 64:448]).all()
    # 968 x 1296 alone: int(1296 * 384 / 968) = int(514.1) wide, (514 - 384) // 2 = 65 off; with depth maps of
    # 480 x 640 it is their 512.
    p = pictures(1, 242, 324)
    assert (center_crop(p, 96)[0] == pillow(p[0], 96, 128)[:, 16:112]).all()
    p = pictures(1, 968, 1296)
    assert (center_crop(p)[0] == pillow(p[0], 384, 514)[:, 65:449]).all()
    assert (center_crop(p, aspect=(480, 640))[0] == pillow(p[0], 384, 512)[:, 64:448]).all()
    with pytest.raises(InputError, match="wider than high"):
        center_crop(pictures(1, 10, 9), 8)


def test_fit_width():
    # 480 x 640: 518 wide, round(480 * 518 / 640 / 14) * 14 = round(27.75) * 14 = 392 high; 37 patches across lose one.
    p = pictures(1, 480, 640)
    got = fit_width(p)
    assert got.shape == (1, 392, 504, 3) and (got[0] == pillow(p[0], 392, 518)[:, :504]).all()
    # 270 x 480: 291.4 high, 20.8 patches, 21 = 294, the last of which is odd.
    assert fit_width(pictures(1, 270, 480)).shape == (1, 280, 504, 3)
    # Upright, 640 x 480: 690.7 high, 49.3 patches, 49 = 686; of them the middle 518 from row 84, then 504.
    p = pictures(1, 640, 480)
    assert (fit_width(p)[0] == pillow(p[0], 686, 518)[84 : 84 + 504, :504]).all()
    # Half of a patch goes to the even number, as Python rounds: 35 = 2.5 patches, 2.
    assert fit_width(pictures(1, 35, 518)).shape == (1, 28, 504, 3)
    # A small one: 8 patches of 4 pixels, 20 * 32 / 40 = 16 high.
    assert fit_width(pictures(2, 20, 40), 32, 4, 2).shape == (2, 16, 32, 3)
    with pytest.raises(InputError, match="10 x 518 pixels are too flat"):
        fit_width(pictures(1, 10, 518))


def test_smart_resize():
    # 392 x 504 has 197568 pixels, below 200704: times sqrt(200704 / 197568) = 1.00790, 14.11 and 18.14 factors, up.
    assert smart_resize(392, 504) == (420, 532)
    assert smart_resize(448, 448) == (448, 448)
    # 1080 x 1920: 39 * 28 x 69 * 28 = 2109744, above: over sqrt(2073600 / 1605632) = 1.13642: 33.9 and 60.3, down.
    assert smart_resize(1080, 1920) == (924, 1680)
    assert smart_resize(280, 504) == (336, 616)  # 141120: times 1.19257, 11.93 and 21.47, up
    assert smart_resize(10, 10, min_pixels=28 * 28) == (28, 28)
    # 100 x 4000: 4 x 143 factors are 572, above 16: over sqrt(400000 / 12544) = 5.6470: 0.63 and 25.3; at least one.
    assert smart_resize(100, 4000, max_pixels=16 * 28 * 28, min_pixels=28) == (28, 700)
    for sides in ((0, 5), (5, 0), (1, 201), (201, 1)):
        with pytest.raises(InputError, match="200 times"):
            smart_resize(*sides)


@given(st.integers(20, 3000), st.integers(20, 3000))
@settings(max_examples=100, deadline=None)
def test_smart_resize_keeps_its_bounds(height, width):
    if max(height, width) > 3 * min(height, width):
        return
    h, w = smart_resize(height, width)
    assert h % 28 == 0 == w % 28 and 200704 <= h * w <= 1605632
    # Both sides are scaled alike, up to one factor.
    assert abs(h - height * (h * w / (height * width)) ** 0.5) < 2 * 28


def test_faults_of_resizing():
    for bad in (pictures(1)[0], pictures(1).astype(float), pictures(1)[..., :2], pictures(0), "frames"):
        for call in (check_frames, center_crop, fit_width, lambda p: resize(p, (3, 3))):
            with pytest.raises(InputError, match="frames is"):
                call(bad)
    for size in ((0, 3), (3.0, 3), (3, 8193)):
        with pytest.raises(InputError, match="size"):
            resize(pictures(1), size)
    with pytest.raises(InputError, match="5 frames of 8192 x 8192 pixels"):
        resize(pictures(5), (8192, 8192))
