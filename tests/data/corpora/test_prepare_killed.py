"""Preparation that is killed goes on where it was, redoes nothing, and ends with the bytes of one that was not."""

import hashlib
import json
import multiprocessing
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from trees import write_tree

from diffusers_endora.data.corpora import corpus_class
from diffusers_endora.data.corpora import prepare as preparation
from diffusers_endora.data.corpora.corpus import SourceVideo
from diffusers_endora.data.corpora.prepare import prepare_corpus

OPTIONS = {"config_name": "clips", "clip_length": 16, "short_side": 40, "max_shard_bytes": 60_000}
NUM_VIDEOS = 12

# Processes are forked from one that has imported everything: a start takes milliseconds.
processes = multiprocessing.get_context("forkserver")
processes.set_forkserver_preload(
    ["diffusers_endora.data.corpora.prepare", "diffusers_endora.data.corpora.colonoscopic"]
)


@pytest.fixture(scope="module")
def raw(tmp_path_factory):
    """Twelve videos of half a second's work in all, with a file that is left out."""
    folder = write_tree("colonoscopic", "owners", tmp_path_factory.mktemp("raw"), num_frames=150)
    (folder / "notes.txt").write_text("x")
    return folder


@pytest.fixture(scope="module", params=["parquet"])  # the formats differ in packing alone
def file_format(request):
    return request.param


in_both_formats = pytest.mark.parametrize("file_format", ["parquet", "webdataset"], indirect=True)


@pytest.fixture(scope="module")
def uninterrupted(raw, file_format, tmp_path_factory):
    """What is to come out, and the seconds it takes."""
    folder = tmp_path_factory.mktemp("uninterrupted")
    for output in (folder / "first", folder / "second"):  # the first process of all takes seconds to start
        start = time.perf_counter()
        process = started(raw, output, file_format)
        process.join()
        seconds = time.perf_counter() - start
    content = content_of(output)
    assert content == content_of(folder / "first")
    assert len([name for name in content if name.startswith("data/")]) > 4
    return content, seconds


def content_of(folder: Path) -> dict[str, str]:
    """The hash of every file."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in paths}


def started(raw: Path, output: Path, file_format: str) -> multiprocessing.Process:
    process = processes.Process(
        target=prepare_corpus,
        args=("colonoscopic", raw, output),
        kwargs={"file_format": file_format, "num_proc": 2, **OPTIONS},
    )
    process.start()
    return process


def killed_when(process: multiprocessing.Process, condition: Callable[[], bool]) -> bool:
    """Kills the process as soon as the condition holds; False where it ended before."""
    while process.is_alive() and not condition():
        time.sleep(0.0005)
    process.kill()
    process.join()
    return process.exitcode == -signal.SIGKILL


def finished_units(output: Path) -> list[Path]:
    units = output.with_name(f"{output.name}.incomplete") / "units"
    return [path for path in units.iterdir() if not path.name.startswith(".")] if units.is_dir() else []


def check_going_on(raw: Path, output: Path, file_format: str, expected: dict[str, str], monkeypatch) -> None:
    """The next run encodes what is missing, no more, and ends with what is expected."""
    if output.exists():
        assert content_of(output) == expected  # all or nothing
    units, is_complete = finished_units(output), output.exists()
    for unit in units:
        assert json.loads((unit / "unit.json").read_text())["rows"]  # whole
    builder = corpus_class("colonoscopic")
    write_rows, encoded = builder.write_rows.__func__, []

    def write(cls, video: SourceVideo, *arguments):
        encoded.append(video)
        return write_rows(cls, video, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(builder, "write_rows", classmethod(write))
        prepare_corpus("colonoscopic", raw, output, file_format=file_format, num_proc=1, **OPTIONS)
    assert len(encoded) == (0 if is_complete else NUM_VIDEOS - len(units))
    assert content_of(output) == expected
    assert [path.name for path in output.parent.iterdir()] == [output.name]


MOMENTS: dict[str, Callable[[Path, Path], bool]] = {
    "before the first video is done": lambda work, out: any((work / "units").glob(".*/*.mp4")),
    "in the middle of the videos": lambda work, out: len(finished_units(out)) >= 5,
    "when packing begins": lambda work, out: (work / "packed").exists(),
    "in the middle of packing": lambda work, out: any((work / "packed" / "data").glob("train-00001*")),
    "before the card": lambda work, out: any((work / "packed" / "data").glob("test-*-of-*")),
    "before the final name": lambda work, out: (work / "packed" / "README.md").exists(),
    "after the final name": lambda work, out: out.exists(),
}


@pytest.mark.parametrize(
    ("file_format", "moment"),
    [
        *[pytest.param("parquet", moment, marks=pytest.mark.slow) for moment in MOMENTS],
        ("webdataset", "in the middle of packing"),
    ],
    indirect=["file_format"],
)
def test_killed(moment, raw, file_format, uninterrupted, tmp_path, monkeypatch):
    expected, _ = uninterrupted
    for attempt in range(9):  # on a busy machine the moment may pass unseen
        output = tmp_path / f"{attempt}" / "out"
        output.parent.mkdir()
        work = output.with_name("out.incomplete")
        process = started(raw, output, file_format)
        was_killed = killed_when(process, lambda work=work, output=output: MOMENTS[moment](work, output))
        check_going_on(raw, output, file_format, expected, monkeypatch)
        if was_killed:
            break
    assert was_killed


def test_killed_while_it_tidies_up(raw, file_format, uninterrupted, tmp_path, monkeypatch):
    """A unit that is half-removed, as by a run with other options, is not taken for whole."""
    expected, _ = uninterrupted
    output = tmp_path / "out"
    while not finished_units(output):
        killed_when(started(raw, output, file_format), lambda: len(finished_units(output)) >= 3)
        if output.exists():
            shutil.rmtree(output)
    units = finished_units(output)

    def rmtree(path, ignore_errors=False):
        if path.name.removeprefix(".") in {unit.name for unit in units} and path.is_dir():
            (path / "0.mp4").unlink()
            raise KeyboardInterrupt
        return real(path, ignore_errors=ignore_errors)

    real = shutil.rmtree
    with monkeypatch.context() as patch:
        patch.setattr(preparation.shutil, "rmtree", rmtree)
        with pytest.raises(KeyboardInterrupt):
            prepare_corpus("colonoscopic", raw, output, short_side=20)
    assert len(finished_units(output)) == len(units) - 1
    check_going_on(raw, output, file_format, expected, monkeypatch)


def check_random_instants(number: int, raw, file_format, uninterrupted, tmp_path, monkeypatch) -> None:
    expected, seconds = uninterrupted
    generator = random.Random(file_format)
    num_killed = 0
    for i in range(3 * number):
        output = tmp_path / f"{i}" / "out"
        output.parent.mkdir()
        process = started(raw, output, file_format)
        stop = time.perf_counter() + generator.uniform(0, seconds)
        if killed_when(process, lambda stop=stop: time.perf_counter() > stop):
            num_killed += 1
        else:
            seconds *= 0.8  # the machine is faster now
        check_going_on(raw, output, file_format, expected, monkeypatch)
        if num_killed == number:
            break
    assert num_killed == number


@pytest.mark.slow
def test_killed_at_three_random_instants(raw, file_format, uninterrupted, tmp_path, monkeypatch):
    check_random_instants(3, raw, file_format, uninterrupted, tmp_path, monkeypatch)


@pytest.mark.slow
@in_both_formats
def test_killed_at_twenty_random_instants(raw, file_format, uninterrupted, tmp_path, monkeypatch):
    check_random_instants(20, raw, file_format, uninterrupted, tmp_path, monkeypatch)


@pytest.mark.slow
@in_both_formats
def test_killed_again_and_again(raw, file_format, uninterrupted, tmp_path, monkeypatch):
    expected, seconds = uninterrupted
    output = tmp_path / "out"
    generator = random.Random(file_format)
    for _ in range(100):
        process = started(raw, output, file_format)
        stop = time.perf_counter() + generator.uniform(0, 0.3 * seconds)
        killed_when(process, lambda stop=stop: time.perf_counter() > stop)
        if output.exists():
            break
    check_going_on(raw, output, file_format, expected, monkeypatch)


@pytest.mark.slow
def test_ctrl_c(raw, tmp_path):
    output = tmp_path / "out"
    command = [sys.executable, "-m", "diffusers_endora.cli", "prepare", "colonoscopic", "--data_dir", str(raw)]
    command += ["--output_dir", str(output), "--transcode", "40", "--quality", "lossless", "--num_proc", "1"]
    for _ in range(5):
        process = subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            # What a shell starts in the background ignores SIGINT
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )
        while process.poll() is None and not finished_units(output):
            time.sleep(0.001)
        process.send_signal(signal.SIGSTOP)  # a busy machine may have let it come to its end
        is_in_time = 0 < len(finished_units(output)) < 12
        process.send_signal(signal.SIGINT)
        process.send_signal(signal.SIGCONT)
        _, err = process.communicate(timeout=60)
        if is_in_time:
            break
        shutil.rmtree(output, ignore_errors=True)
    assert process.returncode == 130, err
    assert "Traceback" not in err
    assert err.endswith("interrupted; the same command goes on where it stopped\n")
    assert not output.exists()
    assert not list((tmp_path / "out.incomplete" / "units").glob(".*"))  # nothing half-written
