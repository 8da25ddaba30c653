"""Muon for matrices and AdamW for the rest go as each of them goes alone, and as one optimiser."""

import copy

import pytest
import torch
from accelerate import Accelerator
from torch import nn

from diffusers_endora.training.muon import MuonWithAdamW

pytestmark = pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="torch has Muon from 2.9 on")


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


def test_each_part_goes_as_it_does_alone():
    network = make_network()
    alone = copy.deepcopy(network)
    optimizer = MuonWithAdamW(*parts_of(network), lr=0.01, betas=(0.8, 0.9), weight_decay=0.1)
    matrices, others = parts_of(alone)
    separate = [
        torch.optim.Muon(matrices, lr=0.01, weight_decay=0.1, adjust_lr_fn="match_rms_adamw"),
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
