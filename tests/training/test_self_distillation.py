import pytest
import torch
from transformers import ViTConfig, ViTModel

from diffusers_endora.training.self_distillation import (
    SelfDistillation,
    hidden_patches,
    nearest_neighbour_accuracy,
    random_views,
)


@pytest.fixture
def model():
    torch.manual_seed(0)
    config = ViTConfig(
        hidden_size=16, num_hidden_layers=3, num_attention_heads=2, intermediate_size=32, image_size=32, patch_size=8
    )
    model = SelfDistillation(ViTModel(config, add_pooling_layer=False, use_mask_token=True), num_target_layers=2)
    model.teacher.eval()
    return model


def test_targets_say_what_sets_a_picture_apart(model):
    pixels = torch.randn(5, 3, 32, 32)
    targets = model.targets(pixels)
    assert targets.shape == (5, 16, 16)
    torch.testing.assert_close(targets.mean(0), torch.zeros(16, 16), rtol=0, atol=1e-6)
    torch.testing.assert_close(targets.square().mean((0, 1)), torch.ones(16))
    same = model.targets(pixels[:1].expand(5, -1, -1, -1))
    assert same.abs().max() < 0.1  # nothing does


def test_loss_is_the_error_at_hidden_patches_alone(model):
    pixels = torch.randn(5, 3, 32, 32)
    is_hidden = hidden_patches(5, 4, 0.5, torch.Generator().manual_seed(0))
    expected = model.targets(pixels)
    tokens = model.student(pixels, bool_masked_pos=is_hidden, interpolate_pos_encoding=True).last_hidden_state[:, 1:]
    errors = (model.predictor(tokens) - expected).square().mean(-1)
    torch.testing.assert_close(model(pixels, is_hidden), errors[is_hidden].mean())
    for layer in model.predictor[::2]:
        torch.nn.init.zeros_(layer.weight)
        torch.nn.init.zeros_(layer.bias)
    everything = torch.ones(5, 16, dtype=torch.bool)
    torch.testing.assert_close(model(pixels, everything), torch.tensor(1.0))


def test_it_learns(model):
    """On pictures whose hidden half follows from the other."""
    generator = torch.Generator().manual_seed(0)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-3)
    losses = []
    for _ in range(60):
        pixels = torch.randn(16, 3, 1, 1, generator=generator).expand(-1, -1, 32, 32)
        loss = model(pixels, hidden_patches(16, 4, 0.5, generator))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[0] > 0.9
    assert losses[-1] < 0.5


def test_gradients_reach_the_student_alone(model):
    model(torch.randn(4, 3, 32, 32), hidden_patches(4, 4, 0.5, torch.Generator())).backward()
    assert model.student.embeddings.mask_token.grad is not None
    assert not any(p.requires_grad for p in model.teacher.parameters())


def test_teacher_follows_by_the_stated_rate(model):
    before = model.teacher.embeddings.cls_token.clone()
    with torch.no_grad():
        model.student.embeddings.cls_token += 1
    model.update_teacher(progress=1.0)
    assert torch.equal(model.teacher.embeddings.cls_token, before)
    model.update_teacher(progress=0.0, momentum=0.9)
    torch.testing.assert_close(model.teacher.embeddings.cls_token, before + 0.1)


def test_hidden_patches_are_blobs():
    is_hidden = hidden_patches(50, 12, 0.6, torch.Generator().manual_seed(0)).unflatten(1, (12, 12))
    assert (is_hidden.sum((1, 2)) == round(0.6 * 144)).all()
    alike = (is_hidden[:, 1:] == is_hidden[:, :-1]).float().mean()
    assert alike > 0.7  # by chance 0.52


def test_views_are_parts_of_their_pictures():
    pictures = torch.linspace(-0.9, 0.9, 5)[:, None, None, None].expand(5, 3, 32, 32)
    views = random_views(pictures, 16, (0.2, 0.4), torch.Generator().manual_seed(0))
    again = random_views(pictures, 16, (0.2, 0.4), torch.Generator().manual_seed(0))
    assert views.shape == (5, 3, 16, 16)
    assert torch.equal(views, again)
    assert views.std((2, 3)).max() < 1e-6  # an even picture has even parts
    assert views.min() >= -1
    assert views.max() <= 1
    # of a ramp, a quarter of the area spans about half the range
    ramp = torch.linspace(-1, 1, 64).expand(200, 3, 64, 64)
    views = random_views(ramp, 16, (0.25, 0.25), torch.Generator().manual_seed(0))
    spans = views.amax((1, 2, 3)) - views.amin((1, 2, 3))
    assert 0.7 < spans.median() < 1.1


def test_nearest_neighbours_vote():
    torch.manual_seed(0)
    centres = torch.eye(3)
    known_classes, asked_classes = torch.arange(60) % 3, torch.arange(30) % 3
    known = centres[known_classes] + 0.05 * torch.randn(60, 3)
    asked = centres[asked_classes] + 0.05 * torch.randn(30, 3)
    assert nearest_neighbour_accuracy(known, known_classes, asked, asked_classes, k=10) == 1
    assert nearest_neighbour_accuracy(known, known_classes, asked, (asked_classes + 1) % 3, k=10) == 0
