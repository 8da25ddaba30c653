"""Files that appear whole or not at all."""

from pathlib import Path

import pytest

from diffusers_endora.files import replacing_entries


def contents(folder):
    return {path.relative_to(folder).as_posix(): path.read_text() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def folder(tmp_path):
    for name in ("a/1", "b/1", "kept"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("old")
    return tmp_path


def write_new(folder, fails=False):
    for name in ("a/2", "b/2", "c"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("new")
    if fails:
        raise OSError("full")


def test_entries_take_the_place_of_those_of_the_same_name(folder):
    with replacing_entries(folder) as temporary:
        write_new(temporary)
    assert contents(folder) == {"a/2": "new", "b/2": "new", "c": "new", "kept": "old"}


def test_a_failure_while_writing_changes_nothing(folder):
    before = contents(folder)
    with pytest.raises(OSError, match="full"), replacing_entries(folder) as temporary:
        write_new(temporary, fails=True)
    assert contents(folder) == before


def test_where_replacing_fails_each_entry_is_the_old_or_the_new_one(folder, monkeypatch):
    replace = Path.replace

    def failing(self, target):
        if self.name == "b":
            raise OSError("cannot be moved")
        return replace(self, target)

    monkeypatch.setattr(Path, "replace", failing)
    with pytest.raises(OSError, match="cannot be moved"), replacing_entries(folder) as temporary:
        write_new(temporary)
    assert contents(folder) == {"a/2": "new", "b/1": "old", "kept": "old"}
