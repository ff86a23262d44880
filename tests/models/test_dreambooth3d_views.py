"""Reference views and photos: what is read, how they are prepared and scaled, what is refused."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from engine.errors import InputError
from engine.models.dreambooth3d.views import SHARE, SQUARE, View, covering, read_views, resized, square

GREY = np.full((90, 120, 3), 100, np.uint8)


def mask(box: tuple[int, int, int, int] = (20, 30, 60, 80)) -> np.ndarray:
    out = np.zeros(GREY.shape[:2], bool)
    out[box[0] : box[2], box[1] : box[3]] = True
    return out


@pytest.mark.parametrize("size", [(33, 50), (200, 90), (64, 64), (91, 121)])
def test_scaling_is_torchs(size: tuple[int, int]) -> None:
    """Bicubic with antialias, up and down."""
    x = np.random.default_rng(0).random((90, 120, 3), np.float32)
    want = torch.nn.functional.interpolate(
        torch.from_numpy(x).permute(2, 0, 1)[None], size, mode="bicubic", antialias=True, align_corners=False
    )[0].permute(1, 2, 0)  # fmt: skip
    np.testing.assert_allclose(resized(x, *size), want.numpy(), atol=2e-5)


@pytest.mark.parametrize("shrink", [1.0, 0.5, 0.8])
def test_prepared(shrink: float, tmp_path: Path) -> None:
    """The object in the middle, at its share of the square; whichever way its mask comes."""
    rgba = np.dstack([GREY, mask().astype(np.uint8) * 255])
    Image.fromarray(rgba).save(tmp_path / "view.png")
    given: list[Any] = [
        (GREY, mask()),
        rgba,
        (GREY, mask().astype(np.float32)),
        tmp_path / "view.png",
        Image.fromarray(rgba),
    ]
    views = read_views(given, shrink=shrink)
    for view in views:
        np.testing.assert_allclose(view.pixels, views[0].pixels, atol=1e-6)
    one = views[0]
    assert one.pixels.shape == (SQUARE, SQUARE, 3) and one.box is not None
    top, left, bottom, right = one.box
    factor = max(SHARE * SQUARE / 50, SQUARE / 90) * shrink
    assert right - left == pytest.approx(50 * factor, abs=8) and bottom - top == pytest.approx(40 * factor, abs=8)
    assert (top + bottom) / 2 == pytest.approx(SQUARE / 2, abs=4) and (left + right) / 2 == pytest.approx(
        SQUARE / 2, abs=4
    )
    np.testing.assert_allclose(one.pixels[0, 0], 1.0)
    np.testing.assert_allclose(one.pixels[SQUARE // 2, SQUARE // 2], 100 / 255, atol=1e-3)


def test_as_it_is() -> None:
    """A view without a mask passes through."""
    (view,) = read_views([GREY])
    np.testing.assert_array_equal(view.pixels, GREY.astype(np.float32) / 255)
    assert view.box == (0, 0, 90, 120)
    assert read_views([np.full((8, 8, 3), 255, np.uint8)])[0].box is None


def test_covering() -> None:
    """A square in a wide frame loses its top and bottom; a prepared one's object fits."""
    (small,) = read_views([(GREY, mask())], shrink=0.5)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        got = covering(small, 720, 1280)
    assert got.shape == (720, 1280, 3) and got.min() >= -1 and got.max() <= 1
    want = resized(small.pixels, 1280, 1280)[280:1000]
    np.testing.assert_allclose(got, np.clip(2 * want - 1, -1, 1), atol=1e-6)
    (large,) = read_views([(GREY, mask((5, 30, 85, 60)))], shrink=1.0)
    with pytest.warns(UserWarning, match="view 3: the object reaches beyond the 1280 x 720 frame"):
        covering(large, 720, 1280, name="view 3")
    assert covering(small, 832, 480).shape == (832, 480, 3)


def test_squares_for_training() -> None:
    x = np.random.default_rng(1).random((90, 120, 3), np.float32)
    for pixels in (x, x.transpose(1, 0, 2)):
        got = square(pixels, 64)
        assert got.shape == (64, 64, 3) and got.min() >= -1 and got.max() <= 1
    want = resized(x, 64, 85)[:, 10:74]
    np.testing.assert_allclose(square(x, 64), np.clip(2 * want - 1, -1, 1), atol=1e-6)


@pytest.mark.parametrize(
    ("given", "named"),
    [([], "1 to 8"), ([GREY] * 9, "1 to 8"), ("view.png", "as a list"), ([GREY.astype(np.float32)], "view 1"),
     ([GREY, GREY[..., 0]], "view 2"), ([(GREY, np.zeros((90, 120), bool))], "mask is empty"),
     ([(GREY, mask()[:50])], "a mask"), ([(GREY, mask() * np.float32("nan"))], "mask must lie"),
     ([(GREY, mask() * np.float32(2))], "mask must lie"), ([Path("no/such/view.png")], "no/such/view.png"),
     ([np.zeros((0, 4, 3), np.uint8)], "view 1")],
)  # fmt: skip
def test_wrong_views(given: Any, named: str) -> None:
    with pytest.raises(InputError, match=named):
        read_views(given)


def test_a_file_that_is_no_picture(tmp_path: Path) -> None:
    (tmp_path / "view.png").write_bytes(b"\x89PNG\r\n\x1a\nrubbish")
    with pytest.raises(InputError, match="cannot be read as a picture"):
        read_views([tmp_path / "view.png"])
    with pytest.raises(InputError, match="shrink"):
        read_views([GREY], shrink=0.0)
    assert isinstance(read_views([GREY])[0], View)
