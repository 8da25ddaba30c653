import math

import pytest
import torch
from transformers import ViTConfig, ViTModel

from diffusers_endora.training.self_distillation import (
    SelfDistillation,
    balanced_assignment,
    nearest_neighbour_accuracy,
    random_views,
)


@pytest.fixture
def model():
    torch.manual_seed(0)
    config = ViTConfig(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32, image_size=32, patch_size=8
    )
    model = SelfDistillation(ViTModel(config, add_pooling_layer=False), num_prototypes=8)
    model.teacher.eval()
    return model


def test_loss_is_cross_entropy_over_pairs_of_different_views(model):
    model.eval()
    large, small = [torch.randn(3, 3, 32, 32) for _ in range(2)], [torch.randn(3, 3, 16, 16)]
    loss, entropy = model(large, small)

    def scores(view):
        return model.student_head(model.student(view, interpolate_pos_encoding=True).last_hidden_state[:, 0])

    terms = []
    of_both = balanced_assignment(torch.cat([scores(view) for view in large]) / 0.04).split(3)
    for t in range(len(large)):  # the teacher is still the student's copy
        certain = of_both[t]
        for s, of_student in enumerate([*large, *small]):
            if t != s:
                terms.append(-(certain * (scores(of_student) / 0.1).log_softmax(-1)).sum(-1).mean())
    assert len(terms) == 4
    torch.testing.assert_close(loss, torch.stack(terms).mean())
    assert 0 <= entropy <= math.log(8)


def test_assignment_is_balanced():
    torch.manual_seed(0)
    scores = 5 * torch.randn(64, 8) + torch.arange(8)  # the last prototypes are the best for all
    probabilities = balanced_assignment(scores, num_iterations=50)
    torch.testing.assert_close(probabilities.sum(1), torch.ones(64))
    torch.testing.assert_close(probabilities.sum(0), torch.full((8,), 8.0), rtol=0.01, atol=0)
    assert scores.softmax(1).sum(0).max() > 15
    few = balanced_assignment(scores)
    torch.testing.assert_close(few.sum(1), torch.ones(64))


def test_gradients_reach_the_student_alone(model):
    model.train()
    views = [torch.randn(4, 3, 32, 32) for _ in range(2)]
    loss, _ = model(views, [])
    loss.backward()
    assert all(p.grad is not None for p in model.student_head.parameters())
    assert not any(p.requires_grad for p in [*model.teacher.parameters(), *model.teacher_head.parameters()])


def test_teacher_follows_by_the_stated_rate(model):
    before = model.teacher.embeddings.cls_token.clone()
    with torch.no_grad():
        model.student.embeddings.cls_token += 1
    model.update_teacher(progress=1.0)
    assert torch.equal(model.teacher.embeddings.cls_token, before)
    model.update_teacher(progress=0.0, momentum=0.9)
    torch.testing.assert_close(model.teacher.embeddings.cls_token, before + 0.1)


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
