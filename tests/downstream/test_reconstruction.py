"""Poses, depth and scenes from clips: against known truth, and what is refused."""

import contextlib
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from diffusers_endora.bundled import bundled_depth_model
from diffusers_endora.data.phantom import PhantomClip, render_phantom_clip
from diffusers_endora.downstream.reconstruction.cameras import pinhole_intrinsics, pose_errors
from diffusers_endora.downstream.reconstruction.gaussians import DeformableGaussians
from diffusers_endora.downstream.reconstruction.monocular_depth import (
    MonocularDepth,
    align_depth,
    photometric_poses,
)
from diffusers_endora.downstream.reconstruction.reconstruct import (
    check_frames,
    dense_depth,
    find_poses,
    held_out_views,
    reconstruct,
    with_given_poses,
)
from diffusers_endora.downstream.reconstruction.scene_files import (
    beside_source,
    looking_at,
    orbit,
    save_ply,
    save_reconstruction,
)
from diffusers_endora.downstream.reconstruction.scores import depth_scores, depth_total_variation, image_scores
from diffusers_endora.downstream.reconstruction.structure_from_motion import valid_pixels

pytest.importorskip("scipy", reason="needs scipy")


@pytest.fixture(scope="module")
def phantom() -> PhantomClip:
    """Eight frames, a quarter of a second apart."""
    return render_phantom_clip(9, 8, 96, 96, polyp=False, instrument=False, fps=4)


class KnownDepth:
    """Stands for a depth model: what it says is given."""

    def __init__(self, depth: np.ndarray) -> None:
        self.depth = depth

    def predict(self, frames: np.ndarray) -> np.ndarray:
        return self.depth


# --- poses and depth -------------------------------------------------------------------------------------------------


def test_poses_of_a_rendered_colon_are_found(phantom):
    pytest.importorskip("pycolmap", reason="needs pycolmap")
    said = []
    posed = find_poses(phantom.frames, phantom.intrinsics[0].astype(float), say=said.append)
    assert posed.path == "structure from motion"
    assert posed.registration_rate == 1
    assert said[0].startswith("path: structure from motion, registration rate 100% (8 of 8 frames)")
    errors = pose_errors(posed.camera_to_world, phantom.camera_to_world.astype(float))
    assert errors["ate_relative"] < 0.02
    assert errors["rpe_rotation_degrees"] < 1
    near_points = posed.depth_confidence > 0.9
    of_points = depth_scores(np.where(near_points, posed.depth, 0), phantom.depth)
    assert of_points["delta_1.25"] > 0.85


def test_poses_follow_from_known_depth(phantom):
    posed = find_poses(
        phantom.frames,
        phantom.intrinsics[0].astype(float),
        KnownDepth(phantom.depth),
        use_structure_from_motion=False,
        say=lambda _: None,
    )
    assert posed.path == "monocular depth"
    assert pose_errors(posed.camera_to_world, phantom.camera_to_world.astype(float))["ate_relative"] < 0.01


def test_a_shifted_picture_is_a_camera_that_moves_sideways():
    rng = np.random.default_rng(0)
    wide = np.kron(rng.integers(0, 255, (12, 16)), np.ones((6, 6)))  # 72 x 96
    frames = np.stack([wide[:64, 3 * i : 3 * i + 64] for i in range(3)])[..., None].repeat(3, -1).astype(np.uint8)
    intrinsics = pinhole_intrinsics(64, 64, 90.0)
    found = photometric_poses(frames, np.full((3, 64, 64), 2.0, np.float32), intrinsics, np.ones((3, 64, 64), bool))
    expected = 3 * 2.0 / intrinsics[0, 0]  # three pixels at depth 2
    np.testing.assert_allclose(found.camera_to_world[:, 0, 3], [0, expected, 2 * expected], rtol=0.02)
    np.testing.assert_allclose(found.camera_to_world[:, 1:3, 3], 0, atol=0.03 * expected)


def test_depth_is_aligned_by_scale_and_shift_of_its_inverse():
    rng = np.random.default_rng(0)
    inverse = rng.uniform(0.1, 1.0, (20, 20))
    points = rng.integers(0, 20, (60, 2))
    truth = 1 / (0.7 * inverse + 0.2)
    values = truth[points[:, 1], points[:, 0]]
    values[:5] *= 4  # outliers
    np.testing.assert_allclose(align_depth(1 / inverse, points.astype(float), values), truth, rtol=1e-4)


class SaysInverse(torch.nn.Module):
    """Stands for a model of inverse depth: 2 on the left half, 1 on the right; `pad` pixels of nothing around it."""

    def __init__(self, model_type: str, pad: int = 0) -> None:
        super().__init__()
        self.config = SimpleNamespace(model_type=model_type)
        halves = torch.cat([torch.full((1, 32, 16), 2.0), torch.ones(1, 32, 16)], 2)
        self.said = torch.nn.functional.pad(halves, (pad,) * 4, value=100.0)

    def forward(self, pixel_values):
        return SimpleNamespace(predicted_depth=self.said)


def processor(images, return_tensors):
    return {"pixel_values": torch.zeros(1, 3, 32, 32)}


def test_inverse_depth_is_turned_around():
    depth = MonocularDepth(SaysInverse("depth_anything"), processor, True).predict(np.zeros((1, 32, 32, 3), np.uint8))
    np.testing.assert_allclose(depth[0, :, 24:] / depth[0, :, :8], 2, rtol=1e-5)


def test_the_padding_of_zoedepth_is_cut_off():
    model = SaysInverse("zoedepth", pad=12)  # 3 sqrt(32 / 2) of 32 pixels
    depth = MonocularDepth(model, processor, False).predict(np.zeros((1, 32, 32, 3), np.uint8))
    np.testing.assert_allclose(depth[0, :, :16], 2, rtol=1e-5)
    np.testing.assert_allclose(depth[0, :, 16:], 1, rtol=1e-5)


def test_the_bundled_depth_model_knows_rendered_colons(phantom):
    model = MonocularDepth.from_pretrained(bundled_depth_model())
    assert not model.is_inverse
    assert depth_scores(model.predict(phantom.frames), phantom.depth)["abs_rel"] < 0.15


def test_a_depth_model_without_all_its_weights_is_refused(tmp_path):
    from safetensors.torch import load_file, save_file

    shutil.copytree(bundled_depth_model(), tmp_path / "model")
    path = tmp_path / "model" / "model.safetensors"
    tensors = load_file(path)
    save_file({name: value for name, value in tensors.items() if "head" not in name}, path, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"lacks .* tensors of its depth model"):
        MonocularDepth.from_pretrained(tmp_path / "model")
    path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(ValueError, match="its weights are damaged"):
        MonocularDepth.from_pretrained(tmp_path / "model")


def test_a_depth_model_fills_in_between_the_points(phantom):
    pytest.importorskip("pycolmap", reason="needs pycolmap")
    depth = 3 * phantom.depth  # in units of its own
    posed = find_poses(phantom.frames, phantom.intrinsics[0].astype(float), KnownDepth(depth), say=lambda _: None)
    assert posed.facts["depth_between_points"] == "depth model"
    assert depth_scores(posed.depth, phantom.depth)["abs_rel"] < 0.02
    np.testing.assert_array_equal(posed.depth_confidence, valid_pixels(phantom.frames))


def test_a_wrong_focal_length_is_refined_or_refused(phantom):
    pytest.importorskip("pycolmap", reason="needs pycolmap")
    guess = pinhole_intrinsics(96, 96, 40.0)  # it has 116 degrees
    with contextlib.suppress(ValueError):  # that few frames are registered
        posed = find_poses(phantom.frames, guess, refine_focal_length=True, say=lambda _: None)
        assert posed.facts["reprojection_error_pixels"] < 4


def test_depth_that_is_not_finite_is_refused(phantom):
    depth = phantom.depth.copy()
    depth[3, 5, 5] = np.nan
    posed = with_given_poses(phantom.frames, phantom.intrinsics[0], phantom.camera_to_world, np.nan_to_num(depth))
    with pytest.raises(ValueError, match="depth: expected finite positive numbers"):
        reconstruct(posed, num_gaussians=50, num_steps=1)


def test_depth_between_points_is_theirs_at_them_and_bounded_by_them():
    pixels, values = np.array([[2.0, 3.0], [10.0, 12.0], [14.0, 1.0]]), np.array([1.0, 4.0, 2.0])
    depth, confidence = dense_depth(pixels, values, 16, 16)
    assert confidence[3, 2] == 1
    assert depth[3, 2] == pytest.approx(1.0, rel=0.05)
    assert depth.min() >= 1
    assert depth.max() <= 4


def test_border_and_highlights_are_not_valid():
    frames = np.full((2, 32, 32, 3), 100, np.uint8)
    frames[:, :, :4] = 3  # border
    frames[:, 14:18, 20:24] = 3  # dark, but inside
    frames[1, 8, 15] = 255
    valid = valid_pixels(frames)
    assert not valid[:, :, :4].any()
    assert valid[0, 8, 15]
    assert not valid[1, 6:11, 13:18].any()
    assert valid[:, 14:18, 20:24].all()


# --- the scene -------------------------------------------------------------------------------------------------------


def test_every_eighth_view_is_held_out():
    assert np.flatnonzero(held_out_views(24)).tolist() == [4, 12, 20]


def test_a_scene_of_true_poses_shows_held_out_views_and_its_files_open(phantom, tmp_path):
    intrinsics, poses = phantom.intrinsics[0].astype(float), phantom.camera_to_world.astype(float)
    posed = with_given_poses(phantom.frames, intrinsics, poses, phantom.depth)
    result = reconstruct(posed, num_gaussians=1000, num_steps=30)
    mean_colour = phantom.frames[4].mean((0, 1)) / 255
    of_mean = -10 * np.log10(np.square(phantom.frames[4] / 255 - mean_colour).mean())
    assert result.scores["held_out"]["psnr"]["mean"] > of_mean + 5
    assert result.scores["held_out"]["psnr"]["n"] == 1
    _, depth = result.render()
    assert depth_scores(depth, phantom.depth)["delta_1.25"] > 0.9
    assert beside_source(result).shape == (8, 96, 288, 3)
    assert orbit(result).shape == (48, 96, 96, 3)
    folder = save_reconstruction(tmp_path / "scene", result, 8.0, {"seed": 9})
    assert sorted(path.name for path in folder.iterdir()) == [
        *("beside_source.mp4", "orbit.mp4", "reconstruction.json", "scene.ply")
    ]


def test_a_ply_has_the_properties_of_splatting_viewers(tmp_path):
    means, colours = torch.tensor([[1.0, 2, 3], [4, 5, 6]]), torch.tensor([[0.5, 0.5, 0.5], [1, 0, 0.25]])
    scene = DeformableGaussians(means, torch.tensor([0.1, 0.2]), colours, num_basis=1, opacity=0.6)
    with torch.no_grad():
        scene.motion[0, 0] = torch.tensor([1.0, 0, 0])
    content = save_ply(tmp_path / "scene.ply", scene, time=0.0).read_bytes()
    header, table = content.split(b"end_header\n")
    names = [line.split()[-1].decode() for line in header.splitlines() if line.startswith(b"property float")]
    values = np.frombuffer(table, "<f4").reshape(2, len(names))
    vertices = {name: values[:, i] for i, name in enumerate(names)}
    assert b"element vertex 2\n" in header
    assert b"format binary_little_endian 1.0\n" in header
    np.testing.assert_allclose(vertices["x"], [2, 4])  # cos(0) = 1: the first has moved by 1
    np.testing.assert_allclose(vertices["f_dc_0"], [0, 0.5 / 0.28209479], rtol=1e-6)
    np.testing.assert_allclose(vertices["opacity"], np.log(0.6 / 0.4), rtol=1e-6)
    np.testing.assert_allclose(vertices["scale_2"], np.log([0.1, 0.2]), rtol=1e-6)
    np.testing.assert_allclose(vertices["rot_0"], 1)


def test_motion_is_a_sum_of_cosines():
    scene = DeformableGaussians(torch.zeros(1, 3), torch.ones(1), torch.zeros(1, 3), num_basis=2)
    with torch.no_grad():
        scene.motion[0, 0, 0], scene.motion[1, 0, 0] = 1.0, 0.5
    places = [scene.at(time)[0][0, 0].item() for time in (0.0, 0.5, 1.0)]
    np.testing.assert_allclose(places, [1.5, -0.5, -0.5], atol=1e-6)


def test_a_camera_looks_at_its_target():
    position, target = np.array([0.3, -0.2, 0.1]), np.array([0.0, 0, 2])
    pose = looking_at(position, target)
    in_camera = np.linalg.inv(pose) @ [*target, 1]
    np.testing.assert_allclose(in_camera[:3], [0, 0, np.linalg.norm(target - position)], atol=1e-12)
    np.testing.assert_allclose(pose[:3, :3].T @ pose[:3, :3], np.eye(3), atol=1e-12)
    assert np.linalg.det(pose[:3, :3]) == pytest.approx(1)


# --- scores ----------------------------------------------------------------------------------------------------------


def test_depth_scores_by_hand():
    truth, predicted = np.array([1.0, 2, 4, 0]), np.array([2.0, 4, 12, 5])
    assert depth_scores(predicted, truth) == {
        "abs_rel": pytest.approx(0.5 / 3),  # after the median ratio of 1/2: 1, 2, 6
        "delta_1.25": pytest.approx(2 / 3),
    }
    assert depth_scores(predicted, truth, "none")["abs_rel"] == pytest.approx((1 + 1 + 2) / 3)
    with pytest.raises(ValueError, match="found none"):
        depth_scores(np.zeros(3), np.ones(3))


def test_depth_total_variation_of_a_ramp_and_a_plane():
    ramp = 1 + torch.arange(5.0).expand(1, 4, 5)
    assert depth_total_variation(ramp).item() == pytest.approx(1 / 3)  # a step of 1 across, over a mean of 3
    assert depth_total_variation(7 * ramp).item() == pytest.approx(1 / 3)
    assert depth_total_variation(torch.ones(1, 4, 5)).item() == 0


def test_psnr_by_hand():
    frames = torch.full((1, 3, 16, 16), 0.5)
    scores = image_scores(frames + 0.1, frames)
    assert scores["psnr"][0] == pytest.approx(20, abs=1e-4)
    assert image_scores(frames, frames)["ssim"][0] == pytest.approx(1)
    assert "lpips" not in scores


# --- bad input -------------------------------------------------------------------------------------------------------


def noise(num_frames: int = 8) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (num_frames, 64, 64, 3), dtype=np.uint8)


def test_too_few_frames_are_refused():
    with pytest.raises(ValueError, match="the clip has 1 frames: expected 8 or more"):
        check_frames(noise(1))


def test_black_frames_are_refused():
    with pytest.raises(ValueError, match="8 of 8 frames are black or of one colour"):
        check_frames(np.zeros((8, 64, 64, 3), np.uint8))


def test_a_clip_that_stands_still_is_refused():
    with pytest.raises(ValueError, match="the clip stands still"):
        check_frames(noise(1).repeat(8, axis=0))


def standing_still() -> np.ndarray:
    """One frame with sensor noise."""
    frame = render_phantom_clip(9, 1, 64, 64, polyp=False, instrument=False).frames.astype(float)
    frames = frame + np.random.default_rng(0).normal(0, 2, (8, 64, 64, 3))
    return frames.clip(0, 255).astype(np.uint8)


def without_overlap() -> np.ndarray:
    """Frames of eight places, ten seconds of flight apart."""
    return render_phantom_clip(9, 8, 64, 64, polyp=False, instrument=False, fps=0.1).frames


BAD_CLIPS = {"noise": noise, "standing still": standing_still, "without overlap": without_overlap}


@pytest.mark.parametrize(
    "name", ["noise", *(pytest.param(name, marks=pytest.mark.slow) for name in ("standing still", "without overlap"))]
)
def test_structure_from_motion_of_a_bad_clip_fails_and_says_so(name):
    pytest.importorskip("pycolmap", reason="needs pycolmap")
    with pytest.raises(ValueError, match=r"registration rate \d+%: structure from motion registered .* --depth_model"):
        find_poses(BAD_CLIPS[name](), pinhole_intrinsics(64, 64, 116.0))


@pytest.mark.parametrize(
    ("name", "reason"),
    [("noise", "do not look alike"), ("standing still", "stands still"), ("without overlap", "do not look alike")],
)
def test_depth_makes_no_poses_of_a_bad_clip(name, reason):
    depth = KnownDepth(np.ones((8, 64, 64), np.float32))
    with pytest.raises(ValueError, match=f"registration rate not tried: .* by monocular depth, .*{reason}"):
        find_poses(
            BAD_CLIPS[name](),
            pinhole_intrinsics(64, 64, 116.0),
            depth,
            use_structure_from_motion=False,
            say=lambda _: None,
        )


@pytest.mark.slow
def test_the_whole_way_on_a_rendered_colon():
    """Structure from motion, then the fit: what docs/reconstruction.md reports, with room."""
    pytest.importorskip("pycolmap", reason="needs pycolmap")
    clip = render_phantom_clip(19, 16, 128, 128, instrument=False)
    posed = find_poses(clip.frames, clip.intrinsics[0].astype(float))
    result = reconstruct(posed, num_steps=150)
    _, depth = result.render()
    assert pose_errors(posed.camera_to_world, clip.camera_to_world.astype(float))["ate_relative"] < 0.01
    assert depth_scores(depth, clip.depth)["delta_1.25"] > 0.85
    assert result.scores["held_out"]["psnr"]["mean"] > 25
