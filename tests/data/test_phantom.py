"""The phantom colon: repeatable, right in its geometry, honest in its labels, fast enough to render in a test."""

import os
import subprocess
import sys
import time
from dataclasses import fields

import numpy as np
import pytest

from diffusers_endora.data import phantom
from diffusers_endora.data.phantom import CLASSES, PhantomClip, render_phantom_clip, write_phantom_corpus
from diffusers_endora.data.video_io import read_frames, read_video_info


def assert_same(a: PhantomClip, b: PhantomClip, num_frames: int | None = None) -> None:
    for field in fields(PhantomClip):
        x, y = (np.asarray(getattr(clip, field.name)) for clip in (a, b))
        np.testing.assert_array_equal(x[:num_frames] if x.ndim else x, y[:num_frames] if y.ndim else y, field.name)


def points_in_other_camera(clip: PhantomClip, i: int, j: int) -> np.ndarray:
    """What frame i sees, back-projected with its depth, in the camera of frame j: (3, H * W), mm."""
    height, width = clip.depth.shape[1:]
    v, u = np.mgrid[:height, :width].reshape(2, -1)
    rays = np.linalg.inv(clip.intrinsics[i].astype(float)) @ np.stack([u, v, np.ones_like(u)])
    points = np.concatenate([rays * clip.depth[i].ravel(), np.ones((1, u.size))])
    world_to_j = np.linalg.inv(clip.camera_to_world[j].astype(float))
    return (world_to_j @ clip.camera_to_world[i].astype(float) @ points)[:3]


def depth_around(clip: PhantomClip, j: int, points: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Depth of each point that frame j's image contains, and the depths of the four pixels around it (4, N)."""
    u, v, z = clip.intrinsics[j].astype(float) @ points
    height, width = clip.depth.shape[1:]
    column, row = u / z, v / z
    inside = (z > 0) & (column >= 0) & (column < width - 1) & (row >= 0) & (row < height - 1)
    column, row = column[inside].astype(int), row[inside].astype(int)
    return z[inside], np.stack([clip.depth[j, row + a, column + b] for a in (0, 1) for b in (0, 1)])


@pytest.fixture(scope="module")
def polyp_clip() -> PhantomClip:
    return render_phantom_clip(4, polyp=True, instrument=False)


def test_shapes_and_dtypes():
    clip = render_phantom_clip(np.int64(3), 3, 33, 70, polyp=True, instrument=True, fps=12)
    expected = {
        "frames": ((3, 33, 70, 3), np.uint8),
        "depth": ((3, 33, 70), np.float32),
        "camera_to_world": ((3, 4, 4), np.float32),
        "intrinsics": ((3, 3, 3), np.float32),
        "polyp_visible": ((3,), np.bool_),
        "instrument_visible": ((3,), np.bool_),
    }
    assert {name: (getattr(clip, name).shape, getattr(clip, name).dtype) for name in expected} == expected
    assert (clip.has_polyp, clip.has_instrument, clip.fps) == (True, True, 12.0)


def test_one_pixel_is_enough():
    assert render_phantom_clip(0, 1, 1, 1).frames.shape == (1, 1, 1, 3)


def test_same_seed_same_bytes():
    kwargs = {"seed": 11, "num_frames": 3, "height": 48, "width": 40, "polyp": True, "instrument": True}
    assert_same(render_phantom_clip(**kwargs), render_phantom_clip(**kwargs))


def test_bytes_do_not_depend_on_the_number_of_threads():
    script = (
        "import hashlib, runpy, sys; render = runpy.run_path(sys.argv[1])['render_phantom_clip'];"
        "clip = render(5, 1, polyp=True, instrument=True);"
        "print(hashlib.sha256(clip.frames.tobytes() + clip.depth.tobytes()).hexdigest())"
    )
    digests = set()
    for threads in "12":
        environment = os.environ | dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS"), threads)
        command = [sys.executable, "-c", script, phantom.__file__]
        digests.add(subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout)
    assert len(digests) == 1


def test_different_seeds_differ():
    a, b = (render_phantom_clip(seed, 1, 64, 64, polyp=False, instrument=False) for seed in (0, 1))
    assert np.abs(a.depth - b.depth).mean() > 1
    assert np.abs(a.frames.astype(int) - b.frames).mean() > 5


def test_longer_clip_continues_the_flight():
    short, long = (render_phantom_clip(7, n, 32, 32, polyp=True, instrument=True) for n in (3, 40))
    assert_same(short, long, num_frames=3)


def test_size_changes_the_sampling_and_not_the_scene():
    small, large = (render_phantom_clip(2, 2, size, size, polyp=True, instrument=True) for size in (41, 123))
    np.testing.assert_array_equal(small.camera_to_world, large.camera_to_world)
    # the centre of pixel i of 41 is the centre of pixel 3 i + 1 of 123
    np.testing.assert_allclose(small.depth, large.depth[:, 1::3, 1::3], rtol=1e-3)
    assert np.corrcoef(small.frames.ravel(), large.frames[:, 1::3, 1::3].ravel())[0, 1] > 0.95


def test_frame_rate_samples_the_same_flight():
    slow, fast = (render_phantom_clip(2, n, 24, 24, fps=fps) for n, fps in ((3, 4), (5, 8)))
    np.testing.assert_allclose(slow.depth, fast.depth[::2], rtol=1e-4)


def test_poses_are_rigid_and_advance_a_few_millimetres():
    for seed in range(3):
        poses = render_phantom_clip(seed, 16, 4, 4).camera_to_world.astype(float)
        rotation = poses[:, :3, :3]
        np.testing.assert_allclose(rotation @ rotation.swapaxes(1, 2), np.tile(np.eye(3), (16, 1, 1)), atol=1e-6)
        np.testing.assert_allclose(np.linalg.det(rotation), 1, atol=1e-6)
        np.testing.assert_array_equal(poses[:, 3], np.tile([0, 0, 0, 1], (16, 1)))
        moves = np.diff(poses[:, :3, 3], axis=0)
        assert 0.5 < np.linalg.norm(moves, axis=1).min() <= np.linalg.norm(moves, axis=1).max() < 5
        assert ((moves * rotation[:-1, :, 2]).sum(1) > 0).all()  # z is forward
        turns = np.trace(rotation[:-1].swapaxes(1, 2) @ rotation[1:], axis1=1, axis2=2)
        assert np.degrees(np.arccos((turns - 1) / 2)).max() < 12


@pytest.mark.parametrize(("i", "j"), [(0, 5), (5, 0), (3, 4)])
def test_frames_see_one_surface(polyp_clip, i, j):
    """A point that frame i sees has the depth that frame j has there, or is hidden behind it, but never before it."""
    z, around = depth_around(polyp_clip, j, points_in_other_camera(polyp_clip, i, j))
    low, high = around.min(0), around.max(0)
    assert len(z) > 2000
    assert (z > 0.98 * low).mean() > 0.999
    visible = z < 1.02 * high
    assert visible.mean() > 0.7
    smooth = visible & (high < 1.03 * low)  # where the four pixels bound the surface between them
    assert smooth.sum() > 2000
    assert np.mean((z[smooth] > 0.997 * low[smooth]) & (z[smooth] < 1.003 * high[smooth])) > 0.99


def test_wrong_depth_would_not_pass():
    """The property above is sharp: a depth along the ray instead of the axis breaks it."""
    clip = render_phantom_clip(4, 6, polyp=True, instrument=False)
    v, u = np.mgrid[:128, :128]
    x, y = (
        (u - clip.intrinsics[0, 0, 2]) / clip.intrinsics[0, 0, 0],
        (v - clip.intrinsics[0, 1, 2]) / clip.intrinsics[0, 1, 1],
    )
    clip.depth[:] *= np.sqrt(x * x + y * y + 1)
    with pytest.raises(AssertionError):
        test_frames_see_one_surface(clip, 0, 5)


def test_depth_is_positive_and_ends_at_a_wall():
    for seed in range(3):
        depth = render_phantom_clip(seed, 4, 48, 48, polyp=True, instrument=True, fps=0.5).depth
        assert np.isfinite(depth).all()
        assert depth.min() > 1
        assert depth.max() < 240  # mm; the renderer looks 250 mm far along the bent centreline


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_labels(seed):
    for polyp, instrument in ((True, False), (False, True)):
        clip = render_phantom_clip(seed, 16, 48, 48, polyp=polyp, instrument=instrument)
        assert (clip.has_polyp, clip.has_instrument) == (polyp, instrument)
        for visible, placed in ((clip.polyp_visible, polyp), (clip.instrument_visible, instrument)):
            assert visible.mean() >= 0.7 if placed else not visible.any()


def test_an_object_changes_only_what_it_should():
    plain, tool = (render_phantom_clip(6, 1, 64, 64, polyp=False, instrument=i) for i in (False, True))
    assert (tool.depth <= plain.depth).all()
    covered = tool.depth < plain.depth
    assert 0.01 < covered.mean() < 0.5
    border = np.concatenate([covered[0, 0], covered[0, -1], covered[0, :, 0], covered[0, :, -1]])
    assert border.any()  # the shaft enters from the border


def test_the_seed_decides_what_is_not_asked_for():
    drawn = [render_phantom_clip(seed, 1, 2, 2) for seed in range(6)]
    assert {clip.has_polyp for clip in drawn} == {clip.has_instrument for clip in drawn} == {False, True}
    asked = render_phantom_clip(0, 1, 8, 8, polyp=drawn[0].has_polyp, instrument=drawn[0].has_instrument)
    assert_same(asked, render_phantom_clip(0, 1, 8, 8))


def test_light_falls_off_with_depth():
    for seed in range(2):
        clip = render_phantom_clip(seed, 4, 64, 64, polyp=False, instrument=False)
        assert np.corrcoef(np.log(clip.depth).ravel(), clip.frames.mean(-1).ravel())[0, 1] < -0.5


def test_mucosa_is_red_and_the_lumen_dark():
    frames = np.concatenate([render_phantom_clip(seed, 1, polyp=False, instrument=False).frames for seed in range(3)])
    red, green, blue = frames.reshape(-1, 3).mean(0)
    assert red > 1.3 * green > 1.3 * blue
    assert np.quantile(frames.max(-1), 0.02) < 100 < np.median(frames.max(-1))


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"seed": 0, "num_frames": 0}, "num_frames=0: expected a positive integer"),
        ({"seed": 0, "height": -3}, "height=-3: expected a positive integer"),
        ({"seed": 0, "width": 12.5}, "width=12.5: expected a positive integer"),
        ({"seed": -1}, "seed=-1: expected a non-negative integer"),
        ({"seed": 0, "fps": 0}, "fps=0: expected a positive number"),
        ({"seed": 0, "fps": float("nan")}, "fps=nan: expected a positive number"),
    ],
)
def test_wrong_arguments(kwargs, message):
    with pytest.raises(ValueError, match=f"^{message}$"):
        render_phantom_clip(**kwargs)


def test_corpus(tmp_path):
    paths = write_phantom_corpus(tmp_path, 4, num_frames=3, height=48, width=64, seed=20)
    names = [f"{label}/{label}_{20 + i:06d}.mp4" for i, label in enumerate((*CLASSES, CLASSES[0]))]
    assert [path.relative_to(tmp_path).as_posix() for path in paths] == names
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(CLASSES)
    info = read_video_info(paths[1])
    assert (info.num_frames, info.height, info.width, info.fps) == (3, 48, 64, 8)
    rendered = render_phantom_clip(21, 3, 48, 64, polyp=True, instrument=False).frames
    assert np.abs(read_frames(paths[1], range(3)).astype(int) - rendered).mean() < 6
    with pytest.raises(ValueError, match=r"^num_videos=0: expected a positive integer$"):
        write_phantom_corpus(tmp_path, 0)


def test_a_clip_takes_under_two_seconds_of_one_core():
    render_phantom_clip(0, 1)
    seconds = []
    for seed in range(2):
        start = time.process_time()
        render_phantom_clip(seed, polyp=True, instrument=True)
        seconds.append(time.process_time() - start)
    assert min(seconds) < 2  # measured: 1.0
