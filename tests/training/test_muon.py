"""Muon for matrices and AdamW for the rest go as each of them goes alone, and as one optimiser."""

import copy

import pytest
import torch
from accelerate import Accelerator
from torch import nn

from diffusers_endora.training.muon import Muon, MuonWithAdamW, orthogonalized


def make_network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.GELU(), nn.Linear(8, 3))


def parts_of(network: nn.Module) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    parameters = list(network.parameters())
    return [p for p in parameters if p.ndim == 2], [p for p in parameters if p.ndim == 1]


def train(network: nn.Module, optimizers: list, steps: range) -> None:
    for step in steps:
        inputs = torch.randn(5, 6, generator=torch.Generator().manual_seed(step))
        network.zero_grad()
        network(inputs).square().mean().backward()
        for optimizer in optimizers:
            optimizer.step()


@pytest.mark.parametrize("shape", [(24, 7), (7, 24), (9, 9)])
def test_singular_values_become_about_one_and_vectors_stay(shape):
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    result = orthogonalized(matrix)
    values = torch.linalg.svdvals(result)
    assert values.min() > 0.6
    assert values.max() < 1.3
    left, _, right = torch.linalg.svd(matrix, full_matrices=False)
    inner = left.T @ result @ right.T  # diagonal, as the singular vectors are the same
    torch.testing.assert_close(inner, inner.diag().diag(), rtol=0, atol=1e-4)


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="torch has Muon from 2.9 on")
@pytest.mark.parametrize(("is_like_adamw", "name"), [(True, "match_rms_adamw"), (False, "original")])
def test_muon_is_torchs_but_for_its_rounding(monkeypatch, is_like_adamw, name):
    monkeypatch.setattr(torch.Tensor, "bfloat16", torch.Tensor.clone)  # which torch's converts to
    network, other = make_network(), make_network()
    (matrices, _), (theirs, _) = parts_of(network), parts_of(other)
    ours = Muon(matrices, lr=0.01, weight_decay=0.1, is_like_adamw=is_like_adamw)
    reference = torch.optim.Muon(theirs, lr=0.01, weight_decay=0.1, adjust_lr_fn=name)
    train(network, [ours], range(4))
    train(other, [reference], range(4))
    for matrix, their in zip(matrices, theirs, strict=True):
        torch.testing.assert_close(matrix, their)


def test_muon_is_for_matrices():
    with pytest.raises(ValueError, match="expected a matrix, for Muon"):
        Muon([nn.Parameter(torch.zeros(8))], lr=0.1)


def test_each_part_goes_as_it_does_alone():
    network = make_network()
    alone = copy.deepcopy(network)
    optimizer = MuonWithAdamW(*parts_of(network), lr=0.01, betas=(0.8, 0.9), weight_decay=0.1)
    matrices, others = parts_of(alone)
    separate = [
        Muon(matrices, lr=0.01, weight_decay=0.1, is_like_adamw=True),
        torch.optim.AdamW(others, lr=0.01, betas=(0.8, 0.9), weight_decay=0.1, fused=True),
    ]
    before = copy.deepcopy(network.state_dict())
    train(network, [optimizer], range(4))
    train(alone, separate, range(4))
    for name, value in network.state_dict().items():
        assert torch.equal(value, alone.state_dict()[name])
        assert not torch.equal(value, before[name])


def test_it_goes_on_from_its_state_through_accelerate(tmp_path):
    accelerator = Accelerator(cpu=True)

    def prepared() -> tuple[nn.Module, MuonWithAdamW, torch.optim.lr_scheduler.LRScheduler]:
        network = make_network()
        optimizer = MuonWithAdamW(*parts_of(network), lr=0.02)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
        return (*accelerator.prepare(network, optimizer), schedule)

    network, optimizer, schedule = prepared()
    train(network, [optimizer, schedule], range(3))
    assert [group["lr"] for group in optimizer.param_groups] == [0.005, 0.005]
    state = copy.deepcopy((network.state_dict(), optimizer.state_dict(), schedule.state_dict()))
    train(network, [optimizer, schedule], range(3, 6))

    resumed, *others = prepared()
    for part, of_part in zip([resumed, *others], state, strict=True):
        part.load_state_dict(of_part)
    train(resumed, others, range(3, 6))
    for name, value in network.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name])
