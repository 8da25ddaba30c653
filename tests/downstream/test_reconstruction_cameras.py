"""Cameras, alignment and pose errors against known motions."""

import numpy as np
import pytest
import torch
from scipy.spatial.transform import Rotation

from diffusers_endora.downstream.reconstruction.cameras import (
    align_points,
    align_poses,
    pinhole_intrinsics,
    pose_errors,
    project,
    resized_intrinsics,
    se3_exponential,
    transform,
    unproject,
)


def path_of_poses(num_frames: int = 7) -> np.ndarray:
    """A path that is straight along z, with turns: what centres alone cannot align."""
    poses = np.tile(np.eye(4), (num_frames, 1, 1))
    poses[:, :3, :3] = Rotation.from_euler(
        "xyz", np.linspace(0, 0.3, num_frames)[:, None] * [1, -0.5, 0.7]
    ).as_matrix()
    poses[:, 2, 3] = 2.0 * np.arange(num_frames)
    return poses


def moved(poses: np.ndarray) -> np.ndarray:
    """The same path in another world: half as large, turned and shifted."""
    rotation = Rotation.from_euler("xyz", [0.4, 1.0, -2.0]).as_matrix()
    other = poses.copy()
    other[:, :3, :3] = rotation @ poses[:, :3, :3]
    other[:, :3, 3] = 0.5 * poses[:, :3, 3] @ rotation.T + [1.0, -2.0, 3.0]
    return other


def test_pixels_return_through_depth():
    intrinsics = torch.from_numpy(pinhole_intrinsics(6, 8, 100.0))
    depth = 1 + torch.rand(6, 8, dtype=torch.float64)
    pixels = project(unproject(depth, intrinsics), intrinsics)
    rows, columns = torch.meshgrid(torch.arange(6.0), torch.arange(8.0), indexing="ij")
    torch.testing.assert_close(pixels, torch.stack([columns, rows], -1).double(), rtol=0, atol=1e-12)


def test_field_of_view_is_across_the_diagonal():
    intrinsics = pinhole_intrinsics(30, 40, 90.0)
    assert intrinsics[0, 0] == pytest.approx(25.0)  # half of the diagonal of 50 pixels, times cot 45 degrees
    assert intrinsics[:2, 2].tolist() == [19.5, 14.5]


def test_resizing_keeps_the_edges():
    double = resized_intrinsics(pinhole_intrinsics(30, 40, 90.0), 2)
    np.testing.assert_allclose(double, pinhole_intrinsics(60, 80, 90.0))


def test_se3_exponential_of_a_turn_and_at_zero():
    turn = se3_exponential(torch.tensor([0.0, 0, 0, 0, 0, np.pi / 2], dtype=torch.float64))
    torch.testing.assert_close(transform(turn, torch.tensor([1.0, 0, 2]).double()), torch.tensor([0.0, 1, 2]).double())
    assert torch.autograd.gradcheck(se3_exponential, torch.zeros(6, dtype=torch.float64, requires_grad=True))


def test_similarity_is_found_again():
    points = np.random.default_rng(0).normal(size=(9, 3))
    rotation = Rotation.from_euler("xyz", [0.3, -1.2, 2.0]).as_matrix()
    found = align_points(points, 2.5 * points @ rotation.T + [1, 2, 3])
    assert found.scale == pytest.approx(2.5)
    np.testing.assert_allclose(found.rotation, rotation, atol=1e-12)
    np.testing.assert_allclose(found.translation, [1, 2, 3], atol=1e-12)


def test_a_mirrored_cloud_is_not_turned_into_a_reflection():
    points = np.random.default_rng(1).normal(size=(20, 3))
    assert np.linalg.det(align_points(points, points * [1, 1, -1]).rotation) == pytest.approx(1)


def test_pose_errors_vanish_for_the_same_path_in_another_world():
    errors = pose_errors(moved(path_of_poses()), path_of_poses())
    assert errors["ate"] < 1e-10
    assert errors["rpe_translation"] < 1e-10
    assert errors["rpe_rotation_degrees"] < 1e-5
    assert errors["path_length"] == pytest.approx(12.0)


def test_pose_errors_of_one_turned_camera():
    truth, estimated = path_of_poses(), path_of_poses()
    estimated[3, :3, :3] = estimated[3, :3, :3] @ Rotation.from_rotvec([0, 0, np.deg2rad(6)]).as_matrix()
    # both steps at that camera are off by about six degrees, of six: 6 sqrt(2 / 6)
    assert pose_errors(estimated, truth)["rpe_rotation_degrees"] == pytest.approx(6 * np.sqrt(2 / 6), rel=1e-6)


@pytest.mark.parametrize("poses", [path_of_poses(1), np.tile(np.eye(4), (5, 1, 1))])
def test_a_path_that_does_not_move_has_no_alignment(poses):
    with pytest.raises(ValueError, match="one place"):
        align_poses(poses, poses)
