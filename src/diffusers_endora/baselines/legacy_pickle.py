"""The tensors of a network pickle (`network-snapshot-*.pkl`), without running the code that is in it.

The codes that descend from StyleGAN2-ADA save their networks as pickles in which every network brings its Python
source along (https://github.com/NVlabs/stylegan2-ada-pytorch, `torch_utils/persistence.py`), which the official loader
executes. Here the file is unpickled in a process of its own, in which nothing is looked up but tensors, arrays and
plain containers, and every other object of those codes becomes a stand-in that keeps its state. A name that is not on
the list ends the reading. Tensors and settings come back in a safetensors file.

This file is also that process: it imports nothing of the package, and torch only when it reads.
"""

import io
import json
import pickle
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

NETWORKS = ("G_ema", "D")  # of those in a snapshot: the averaged generator and the discriminator

# What is looked up by its own name
REAL = {
    "_codecs": {"encode"},
    "builtins": {"bool", "bytearray", "bytes", "complex", "dict", "float", "frozenset", "int", "list", "object"}
    | {"range", "set", "slice", "str", "tuple"},
    "collections": {"OrderedDict", "defaultdict"},
    "copyreg": {"_reconstructor"},
    "numpy": {"dtype", "ndarray"},
    "numpy.core.multiarray": {"_reconstruct", "scalar"},
    "numpy.core.numeric": {"_frombuffer"},
    "torch": {"Size", "device"},
    "torch._utils": {"_rebuild_parameter", "_rebuild_tensor_v2"},
}
RENAMED = {
    "__builtin__": "builtins",
    "copy_reg": "copyreg",
    "numpy._core.multiarray": "numpy.core.multiarray",
    "numpy._core.numeric": "numpy.core.numeric",
}

# Packages whose objects become stand-ins; the official codes put "src." before some
STAND_INS = ("dnnlib", "omegaconf", "torch.nn.modules", "torch.optim", "torch_utils", "training", "typing")


@dataclass(frozen=True)
class NetworkPickle:
    """What a network pickle holds.

    Attributes:
        tensors: network ("G_ema", "D") -> name -> tensor, parameters and buffers; without a network that is absent.
        settings: network -> the arguments that it was made with and its `cfg`, as plain values; what is no plain value
            is left out.
    """

    tensors: "dict[str, dict[str, torch.Tensor]]"
    settings: dict[str, dict[str, Any]]


def read_network_pickle(path: str | Path) -> NetworkPickle:
    """Reads a network pickle in a process of its own, see above.

    Raises:
        ValueError: there is no such file, it is no such pickle, is cut short, or asks for a name that is not on the
            list.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"{path}: is no file; expected a network-snapshot-*.pkl of the official code.")
    import torch
    from safetensors import safe_open

    # -I leaves out what the environment and the current folder add; the folder that torch is in is all it needs
    site = Path(torch.__file__).parents[1]
    with tempfile.TemporaryDirectory() as folder:
        answer = Path(folder) / "networks.safetensors"
        command = [sys.executable, "-I", __file__, str(path.resolve()), str(answer), str(site)]
        process = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL)
        if process.returncode != 0:
            said = (process.stdout.strip() or process.stderr.strip()).rpartition("\n")[2]
            raise ValueError(f"{path}: {said or f'the process that read it ended with {process.returncode}'}")
        tensors: dict[str, dict[str, torch.Tensor]] = {}
        with safe_open(answer, framework="pt") as file:
            for key in file.keys():  # noqa: SIM118
                network, _, name = key.partition("/")
                tensors.setdefault(network, {})[name] = file.get_tensor(key).clone()
            settings = {network: json.loads(text) for network, text in file.metadata().items()}
    return NetworkPickle(tensors, settings)


# --- the process that reads ------------------------------------------------------------------------------------------


class StandIn:
    """In the place of an object whose class is not looked up: keeps its state, and does nothing."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.state: Any = {}

    def __setstate__(self, state: Any) -> None:
        self.state = state


class StandInDict(dict[Any, Any]):
    """In the place of `dnnlib.EasyDict`."""

    def __setstate__(self, state: Any) -> None:
        pass


def network_stand_in(meta: dict[str, Any]) -> StandIn:
    """In the place of `_reconstruct_persistent_obj`, which would execute `meta["module_src"]`."""
    network = StandIn()
    network.state = meta["state"]
    return network


def load_storage(content: bytes) -> Any:
    """In the place of `torch.storage._load_from_bytes`, which unpickles in turn: the restricted loader of torch."""
    import torch

    return torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)


class NetworkUnpickler(pickle.Unpickler):
    """Looks up what is on the list, and nothing else."""

    def find_class(self, module: str, name: str) -> Any:
        import torch

        module = RENAMED.get(module, module)
        own = module.removeprefix("src.")
        if (own, name) == ("torch_utils.persistence", "_reconstruct_persistent_obj"):
            return network_stand_in
        if (own, name) in (("dnnlib.util", "EasyDict"), ("dnnlib", "EasyDict")):
            return StandInDict
        if (module, name) == ("torch.storage", "_load_from_bytes"):
            return load_storage
        if name in REAL.get(module, ()):
            return super().find_class(module, name)
        if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            return getattr(torch, name)
        if any(own == package or own.startswith(f"{package}.") for package in STAND_INS):
            return type(name, (StandIn,), {})
        raise ValueError(
            f"asks for {module}.{name}, which no network pickle needs and which could run code; nothing was run."
        )


def tensors_of(network: StandIn, prefix: str = "") -> "dict[str, torch.Tensor]":
    """Parameters and buffers of a stand-in for a `torch.nn.Module`, named as in its `state_dict`."""
    tensors = {}
    for kind in ("_parameters", "_buffers"):
        for name, tensor in network.state.get(kind, {}).items():
            if tensor is not None:
                tensors[f"{prefix}{name}"] = tensor.detach().clone().contiguous()
    for name, module in network.state.get("_modules", {}).items():
        if module is not None:
            tensors |= tensors_of(module, f"{prefix}{name}.")
    return tensors


def plain(value: Any) -> Any:
    """Numbers, texts, lists and dictionaries of what a stand-in for an omegaconf container or node, or a dict, holds.

    None for what is none of these.
    """
    if isinstance(value, StandIn):
        state = value.state if isinstance(value.state, dict) else {}
        return plain(state.get("_content", state.get("_val")))
    if isinstance(value, dict):
        return {str(name): plain(part) for name, part in value.items()}
    if isinstance(value, list | tuple):
        return [plain(part) for part in value]
    return value if isinstance(value, bool | int | float | str) else None


def read_here(path: Path, answer: Path) -> None:
    """Unpickles `path`, and writes its networks' tensors and settings to `answer`.

    Raises:
        ValueError: see `read_network_pickle`.
    """
    from safetensors.torch import save_file

    tensors: dict[str, torch.Tensor] = {}
    settings: dict[str, str] = {}
    try:
        with path.open("rb") as file:
            snapshot = NetworkUnpickler(file).load()
        if not isinstance(snapshot, dict) or not isinstance(snapshot.get("G_ema"), StandIn):
            raise ValueError("holds no G_ema; expected a network-snapshot-*.pkl of the official code.")
        for name in NETWORKS:
            network = snapshot.get(name)
            if isinstance(network, StandIn):
                tensors |= {f"{name}/{key}": tensor for key, tensor in tensors_of(network).items()}
                made_with = network.state.get("_init_kwargs"), network.state.get("cfg")
                settings[name] = json.dumps({"arguments": plain(made_with[0]), "cfg": plain(made_with[1])})
    except (EOFError, pickle.UnpicklingError, RuntimeError, LookupError, TypeError, AttributeError) as error:
        raise ValueError(f"is no network pickle, or is damaged or cut short ({error}).") from error
    save_file(tensors, answer, metadata=settings)


if __name__ == "__main__":
    sys.path.append(sys.argv[3])
    try:
        read_here(Path(sys.argv[1]), Path(sys.argv[2]))
    except (ValueError, OSError, MemoryError) as error:
        print(" ".join(str(error).split()) or type(error).__name__)
        sys.exit(1)
