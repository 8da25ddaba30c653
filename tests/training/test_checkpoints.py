"""Checkpoints appear whole or not at all, and are found again by name."""

from pathlib import Path

import pytest
from accelerate import PartialState

from diffusers_endora.training import checkpoints
from diffusers_endora.training.checkpoints import (
    find_checkpoint,
    list_checkpoints,
    save_checkpoint,
    set_aside_after,
)


def write(folder: Path) -> None:
    (folder / "weights").write_text(folder.name)


def save(output_dir: Path, step: int, save=write, total_limit: int | None = None) -> Path:
    return save_checkpoint(output_dir, step, save, PartialState(cpu=True), total_limit)


def test_checkpoints_are_listed_by_step_not_by_name(tmp_path):
    for step in (900, 1000, 20):
        save(tmp_path, step)
    assert [path.name for path in list_checkpoints(tmp_path)] == ["checkpoint-20", "checkpoint-900", "checkpoint-1000"]
    assert find_checkpoint(tmp_path, "latest").name == "checkpoint-1000"


def test_an_interrupted_save_is_not_a_checkpoint_and_the_next_save_clears_it(tmp_path):
    save(tmp_path, 1)

    def dies(folder: Path) -> None:
        write(folder)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        save(tmp_path, 2, dies)
    assert find_checkpoint(tmp_path, "latest").name == "checkpoint-1"
    save(tmp_path, 3)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-1", "checkpoint-3"]


def test_total_limit_removes_the_oldest_after_the_new_one_is_in_place(tmp_path):
    for step in (1, 2, 3):
        save(tmp_path, step, total_limit=2)
    assert [path.name for path in list_checkpoints(tmp_path)] == ["checkpoint-2", "checkpoint-3"]


def test_a_checkpoint_of_the_same_step_is_replaced(tmp_path):
    save(tmp_path, 1)
    (tmp_path / "checkpoint-1" / "old").write_text("")
    save(tmp_path, 1)
    assert sorted(path.name for path in (tmp_path / "checkpoint-1").iterdir()) == ["manifest.json", "weights"]


def test_a_kill_between_the_two_renames_of_a_replacement_loses_nothing(tmp_path, monkeypatch):
    save(tmp_path, 1)
    monkeypatch.setattr(
        checkpoints, "remove", lambda path: path.rename(path.with_name("checkpoint-1.old.partial")) / 0
    )
    with pytest.raises(TypeError):  # dies after the old one has gone
        save(tmp_path, 1)
    assert list_checkpoints(tmp_path) == []
    assert find_checkpoint(tmp_path, "latest").name == "checkpoint-1"


def cut_off(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def change_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[0] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("harm", [cut_off, change_a_bit, Path.unlink])
@pytest.mark.parametrize("file", ["weights", "manifest.json"])
def test_a_damaged_checkpoint_is_never_the_latest(tmp_path, caplog, harm, file):
    for step in (1, 2):
        save(tmp_path, step)
    harm(tmp_path / "checkpoint-2" / file)
    assert find_checkpoint(tmp_path, "latest").name == "checkpoint-1"
    assert f"checkpoint-2 is passed over: {'its ' if file != 'weights' else ''}{file}" in caplog.text
    with pytest.raises(ValueError, match=r"checkpoint-2 is damaged"):
        find_checkpoint(tmp_path, "checkpoint-2")


def test_an_older_checkpoint_stays_where_the_new_one_reads_back_wrong(tmp_path, monkeypatch):
    save(tmp_path, 1)
    monkeypatch.setattr(checkpoints, "sync_to_disk", lambda path: change_a_bit(path) if path.name == "weights" else 0)
    with pytest.raises(OSError, match=r"could not be written \(read back from the disk, weights has another hash\)"):
        save(tmp_path, 2, total_limit=1)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-1"]


def test_names_that_are_not_there(tmp_path):
    assert find_checkpoint(tmp_path, "latest") is None
    save(tmp_path, 7)
    assert find_checkpoint(tmp_path, "checkpoint-7") == find_checkpoint(tmp_path, str(tmp_path / "checkpoint-7"))
    with pytest.raises(ValueError, match=r"checkpoint-8: no such checkpoint; available in .*: checkpoint-7"):
        find_checkpoint(tmp_path, "checkpoint-8")


def test_total_limit_never_removes_the_new_checkpoint(tmp_path):
    save(tmp_path, 5000)  # of a run that was abandoned for an earlier state
    save(tmp_path, 2000, total_limit=1)
    assert [path.name for path in list_checkpoints(tmp_path)] == ["checkpoint-2000"]


def test_a_full_disk_is_one_sentence_and_leaves_what_was_there(tmp_path):
    save(tmp_path, 1)

    def disk_full(folder: Path) -> None:
        write(folder)
        raise RuntimeError("PytorchStreamWriter failed writing file")

    with pytest.raises(OSError, match=r"checkpoint-2 could not be written .*earlier checkpoints are untouched"):
        save(tmp_path, 2, disk_full)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-1"]


def test_a_removal_that_is_cut_short_leaves_no_half_checkpoint(tmp_path, monkeypatch):
    save(tmp_path, 1)
    monkeypatch.setattr("shutil.rmtree", lambda path: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        save(tmp_path, 2, total_limit=1)
    assert [path.name for path in list_checkpoints(tmp_path)] == ["checkpoint-2"]


def test_later_checkpoints_are_set_aside_for_a_training_that_goes_on_from_an_earlier_one(tmp_path):
    for step in (1, 2, 3):
        save(tmp_path, step)
    for _ in range(2):  # a second time replaces what the first has set aside
        renamed = set_aside_after(tmp_path / "checkpoint-1")
        assert [path.name for path in renamed] == ["checkpoint-2.abandoned", "checkpoint-3.abandoned"]
        assert find_checkpoint(tmp_path, "latest").name == "checkpoint-1"
        for step in (2, 3):
            save(tmp_path, step)
