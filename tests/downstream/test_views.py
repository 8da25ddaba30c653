"""Views: what is done to one frame is done to all."""

import numpy as np
import pytest
from PIL import Image

from diffusers_endora.downstream.semi_supervised import views
from diffusers_endora.downstream.semi_supervised.views import (
    GREY,
    OPERATIONS,
    apply_operation,
    cut_out,
    strong_view,
    weak_view,
)


def picture(height: int = 24, width: int = 32) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)


def still_clip(num_frames: int = 5) -> np.ndarray:
    """A clip whose frames are all the same, uint8 `(F, 24, 32, 3)`."""
    return np.repeat(picture()[None], num_frames, axis=0)


@pytest.mark.parametrize("view", [weak_view, strong_view])
def test_all_frames_of_a_clip_are_treated_alike(view):
    changed = 0
    for seed in range(40):
        seen = view(still_clip(), np.random.default_rng(seed))
        assert seen.shape == (5, 24, 32, 3)
        assert seen.dtype == np.uint8
        assert (seen == seen[:1]).all()
        changed += not np.array_equal(seen[0], picture())
    assert changed > 30


@pytest.mark.parametrize("name", OPERATIONS)
@pytest.mark.parametrize("strength", [0.0, 0.4, 1.0])
def test_an_operation_treats_frames_alike(name, strength):
    seen = apply_operation(still_clip(), name, strength)
    assert seen.shape == (5, 24, 32, 3)
    assert (seen == seen[:1]).all()
    is_unchanged = np.array_equal(seen[0], picture())
    # noise fills all levels, so that nothing is left to stretch
    if name in ("identity", "autocontrast"):
        assert is_unchanged
    elif strength == 0:
        assert not is_unchanged


def test_histograms_are_of_the_whole_clip():
    dark, bright = np.full((1, 8, 8, 3), 60, np.uint8), np.full((1, 8, 8, 3), 120, np.uint8)
    seen = apply_operation(np.concatenate([dark, bright]), "autocontrast", 0.0)
    assert seen[0].max() == 0  # of a frame of its own nothing would be stretched
    assert seen[1].min() == 255


def test_views_are_functions_of_the_random_numbers():
    clip = np.random.default_rng(1).integers(0, 256, (3, 24, 32, 3), dtype=np.uint8)
    for view in (weak_view, strong_view):
        first, again, other = (view(clip, np.random.default_rng(seed)) for seed in (7, 7, 8))
        assert np.array_equal(first, again)
        assert not np.array_equal(first, other)


def test_a_flip_is_a_flip(monkeypatch):
    monkeypatch.setattr(views, "MAX_SHIFT", 0.0)
    seen = {weak_view(still_clip(), np.random.default_rng(seed)).tobytes() for seed in range(20)}
    assert seen == {still_clip().tobytes(), still_clip()[:, :, ::-1].tobytes()}


def test_a_weak_view_is_shifted_by_at_most_an_eighth():
    position = np.zeros((1, 24, 32, 3), np.uint8)
    position[..., 0], position[..., 1] = np.arange(32), np.arange(24)[:, None]
    for seed in range(30):
        seen = weak_view(position, np.random.default_rng(seed))[0]
        columns, rows = seen[8:16, 8:24, 0].astype(int), seen[8:16, 8:24, 1].astype(int)
        if columns[0, 0] > columns[0, -1]:
            columns = 31 - columns
        right, down = columns - np.arange(8, 24), rows - np.arange(8, 16)[:, None]
        assert np.ptp(right) == np.ptp(down) == 0
        assert abs(right[0, 0]) <= 4
        assert abs(down[0, 0]) <= 3


def test_geometry():
    clip = still_clip(1)
    shifted = apply_operation(clip, "translate_x", 1.0)  # 0.3 * 32 = 9.6 pixels, to the nearest
    assert np.array_equal(shifted[:, :, :22], clip[:, :, 10:])
    assert (shifted[:, :, 23:] == GREY).all()
    ends = {name: OPERATIONS[name][:2] for name in ("rotate", "brightness", "posterize")}
    assert ends == {"rotate": (-30, 30), "brightness": (0.05, 0.95), "posterize": (4, 8)}
    square = still_clip(1)[:, :, :24]
    quarter = views._rotation(90, 24, 24)
    turned = Image.fromarray(square[0]).transform((24, 24), Image.Transform.AFFINE, quarter)
    assert np.array_equal(np.asarray(turned), np.rot90(square[0], -1))


def test_cutout_is_one_grey_square_at_one_place():
    clip = np.zeros((3, 24, 32, 3), np.uint8)
    sides = []
    for seed in range(50):
        seen = cut_out(clip, np.random.default_rng(seed))
        assert (seen == seen[:1]).all()
        rows, columns = np.nonzero(seen[0, ..., 0] == GREY)
        if len(rows):
            assert len(rows) == (np.ptp(rows) + 1) * (np.ptp(columns) + 1)
            sides.append(max(np.ptp(rows), np.ptp(columns)) + 1)
    assert 12 <= max(sides) <= 16
    assert not clip.any()
