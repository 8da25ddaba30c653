"""Augmentation: each transform against numpy or by hand, the draws, both derivatives, and the adaptation."""

import math

import numpy as np
import pytest
import torch

from diffusers_endora.baselines.stylegan_v import augmentation
from diffusers_endora.baselines.stylegan_v.augmentation import (
    AdaptiveAugmentation,
    Transforms,
    apply_transforms,
    blit,
    draw_transforms,
    recolour,
    warp,
)

SIDE = 16


def clips(batch_size: int, side: int = SIDE) -> torch.Tensor:
    """Noise `(B, 2, 3, side, side)` in [-1, 1]."""
    return torch.rand(batch_size, 2, 3, side, side, generator=torch.Generator().manual_seed(0)) * 2 - 1


def smooth_clips(batch_size: int, side: int = 32) -> torch.Tensor:
    """Slow waves, the same in three colours, `(B, 2, 3, side, side)`."""
    y, x = torch.meshgrid(torch.arange(side) - (side - 1) / 2, torch.arange(side) - (side - 1) / 2, indexing="ij")
    return wave(x, y).expand(batch_size, 2, 3, side, side).contiguous()


def wave(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """Brightness at pixels from the centre."""
    return 0.5 * torch.sin(x / 5 + 0.3) + 0.4 * torch.cos(y / 4 - x / 9)


def number(value: float) -> torch.Tensor:
    return torch.tensor([value], dtype=torch.float64)


# --- blits -----------------------------------------------------------------------------------------------------------


def test_a_mirrored_clip_is_numpys():
    frames = clips(1)
    mirrored = blit(frames, augmentation.scaling(number(-1), 1.0))
    assert np.array_equal(mirrored.numpy(), np.flip(frames.numpy(), -1))


@pytest.mark.parametrize("quarters", [1, 2, 3])
def test_a_turned_clip_is_numpys(quarters):
    frames = clips(1)
    turned = blit(frames, augmentation.quarter_turn(number(quarters)))
    assert np.array_equal(turned.numpy(), np.rot90(frames.numpy(), -quarters, axes=(-2, -1)))  # y points down


def test_a_shifted_clip_is_reflected_at_the_border():
    frames = clips(1)
    shifted = blit(frames, augmentation.translation(number(2), number(-3))).numpy()
    padded = np.pad(frames.numpy(), [(0, 0)] * 3 + [(0, 3), (2, 0)], mode="reflect")
    assert np.array_equal(shifted, padded[..., 3:, :SIDE])
    assert np.array_equal(shifted[..., :-3, 2:], np.roll(frames.numpy(), (-3, 2), axis=(-2, -1))[..., :-3, 2:])


# --- general geometry ------------------------------------------------------------------------------------------------


def test_the_wavelet_is_orthonormal():
    taps = np.array(augmentation.SYM6)
    for shift in range(6):
        assert np.dot(taps[2 * shift :], taps[: 12 - 2 * shift]) == pytest.approx(float(shift == 0), abs=1e-9)
    assert taps.sum() == pytest.approx(math.sqrt(2))


def test_a_warp_that_moves_nothing_changes_nothing():
    frames = clips(2)
    assert torch.allclose(warp(frames, torch.eye(3, dtype=torch.float64).repeat(2, 1, 1)), frames, atol=1e-5)


def test_a_warp_by_whole_pixels_is_the_blit():
    frames = clips(1)
    moved = augmentation.translation(number(2), number(-3))
    assert torch.allclose(warp(frames, moved), blit(frames, moved), atol=1e-5)


@pytest.mark.parametrize(
    ("matrix", "old_point"),
    [
        (augmentation.translation(number(1.5), number(-0.25)), lambda x, y: (x - 1.5, y + 0.25)),
        (augmentation.scaling(number(1.2), number(1.2)), lambda x, y: (x / 1.2, y / 1.2)),
        (augmentation.scaling(number(1.25), number(0.8)), lambda x, y: (x / 1.25, y / 0.8)),
        (
            augmentation.rotation(number(0.3)),
            lambda x, y: (math.cos(0.3) * x + math.sin(0.3) * y, math.cos(0.3) * y - math.sin(0.3) * x),
        ),
    ],
    ids=["translation", "scaling", "stretch", "rotation"],
)
def test_a_warped_wave_is_the_wave_at_the_old_points(matrix, old_point):
    warped = warp(smooth_clips(1), matrix)
    y, x = torch.meshgrid(torch.arange(32) - 15.5, torch.arange(32) - 15.5, indexing="ij")
    expected = wave(*old_point(x, y))
    inner = slice(8, 24)  # where nothing comes from beyond the border
    assert (warped[0, 0, 0] - expected)[inner, inner].abs().max() < 0.01
    assert (warped[0, 0, 0] - smooth_clips(1)[0, 0, 0])[inner, inner].abs().max() > 0.05


# --- colours ---------------------------------------------------------------------------------------------------------


RED, GREEN, BLUE, GREY = (1.0, -1, -1), (-1.0, 1, -1), (-1.0, -1, 1), (0.5, 0.5, 0.5)


@pytest.mark.parametrize(
    ("matrix", "before", "after"),
    [
        (augmentation.brightness(number(0.25)), RED, (1.25, -0.75, -0.75)),
        (augmentation.contrast(number(2.0)), GREY, (1, 1, 1)),
        (augmentation.luma_flip(torch.tensor([True])), GREY, (-0.5, -0.5, -0.5)),
        # luma of red is -1/3: it becomes 1/3, and the distances from it stay 4/3, -2/3, -2/3
        (augmentation.luma_flip(torch.tensor([True])), RED, (5 / 3, -1 / 3, -1 / 3)),
        (augmentation.luma_flip(torch.tensor([False])), RED, RED),
        (augmentation.hue_rotation(number(2 * math.pi / 3)), RED, GREEN),
        (augmentation.hue_rotation(number(2 * math.pi / 3)), GREEN, BLUE),
        (augmentation.hue_rotation(number(math.pi)), RED, (-5 / 3, 1 / 3, 1 / 3)),
        (augmentation.hue_rotation(number(1.0)), GREY, GREY),
        (augmentation.saturation(number(0.0)), RED, (-1 / 3, -1 / 3, -1 / 3)),
        (augmentation.saturation(number(2.0)), RED, (7 / 3, -5 / 3, -5 / 3)),
        (augmentation.saturation(number(3.0)), GREY, GREY),
    ],
)
def test_colours_by_hand(matrix, before, after):
    frames = torch.tensor(before, dtype=torch.float64).view(1, 1, 3, 1, 1).expand(1, 2, 3, 2, 2)
    recoloured = recolour(frames, matrix)
    assert torch.allclose(recoloured, torch.tensor(after, dtype=torch.float64).view(3, 1, 1).expand_as(recoloured))


# --- whole clips -----------------------------------------------------------------------------------------------------


def always() -> AdaptiveAugmentation:
    augment = AdaptiveAugmentation()
    augment.probability.fill_(1)
    return augment


def test_without_probability_nothing_changes():
    frames = clips(3)
    assert AdaptiveAugmentation()(frames) is frames


def test_a_clip_is_changed_as_a_whole_and_apart_from_others():
    frames = clips(1)[:, :1].repeat(4, 2, 1, 1, 1)  # four clips of twice the same frame
    changed = always()(frames, torch.Generator().manual_seed(0))
    assert torch.equal(changed[:, 0], changed[:, 1])
    assert all((changed[i] - changed[j]).abs().max() > 0.1 for i in range(4) for j in range(i))


def test_clips_that_no_transform_meets_are_handed_through():
    frames, unit = clips(3), torch.eye(3, dtype=torch.float64).repeat(3, 1, 1)
    geometry = unit.clone()
    geometry[1] = augmentation.rotation(number(0.5))
    changed = apply_transforms(frames, Transforms(unit, geometry, torch.eye(4, dtype=torch.float64).repeat(3, 1, 1)))
    assert torch.equal(changed[[0, 2]], frames[[0, 2]])
    assert torch.equal(changed[1:2], warp(frames[1:2], geometry[1:2]))


def test_a_blit_before_a_warp_is_one_map():
    frames = smooth_clips(1)
    mirror, turn = augmentation.scaling(number(-1), 1.0), augmentation.rotation(number(0.4))
    changed = apply_transforms(frames, Transforms(mirror, turn, torch.eye(4, dtype=torch.float64)[None]))
    one_by_one = warp(blit(frames, mirror), turn)
    inner = slice(8, 24)
    assert (changed - one_by_one)[..., inner, inner].abs().max() < 0.01


def test_the_same_generator_draws_the_same():
    frames = clips(2)
    once, again = (always()(frames, torch.Generator().manual_seed(3)) for _ in range(2))
    assert torch.equal(once, again)
    assert not torch.equal(once, always()(frames, torch.Generator().manual_seed(4)))


def test_frames_of_another_shape_are_refused():
    with pytest.raises(ValueError, match=r"frames of shape \(2, 2, 3, 16, 8\): expected \(B, F, 3, H, W\) with H = W"):
        always()(clips(2)[..., :8])


# --- what is drawn ---------------------------------------------------------------------------------------------------


def drawn(probability: float, rotates: bool = True) -> Transforms:
    return draw_transforms(20_000, 64, probability, torch.Generator().manual_seed(0), rotates=rotates)


def test_each_transform_is_drawn_with_the_probability():
    transforms = drawn(0.3)
    shift = transforms.blits[:, :2, 2]
    turn = transforms.blits[:, :2, :2]
    move = transforms.geometry[:, :2, 2]
    assert (shift != 0).any(1).double().mean() == pytest.approx(0.3 * (1 - 1 / 17**2), abs=0.01)  # -8 to 8 pixels
    assert (move != 0).any(1).double().mean() == pytest.approx(0.3, abs=0.01)
    assert (turn.det() < 0).double().mean() == pytest.approx(0.15, abs=0.01)  # half of the mirrorings do nothing
    is_odd = turn[:, 0, 0] == 0  # a quarter to the left or right: half of the turns
    assert is_odd.double().mean() == pytest.approx(0.15, abs=0.01)
    angle_free = (transforms.geometry[:, 0, 1] == 0) & (transforms.geometry[:, 1, 0] == 0)
    assert (~angle_free).double().mean() == pytest.approx(0.3, abs=0.01)  # of two rotations together
    area = transforms.geometry[:, :2, :2].det()
    assert ((area - 1).abs() > 1e-9).double().mean() == pytest.approx(0.3, abs=0.01)  # scaled; stretching keeps it
    is_coloured = (transforms.colours != torch.eye(4)).flatten(1).any(1)
    assert is_coloured.double().mean() == pytest.approx(1 - 0.7**4 * 0.85, abs=0.01)


def test_ranges_and_spreads_are_the_papers():
    transforms = drawn(1.0)
    shift = transforms.blits[:, :2, 2]
    assert (shift.min(), shift.max()) == (-8, 8)
    assert torch.equal(shift, shift.round())
    assert transforms.geometry[:, :2, 2].std() == pytest.approx(64 / 8, rel=0.02)
    assert (transforms.geometry[:, :2, :2].det().log2() / 2).std() == pytest.approx(0.2, rel=0.02)
    grey = transforms.colours[:, :3, :3].sum(2)[:, 0].abs()  # what contrast and a flip make of grey
    assert grey.log2().std() == pytest.approx(0.5, rel=0.02)


def test_without_rotation_clips_keep_upright():
    transforms = drawn(1.0, rotates=False)
    assert (transforms.blits[:, 0, 1] == 0).all()
    assert (transforms.geometry[:, 0, 1] == 0).all()
    assert (transforms.blits[:, 0, 0] == -1).any()


# --- derivatives -----------------------------------------------------------------------------------------------------


def test_both_derivatives_by_the_frames_are_right():
    frames = torch.rand(2, 1, 3, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    frames.requires_grad_()
    transforms = draw_transforms(2, 4, 1.0, torch.Generator().manual_seed(1))

    def penalised(pixels: torch.Tensor) -> torch.Tensor:
        changed = apply_transforms(pixels, transforms)
        return changed.square().sum((1, 2, 3, 4)) + changed.sum((1, 2, 3, 4))

    assert torch.autograd.gradcheck(penalised, frames)
    assert torch.autograd.gradgradcheck(penalised, frames)


# --- adaptation ------------------------------------------------------------------------------------------------------


def test_the_probability_rises_with_overfitting_and_falls_without():
    augment = AdaptiveAugmentation(target=0.6, adaptation_clips=1000)
    augment.adapt(0.9, 100)
    assert augment.probability.item() == pytest.approx(0.1)
    augment.adapt(0.61, 50)  # by how much it is above does not matter
    assert augment.probability.item() == pytest.approx(0.15)
    augment.adapt(0.6, 50)
    assert augment.probability.item() == pytest.approx(0.15)
    augment.adapt(0.5, 50)
    assert augment.probability.item() == pytest.approx(0.1)
    augment.adapt(-1.0, 500)
    assert augment.probability.item() == 0
    augment.adapt(1.0, 5000)
    assert augment.probability.item() == 1
