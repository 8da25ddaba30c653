"""Writes pickles as the official codes of StyleGAN-V and MoStGAN-V do, in which networks bring their source along."""

import pickle
import sys
import types
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import torch

# Stands in `module_src`: what the official loader would execute
SOURCE = "raise AssertionError('the source in the pickle was executed')"


def module_with(name: str, **members: Any) -> types.ModuleType:
    """A module of that name, with its parents; its members say that they are from it."""
    module = types.ModuleType(name)
    for key, value in members.items():
        value.__module__, value.__qualname__, value.__name__ = name, key, key
        setattr(module, key, value)
    return module


def _reconstruct_persistent_obj(meta):
    raise AssertionError("is only named in the pickles")


class EasyDict(dict):
    pass


class DictConfig:
    """As omegaconf's: a content of nodes, each with its value."""

    def __init__(self, values: dict[str, Any]) -> None:
        self._content = {
            name: DictConfig(value) if isinstance(value, dict) else AnyNode(value) for name, value in values.items()
        }


class AnyNode:
    def __init__(self, value: Any) -> None:
        self._val = value


class Sequential:
    """In the place of `torch.nn.Sequential` and of `TemporalDifferenceEncoder`, which are pickled without source."""


class TemporalDifferenceEncoder:
    pass


class Persistent:
    """A network that brings its source along."""

    def __reduce__(self):
        meta = {"type": "class", "version": 6, "module_src": SOURCE, "class_name": "Network", "state": vars(self)}
        return _reconstruct_persistent_obj, (meta,)


MODULES = [
    module_with("src.torch_utils.persistence", _reconstruct_persistent_obj=_reconstruct_persistent_obj),
    module_with("src.dnnlib.util", EasyDict=EasyDict),
    module_with("omegaconf.dictconfig", DictConfig=DictConfig),
    module_with("omegaconf.nodes", AnyNode=AnyNode),
    module_with("training.layers", TemporalDifferenceEncoder=TemporalDifferenceEncoder),
]


def network(tensors: dict[str, torch.Tensor], plain: tuple[str, ...] = (), prefix: str = "") -> Any:
    """A network of parameters by name, every module a `Persistent` except those that `plain` names."""
    made: Any = TemporalDifferenceEncoder() if prefix.rstrip(".") in plain else Persistent()
    own = {name: tensor for name, tensor in tensors.items() if "." not in name}
    children: dict[str, dict[str, torch.Tensor]] = {}
    for name, tensor in tensors.items():
        if "." in name:
            child, _, rest = name.partition(".")
            children.setdefault(child, {})[rest] = tensor
    buffers = ("w_avg", "resample_filter", "freqs", "phase_scales", "fourier_coefs")
    made.training = False
    made._parameters = OrderedDict(
        (name, torch.nn.Parameter(tensor, requires_grad=False)) for name, tensor in own.items() if name not in buffers
    )
    made._parameters["absent"] = None
    made._buffers = OrderedDict((name, tensor) for name, tensor in own.items() if name in buffers)
    made._modules = OrderedDict((name, network(part, plain, f"{prefix}{name}.")) for name, part in children.items())
    return made


def save_snapshot(path: Path, monkeypatch: Any, networks: dict[str, Any], protocol: int = 4) -> Path:
    """Pickles a snapshot with these networks, and with what else the official training puts into one."""
    parameter = torch.nn.Parameter(torch.ones(2))
    optimizer = torch.optim.Adam([parameter])
    parameter.sum().backward()
    optimizer.step()
    snapshot = {
        "training_set_kwargs": EasyDict(path="videos.zip", cfg=DictConfig({"name": "colon"})),
        **networks,
        "augment_pipe": None,
        "G_opt": optimizer,
        "vis": {"grid_size": (2, np.int64(3)), "grid_z": (torch.zeros(1, 4),), "labels": np.zeros((2, 0), np.float32)},
        "stats": {"cur_nimg": 25, "cur_tick": 1, "batch_idx": 3},
    }
    with monkeypatch.context() as patched:
        for module in MODULES:
            for name in (module.__name__, *parents(module.__name__)):
                patched.setitem(sys.modules, name, module if name == module.__name__ else types.ModuleType(name))
        path.write_bytes(pickle.dumps(snapshot, protocol=protocol))
    return path


def parents(name: str) -> list[str]:
    parts = name.split(".")
    return [".".join(parts[:count]) for count in range(1, len(parts))]
