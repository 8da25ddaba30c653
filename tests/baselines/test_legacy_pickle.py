"""Network pickles: tensors and settings come out, and nothing in them runs."""

import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from network_pickles import DictConfig, EasyDict, network, save_snapshot
from safetensors.torch import load_file

from diffusers_endora.baselines import legacy_pickle
from diffusers_endora.baselines.legacy_pickle import read_here, read_network_pickle

TENSORS = {
    "mapping.fc0.weight": torch.arange(6.0).reshape(2, 3),
    "mapping.w_avg": torch.tensor([1.0, 2.0]),
    "synthesis.b4.conv1.weight": torch.arange(24.0).reshape(2, 3, 2, 2).to(memory_format=torch.channels_last),
    "synthesis.motion.0.bias": torch.zeros(()),
}


@pytest.fixture
def networks():
    generator = network(TENSORS, plain=("synthesis.motion",))
    generator._init_kwargs = EasyDict(w_dim=2, synthesis_kwargs=EasyDict(channel_base=16), cfg=DictConfig({"a": 1}))
    generator.cfg = DictConfig({"motion": {"motion_z_distance": 16, "fourier": True}, "name": "stylegan-v"})
    return {"G": network({"only": torch.ones(1)}), "D": network({"b4.out.bias": torch.ones(1)}), "G_ema": generator}


def test_tensors_and_settings_come_out(networks, monkeypatch, tmp_path):
    read = read_network_pickle(save_snapshot(tmp_path / "network.pkl", monkeypatch, networks))
    assert set(read.tensors) == {"G_ema", "D"}
    assert set(read.tensors["G_ema"]) == set(TENSORS)
    for name, tensor in TENSORS.items():
        assert torch.equal(read.tensors["G_ema"][name], tensor)
    assert read.settings["G_ema"] == {
        "arguments": {"w_dim": 2, "synthesis_kwargs": {"channel_base": 16}, "cfg": {"a": 1}},
        "cfg": {"motion": {"motion_z_distance": 16, "fourier": True}, "name": "stylegan-v"},
    }


@pytest.mark.parametrize("protocol", [2, 3, 5])
def test_every_protocol_of_pickles_is_read(networks, monkeypatch, tmp_path, protocol):
    read_here(save_snapshot(tmp_path / "network.pkl", monkeypatch, networks, protocol), tmp_path / "answer")
    read = load_file(tmp_path / "answer")
    assert torch.equal(read["G_ema/mapping.fc0.weight"], TENSORS["mapping.fc0.weight"])


def test_the_process_that_reads_takes_nothing_from_here(networks, monkeypatch, tmp_path):
    """Not the current folder, and not PYTHONPATH: a `torch.py` beside the pickle is not imported."""
    path = save_snapshot(tmp_path / "network.pkl", monkeypatch, networks)
    (tmp_path / "torch.py").write_text("open('planted', 'w')")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    assert read_network_pickle(path).tensors["D"]["b4.out.bias"].item() == 1
    assert not (tmp_path / "planted").exists()


class Calls:
    """Pickles as a call of `function`."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


def test_a_pickle_that_would_run_code_is_refused_by_name_and_runs_nothing(networks, monkeypatch, tmp_path):
    mark = tmp_path / "ran"
    attacks = {
        "posix.system": Calls(os.system, f"touch {mark}"),
        "builtins.eval": Calls(eval, f"open({str(mark)!r}, 'w')"),
        "builtins.getattr": Calls(getattr, mark, "name"),
        "subprocess.check_output": Calls(subprocess.check_output, ["touch", str(mark)]),
        "torch.serialization.load": Calls(torch.load, str(mark)),
    }
    for name, attack in attacks.items():
        path = save_snapshot(tmp_path / "network.pkl", monkeypatch, {**networks, "extra": attack})
        with pytest.raises(ValueError, match=rf"^asks for {name}, .* nothing was run\.$"):
            read_here(path, tmp_path / "answer")
    assert not mark.exists()
    assert not (tmp_path / "answer").exists()
    pickle.loads(pickle.dumps(attacks["posix.system"]))  # as an ordinary reader would
    assert mark.exists()


def test_a_dotted_name_does_not_reach_into_what_is_allowed(monkeypatch, tmp_path):
    """Protocol 4 lets a name be a path of attributes: `collections` has `_sys`, which has everything."""
    opcodes = b"\x80\x04" + b"\x8c\x0bcollections" + b"\x8c\x0c_sys.modules" + b"\x93."
    (tmp_path / "network.pkl").write_bytes(opcodes)
    with pytest.raises(ValueError, match=r"asks for collections\._sys\.modules, "):
        read_here(tmp_path / "network.pkl", tmp_path / "answer")


def test_a_storage_with_code_in_it_is_refused(networks, monkeypatch, tmp_path):
    """The bytes of a storage are a pickle of their own."""
    mark = tmp_path / "ran"
    inner = pickle.dumps(Calls(os.system, f"touch {mark}"), protocol=2)
    attack = Calls(torch.storage._load_from_bytes, inner)
    path = save_snapshot(tmp_path / "network.pkl", monkeypatch, {**networks, "extra": attack})
    with pytest.raises(ValueError, match="damaged or cut short"):
        read_here(path, tmp_path / "answer")
    assert not mark.exists()


def test_what_is_no_network_pickle_gets_one_sentence(networks, monkeypatch, tmp_path):
    content = save_snapshot(tmp_path / "network.pkl", monkeypatch, networks).read_bytes()
    cases = {
        "cut.pkl": (content[: len(content) // 2], "damaged or cut short"),
        "empty.pkl": (b"", "damaged or cut short"),
        "text.pkl": (b"this is no pickle", "damaged or cut short"),
        "other.pkl": (pickle.dumps({"D": 1}), "holds no G_ema"),
        "list.pkl": (pickle.dumps([1]), "holds no G_ema"),
    }
    for name, (content, message) in cases.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=message):
            read_here(tmp_path / name, tmp_path / "answer")
    with pytest.raises(ValueError, match=r"cut\.pkl: is no network pickle, or is damaged or cut short") as error:
        read_network_pickle(tmp_path / "cut.pkl")
    assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match=r"absent\.pkl: is no file"):
        read_network_pickle(tmp_path / "absent.pkl")


def test_the_file_runs_without_the_package():
    """The process that reads has nothing but this file, torch and safetensors."""
    lines = Path(legacy_pickle.__file__).read_text().splitlines()
    top = [line.split()[1] for line in lines if line.startswith(("import ", "from "))]
    assert {name.partition(".")[0] for name in top} <= set(sys.stdlib_module_names)
