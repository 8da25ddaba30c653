"""A contact sheet shows every frame where it belongs, pixel for pixel."""

import numpy as np
import pytest
from PIL import Image

from diffusers_endora.data import contact_sheet
from diffusers_endora.data.contact_sheet import save_contact_sheet


def clips(batch: int, num_frames: int, height: int, width: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (batch, num_frames, height, width, 3), dtype=np.uint8)


def test_a_row_per_clip_and_frames_from_left_to_right(tmp_path):
    batch = clips(2, 3, 70, 64)
    path = save_contact_sheet(tmp_path / "sheet.png", batch, gap=4, background=9)
    sheet = np.array(Image.open(path))
    assert sheet.shape == (2 * 70 + 4, 3 * 64 + 2 * 4, 3)
    for row in range(2):
        for column in range(3):
            tile = sheet[row * 74 : row * 74 + 70, column * 68 : column * 68 + 64]
            np.testing.assert_array_equal(tile, batch[row, column])
    assert (sheet[70:74] == 9).all()
    assert (sheet[:, 64:68] == 9).all()


def test_small_frames_are_enlarged_by_whole_pixels(tmp_path):
    batch = clips(1, 1, 20, 30)  # 20 x 4 = 80 is the first multiple of 20 that reaches 64
    sheet = np.array(Image.open(save_contact_sheet(tmp_path / "sheet.png", batch)))
    np.testing.assert_array_equal(sheet, np.kron(batch[0, 0], np.ones((4, 4, 1), np.uint8)))


def test_long_clips_are_shown_from_the_first_to_the_last_frame(tmp_path):
    batch = clips(1, 31, 64, 64)
    sheet = np.array(Image.open(save_contact_sheet(tmp_path / "sheet.png", batch, max_frames=4, gap=0)))
    np.testing.assert_array_equal(sheet, np.concatenate(batch[0, [0, 10, 20, 30]], axis=1))


@pytest.mark.parametrize(
    ("name", "batch", "arguments", "message"),
    [
        ("sheet.jpg", clips(1, 1, 8, 8), {}, r"sheet.jpg: .*expected a name that ends in .png"),
        ("sheet.png", clips(1, 1, 8, 8)[0], {}, r"clips: expected the shape \(B, F, H, W, 3\) .*got \(1, 8, 8, 3\)"),
        ("sheet.png", clips(1, 1, 8, 8) / 255, {}, r"clips: expected a uint8 numpy array"),
        ("sheet.png", clips(1, 1, 8, 8)[:0], {}, r"no empty axis, got \(0, 1, 8, 8, 3\)"),
        ("sheet.png", clips(1, 1, 8, 8), {"max_frames": 0}, r"max_frames=0: expected a positive integer"),
    ],
)
def test_bad_arguments(name, batch, arguments, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        save_contact_sheet(tmp_path / name, batch, **arguments)
    assert not list(tmp_path.iterdir())


def test_a_failure_leaves_the_old_sheet(tmp_path, monkeypatch):
    path = tmp_path / "sheet.png"
    path.write_bytes(b"before")

    class Broken:
        def save(self, name, format):
            name.write_bytes(b"half a picture")
            raise OSError("disk full")

    monkeypatch.setattr(contact_sheet.Image, "fromarray", lambda _: Broken())
    with pytest.raises(OSError, match="disk full"):
        save_contact_sheet(path, clips(1, 1, 8, 8))
    assert [(p.name, p.read_bytes()) for p in tmp_path.iterdir()] == [("sheet.png", b"before")]
