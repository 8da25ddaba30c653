"""An evaluation from videos to report: what is compared, said, kept, and refused."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("scipy")
pytest.importorskip("sklearn")
pytest.importorskip("torchmetrics")

from tiny import MeanAndStep

from diffusers_endora.data.video_io import write_video
from diffusers_endora.metrics.clip_sources import open_videos
from diffusers_endora.metrics.evaluation import evaluate
from diffusers_endora.metrics.protocols import LEGACY, STRICT

PROTOCOL = STRICT.changed(num_clips=40)


def write_corpus(folder: Path, seed: int, num_videos: int = 10, num_frames: int = 200, size: int = 24, step: int = 2):
    """Videos of a bright square that moves over a slowly changing colour."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(seed)
    rows, columns = np.indices((size, size))
    for i in range(num_videos):
        colour, drift = rng.uniform(40, 160, 3), rng.uniform(-0.3, 0.3, 3)
        row, column = rng.uniform(0, size, 2)
        frames = []
        for t in range(num_frames):
            frame = np.clip(colour + drift * t, 0, 255) + np.zeros((size, size, 3))
            inside = (abs(rows - (row + step * t) % size) < 5) & (abs(columns - (column + t) % size) < 5)
            frame[inside] += 80
            frames.append(np.clip(frame + rng.normal(0, 2, frame.shape), 0, 255).astype(np.uint8))
        write_video(folder / f"video_{i:03d}.mkv", np.stack(frames), fps=25, codec="ffv1")
    return folder


def clips_of(folder: Path, num_clips: int) -> np.ndarray:
    return np.stack([clip.read() for clip in PROTOCOL.changed(num_clips=num_clips).select_real(open_videos(folder))])


@pytest.fixture(scope="module")
def corpora(tmp_path_factory) -> dict[str, Path]:
    """Training and test videos, and generated clips that are real ones of a third set of videos."""
    root = tmp_path_factory.mktemp("corpora")
    folders = {name: write_corpus(root / name, seed) for seed, name in enumerate(("train", "test", "third"))}
    (root / "fake").mkdir()
    for i, clip in enumerate(clips_of(folders["third"], 40)):
        write_video(root / "fake" / f"{i:03d}.mkv", clip, fps=8, codec="ffv1")
    return folders | {"fake": root / "fake"}


@pytest.fixture
def run(tmp_path):
    """`evaluate` with a cheap network and its own cache; counts what the network was asked for."""
    extractor = MeanAndStep()
    forward, extractor.num_calls = extractor.forward, 0

    def counted(units):
        extractor.num_calls += 1
        return forward(units)

    extractor.forward = counted

    def run(real, fake, protocol=PROTOCOL, metrics=("fvd", "kvd", "prdc"), **options):
        options = {"cache_dir": tmp_path / "cache", "num_resamples": 10} | options
        return evaluate(real, fake, {"i3d": extractor}, metrics, protocol, **options)

    run.extractor = extractor
    return run


def test_a_report_says_everything(run, corpora, tmp_path):
    out = tmp_path / "report"
    report = run(
        corpora["test"], [corpora["fake"]], train=corpora["train"], ladder=True, output_dir=out, fake_stride="3"
    )
    assert json.loads((out / "report.json").read_text()) == json.loads(json.dumps(report))
    rows = {row["metric"]: row for row in report["results"]}
    assert list(rows) == ["fvd", "kvd", "precision", "recall", "density", "coverage"]
    assert all(row["spread"]["std"] > 0 for row in rows.values())
    assert rows["fvd"]["num_real"] == rows["fvd"]["num_fake"] == 40
    assert rows["fvd"]["infinity"]["value"] is not None
    assert rows["coverage"]["value"] > 0.5  # the third set is of the same kind

    page = (out / "report.md").read_text()
    for fact in (
        "endora-strict",
        "num_clips = 40",
        "| clips | 40 | 40 |",
        "| videos | 10 | 40 |",
        "| stride | 3.13 (16 frames of 48) | 3 |",
        "| stored as | ffv1 | ffv1 |",
        "seed 0",
        "diffusers_endora 0.",
        "## Reference ladder",
        "## Memorisation",
        "differ in stride",
    ):
        assert fact in page, fact
    for picture in ("real_clips", "fake_clips", "fvd_against_n", "ladder", "closest_pairs"):
        assert (out / f"{picture}.png").stat().st_size > 1000
        assert f"({picture}.png)" in page
    assert report["memorisation"]["num_generated"] == 40
    assert not any(path.name.startswith(".") for path in out.iterdir())


def test_a_second_evaluation_asks_the_network_nothing(run, corpora):
    first = run(corpora["test"], [corpora["fake"]], train=corpora["train"], ladder=True)
    asked = run.extractor.num_calls
    assert asked > 0
    assert run(corpora["test"], [corpora["fake"]], train=corpora["train"], ladder=True) == first
    assert run.extractor.num_calls == asked


def test_interrupted_and_rerun_it_gives_the_same_and_repeats_no_finished_part(run, corpora, tmp_path):
    whole = run(corpora["test"], [corpora["fake"]])
    asked_in_whole = run.extractor.num_calls
    counted, calls = run.extractor.forward, iter(range(10**6))

    def interrupted(units):
        if next(calls) == 50:
            raise KeyboardInterrupt
        return counted(units)

    run.extractor.forward = interrupted
    run.extractor.num_calls = 0
    with pytest.raises(KeyboardInterrupt):
        run(corpora["test"], [corpora["fake"]], cache_dir=tmp_path / "other")
    run.extractor.forward = counted
    assert run(corpora["test"], [corpora["fake"]], cache_dir=tmp_path / "other") == whole
    assert asked_in_whole <= run.extractor.num_calls < asked_in_whole + 16  # at most the part that was begun


def test_copies_of_training_clips_are_found(run, corpora):
    copies = clips_of(corpora["train"], 40)
    copies[20:] = clips_of(corpora["third"], 20)
    report = run(corpora["test"], [copies], train=corpora["train"])
    assert report["memorisation"]["fraction_low"] > report["memorisation"]["expected"]
    assert report["memorisation"]["fraction"] >= 0.5
    honest = run(corpora["test"], [corpora["fake"]], train=corpora["train"])["memorisation"]
    assert honest["fraction_low"] <= honest["expected"]


def test_what_spoils_a_comparison_is_said(run, corpora, tmp_path):
    fakes = clips_of(corpora["third"], 10)[:, :, :20, :20]
    padded = np.concatenate([fakes, fakes[:, :4]], axis=1)
    (tmp_path / "fake").mkdir()
    for i, clip in enumerate(padded):
        write_video(tmp_path / "fake" / f"{i}.mp4", clip, fps=8, codec="h264")
    report = run(corpora["test"], [tmp_path / "fake"], train=corpora["test"], ladder=True)
    assert report["ladder"]["rungs"][0]["value"] > 0  # real clips are halved, not compared with themselves
    said = " ".join(report["warnings"])
    for warning in (
        "10 of 10 real videos are training videos",
        "There are 10 generated clips; 40 were asked for",
        "differ in N: 40 real and 10 generated",
        "differ in number of frames",
        "differ in codec",
        "lossy codec (h264)",
        "Memorisation was not audited",
    ):
        assert warning in said, warning
    overlapping = " ".join(run(corpora["test"], [corpora["fake"]], PROTOCOL.changed(num_clips=60))["warnings"])
    assert "real clips overlap others of the same video" in overlapping
    few = " ".join(run(corpora["test"], [corpora["fake"]], PROTOCOL.changed(num_clips=6))["warnings"])
    assert "6 rows of features on one side do not fill the 6 dimensions" in few


def test_a_folder_against_itself_is_noticed(run, corpora, tmp_path):
    same = run(corpora["fake"], [corpora["fake"]])
    assert any("Identical inputs: 40 of the generated videos" in warning for warning in same["warnings"])
    assert same["results"][0]["value"] == pytest.approx(0, abs=1e-6)
    copied = clips_of(corpora["test"], 40)  # the same pixels in no file
    again = run(corpora["test"], [copied])
    assert any("Identical inputs: 40 generated clips have the very features" in text for text in again["warnings"])


def test_stored_clips_are_taken_whole(run, corpora):
    report = run(corpora["fake"], [clips_of(corpora["test"], 40)])
    assert report["real"]["stride"] == "as stored"
    assert report["real"]["num_too_short"] == 0
    assert any("taken as clips, whole" in warning for warning in report["warnings"])
    with pytest.raises(ValueError, match="0 real clips of 31 frames"):
        run(corpora["fake"], [corpora["fake"]], PROTOCOL.changed(frame_interval=2))


def test_legacy_is_the_official_procedure(corpora, run):
    legacy = LEGACY.changed(num_clips=8, num_clips_of_frames=8)
    clips = legacy.select_real(open_videos(corpora["test"]))
    assert len({clip.video for clip in clips}) == len(clips) == 8
    assert all(np.diff(clip.indices).tolist() == [1] * 15 for clip in clips)
    assert clips != LEGACY.changed(num_clips=8, seed=1).select_real(open_videos(corpora["test"]))
    real = legacy.preparation((128, 128), is_fake=False, codec="ffv1")
    fake = legacy.preparation((128, 128), is_fake=True, codec="ffv1")
    assert (real.resize, real.jpeg_quality, real.mp4_crf) == ("lanczos", 75, None)
    assert (fake.resize, fake.jpeg_quality, fake.mp4_crf) == ("lanczos", 75, 5)
    assert legacy.preparation((128, 128), is_fake=True, codec="h264").mp4_crf is None
    report = run(corpora["test"], [corpora["fake"]], legacy, metrics=["fvd"])
    assert report["real"]["stride"] == "1"
    assert report["real"]["resolution"] == [128, 128]


SCRIPT = """
import sys, json
sys.path.insert(0, sys.argv[1])
from tiny import MeanAndStep
from diffusers_endora.metrics.distributed import shared_state
from diffusers_endora.metrics.evaluation import evaluate
from diffusers_endora.metrics.protocols import STRICT
here, real, fake, output_dir, train, cache_dir = sys.argv[1:]
evaluate(real, [fake], {"i3d": MeanAndStep()}, ["fvd", "kvd", "prdc"], STRICT.changed(num_clips=40), output_dir,
         train=train, cache_dir=cache_dir, num_resamples=10)
shared_state().destroy_process_group()
"""


@pytest.mark.slow
def test_two_processes_write_the_report_of_one(run, corpora, tmp_path):
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    out, cache = tmp_path / "report", tmp_path / "cache_of_two"
    arguments = [Path(__file__).parent, corpora["test"], corpora["fake"], out, corpora["train"], cache]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", script]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        list(map(str, command + arguments)), capture_output=True, text=True, env=environment, timeout=300
    )
    assert done.returncode == 0, done.stderr
    report = run(corpora["test"], [corpora["fake"]], train=corpora["train"])
    assert json.loads((out / "report.json").read_text()) == json.loads(json.dumps(report))
    num_parts = [len(list(folder.rglob("part-*.safetensors"))) for folder in (tmp_path / "cache", cache)]
    assert num_parts[1] > num_parts[0]  # 16 clips a part, of each process


# --- bad input -------------------------------------------------------------------------------------------------------


def bad_folder(kind: str, folder: Path) -> Path:
    folder.mkdir()
    clip = np.random.default_rng(0).integers(0, 256, (48, 16, 16, 3), dtype=np.uint8)
    if kind == "one clip":
        write_video(folder / "a.mkv", clip[:16], fps=8, codec="ffv1")
    elif kind == "mixed sizes":
        write_video(folder / "a.mkv", clip[:16], fps=8, codec="ffv1")
        write_video(folder / "b.mkv", clip[:16, :8], fps=8, codec="ffv1")
    elif kind == "too few frames":
        for name in "ab":
            write_video(folder / f"{name}.mkv", clip[:9], fps=8, codec="ffv1")
    elif kind == "NaN":
        np.save(folder / "a.npy", np.where(clip[None, :16] > 250, np.nan, clip[None, :16] / 255).repeat(2, axis=0))
    elif kind == "text as mp4":
        (folder / "a.mp4").write_text("this is no video")
    return folder


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("empty", "holds no clips; expected videos"),
        ("one clip", "holds 1 generated clip; a distance needs 2 or more"),
        ("mixed sizes", "8x16|16x8"),
        ("too few frames", "9 frames"),
        ("NaN", "not finite"),
        ("text as mp4", r"a\.mp4"),
    ],
)
def test_bad_generated_clips_get_one_sentence_and_no_report(run, corpora, tmp_path, kind, message):
    with pytest.raises(ValueError, match=message) as error:
        run(corpora["test"], [bad_folder(kind, tmp_path / "bad")], output_dir=tmp_path / "report")
    assert "\n" not in str(error.value)
    assert not (tmp_path / "report").exists()


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("empty", "holds no clips"),
        ("too few frames", "0 real clips of 48 frames; a distance needs 2"),
        ("text as mp4", r"a\.mp4"),
    ],
)
def test_bad_real_videos_get_one_sentence(run, corpora, tmp_path, kind, message):
    with pytest.raises(ValueError, match=message) as error:
        run(bad_folder(kind, tmp_path / "bad"), [corpora["fake"]])
    assert "\n" not in str(error.value)


def test_other_mistakes_get_one_sentence(run, corpora, tmp_path):
    with pytest.raises(ValueError, match="expected a folder of clips or a video"):
        run(tmp_path / "nothing", [corpora["fake"]])
    with pytest.raises(ValueError, match="metric 'fdv': expected one of fvd"):
        run(corpora["test"], [corpora["fake"]], metrics=["fdv"])
    with pytest.raises(ValueError, match="a float: expected a path"):
        run(corpora["test"], [1.0])
    with pytest.raises(ValueError, match="num_clips=1"):
        PROTOCOL.changed(num_clips=1)
