"""Grids show every picture and reward, and no caption runs out of its cell."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from fastloop.grids import before_after_grid, image_grid


def test_a_grid_shows_every_picture_enlarged_with_hard_pixels(tmp_path):
    colors = [(250, 0, 0), (0, 250, 0), (0, 0, 250)]
    images = [np.full((16, 16, 3), color, np.uint8) for color in colors]
    grid = np.asarray(image_grid([images[0], Image.fromarray(images[1]), images[2]], ["a", "b", "c"], columns=2, cell=64))
    for color in colors:
        assert (grid == color).all(-1).sum() == 64 * 64
    checker = np.indices((8, 8)).sum(0)[..., None] % 2 * np.full(3, 255, np.uint8)
    assert set(np.unique(np.asarray(image_grid([checker.astype(np.uint8)], [""], 1, cell=64))[12:70, 12:70])) == {
        0,
        255,
    }


def test_a_grid_fits_large_and_oblong_pictures_into_the_cell():
    wide = np.full((100, 400, 3), (250, 0, 0), np.uint8)
    grid = np.asarray(image_grid([wide], ["a wide one"], columns=4, cell=64))
    rows, columns = np.nonzero((grid == (250, 0, 0)).all(-1))
    assert (np.ptp(rows) + 1, np.ptp(columns) + 1) == (16, 64)


@pytest.mark.parametrize("caption", ["", "word " * 200, "x" * 5000, "Grüße, Привет, 日本 → ×", "a\nb\nc\nd", "<b>&amp;"])
def test_any_caption_stays_within_its_cell(caption):
    image = np.full((64, 64, 3), 255, np.uint8)
    grid = image_grid([image], [caption], columns=1, cell=64)
    assert grid.width == 64 + 2 * 10
    assert grid.height <= 64 + 2 * 10 + 3 * 15 + 5
    edge = np.asarray(grid)[:, -9:]
    assert (edge == 255).all(), "text ran past the cell"


def test_a_reward_after_a_line_break_survives_a_long_caption():
    image = np.zeros((64, 64, 3), np.uint8)
    short, other = (image_grid([image], ["word " * 40 + end], 1) for end in ("\n0.25", "\n0.75"))
    assert short.tobytes() != other.tobytes()


def test_a_grid_refuses_pictures_that_it_would_misread():
    with pytest.raises(ValueError, match="caption per picture"):
        image_grid([], [], columns=4)
    with pytest.raises(ValueError, match=r"uint8 picture of shape \(H, W, 3\), got float64 \(8, 8, 3\)"):
        image_grid([np.zeros((8, 8, 3))], ["a"], columns=1)


def test_the_before_after_grid_has_the_before_pictures_left_and_the_after_pictures_right():
    red, green = (np.full((16, 16, 3), color, np.uint8) for color in ((250, 0, 0), (0, 250, 0)))
    prompts = ["a red circle", "a much longer prompt " * 10]
    single = np.asarray(before_after_grid(prompts, [red, red], [green, green], [0.1, 0.2], [0.9, 1.0], cell=64))
    several = np.asarray(
        before_after_grid(prompts, [[red] * 3] * 2, [[green] * 3] * 2, [[0.1] * 3] * 2, np.ones((2, 3)), cell=64)
    )
    for grid, count in ((single, 2), (several, 6)):
        before, after = ((grid == color).all(-1) for color in ((250, 0, 0), (0, 250, 0)))
        assert before.sum() == after.sum() == count * 64 * 64
        assert np.nonzero(before)[1].max() < np.nonzero(after)[1].min()


def test_the_before_after_grid_refuses_sides_of_different_length():
    image = np.zeros((8, 8, 3), np.uint8)
    with pytest.raises(ValueError, match="2 prompts, but pictures for 2 before and 1 after"):
        before_after_grid(["a", "b"], [image, image], [image], [0, 0], [1])
