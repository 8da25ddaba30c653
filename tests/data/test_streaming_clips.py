"""Clips from streams: each row once, workers change nothing, processes share, and resuming goes on with the next item.

Frame `i` of video `v` has red = v and green = i, as in `test_clips.py`.
"""

import itertools
import json
import logging
import subprocess
import sys
import threading
import zipfile
from collections import Counter
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from accelerate.data_loader import prepare_data_loader
from datasets.distributed import split_dataset_by_node
from torch.utils.data import DataLoader
from torchdata.stateful_dataloader import StatefulDataLoader

from diffusers_endora.data import streaming_clips
from diffusers_endora.data.clips import ClipDataset
from diffusers_endora.data.streaming_clips import StreamingClipDataset
from diffusers_endora.data.video_io import write_video

LENGTHS = (60, 20, 50, 33, 90, 16, 24, 41, 50, 70)
SIZE = {"resolution": 8}


def marked_frames(video: int, num_frames: int) -> np.ndarray:
    frames = np.zeros((num_frames, 8, 8, 3), np.uint8)
    frames[..., 0] = video
    frames[..., 1] = np.arange(num_frames)[:, None, None]
    return frames


def origins(video: torch.Tensor) -> list[tuple[int, int]]:
    colours = ((video + 1) * 127.5).round().int()
    return [(int(r), int(g)) for r, g in colours[:, :2, 0, 0]]


def drawn(items) -> list[tuple]:
    return [tuple(origins(item["video"])) for item in items]


@pytest.fixture(autouse=True)
def short_sleep(monkeypatch):
    """Where a stream of several sources ends, `datasets` sleeps for 5 seconds."""
    monkeypatch.setattr(datasets.config, "SLEEP_TIME_ON_THREADS_SHUTDOWN", 0.1)


@pytest.fixture(scope="module")
def rows(tmp_path_factory) -> list[dict]:
    root = tmp_path_factory.mktemp("videos")
    made = []
    for v, length in enumerate(LENGTHS):
        path = write_video(root / f"{v}.mkv", marked_frames(v, length), 25, "ffv1")
        video = {"path": path.name, "bytes": path.read_bytes()}
        made.append({"video": video, "label": v % 2, "num_frames": length, "other": "x" * 100})
    return made


def features(**changes):
    columns = {
        "video": datasets.Video(decode=False),
        "label": datasets.ClassLabel(names=["no", "yes"]),
        "num_frames": datasets.Value("int64"),
        "other": datasets.Value("string"),
    }
    return datasets.Features(columns | changes)


@pytest.fixture(scope="module")
def folder(rows, tmp_path_factory) -> Path:
    """Four Parquet shards of 3, 3, 2 and 2 rows."""
    root = tmp_path_factory.mktemp("shards")
    dataset = datasets.Dataset.from_list(rows, features=features())
    for i in range(4):
        dataset.shard(4, i, contiguous=True).to_parquet(root / f"train-{i:05d}-of-00004.parquet", batch_size=1)
    return root


@pytest.fixture
def stream(folder):
    return datasets.load_dataset(str(folder), split="train", streaming=True)


def test_every_row_gives_a_clip_in_shuffled_order(stream):
    dataset = ClipDataset(stream, shuffle_buffer=5, class_labels=True, **SIZE)
    assert isinstance(dataset, StreamingClipDataset)
    assert (dataset.class_names, dataset.num_classes) == (["no", "yes"], 2)
    items = list(dataset)
    videos = [clip[0][0] for clip in drawn(items)]
    assert sorted(videos[:5]) == [0, 1, 2, 3, 4]
    assert sorted(videos[5:]) == [5, 6, 7, 8, 9]
    assert videos != sorted(videos)
    for item in items:
        assert item["video"].shape == (16, 3, 8, 8)
        assert item["class_labels"] == origins(item["video"])[0][0] % 2
        assert {video for video, _ in origins(item["video"])} == {origins(item["video"])[0][0]}
    of_short = next(clip for clip in drawn(items) if clip[0][0] == 5)
    assert [frame for _, frame in of_short] == list(range(16))
    with pytest.raises(TypeError):
        len(dataset)


def test_epochs_have_other_clips_and_can_be_repeated(stream):
    dataset = ClipDataset(stream, **SIZE)
    first = drawn(dataset)
    assert drawn(dataset) == first
    dataset.set_epoch(1)
    second = drawn(dataset)
    assert sorted(clip[0][0] for clip in second) == list(range(10))
    assert set(second) != set(first)
    dataset.set_epoch(0)
    assert drawn(dataset) == first
    assert drawn(ClipDataset(stream, seed=1, **SIZE)) != first


def test_splits_of_datasets_and_formatted_rows(folder):
    loaded = datasets.load_dataset(str(folder))
    for source in (loaded, loaded["train"].with_format("torch"), datasets.load_dataset(str(folder), streaming=True)):
        dataset = ClipDataset(source, streaming=True, class_labels=True, **SIZE)
        assert sorted(clip[0][0] for clip in drawn(dataset)) == list(range(10))
    assert ClipDataset(loaded["train"].with_format("numpy"), class_labels=True, **SIZE).num_videos == 10


def test_clips_per_video(stream):
    clips = drawn(ClipDataset(stream, clips_per_video=3, **SIZE))
    assert Counter(clip[0][0] for clip in clips) == dict.fromkeys(range(10), 3)
    assert len({clip for clip in clips if clip[0][0] == 4}) == 3


def test_still_images_come_from_the_block_with_their_labels(stream):
    items = list(ClipDataset(stream, shuffle_buffer=5, num_still_images=4, class_labels=True, **SIZE))
    for i, item in enumerate(items):
        where = origins(item["video"])
        assert item["video"].shape == (20, 3, 8, 8)
        assert item["class_labels"].tolist() == [where[0][0] % 2, *(video % 2 for video, _ in where[16:])]
        assert {video for video, _ in where[16:]} <= (set(range(5)) if i < 5 else set(range(5, 10)))
    assert len({video for item in items for video, _ in origins(item["video"])[16:]}) > 5


@pytest.mark.parametrize("num_workers", [2, 3])
def test_workers_share_the_rows(stream, num_workers):
    loader = DataLoader(ClipDataset(stream, **SIZE), batch_size=None, num_workers=num_workers)
    assert sorted(clip[0][0] for clip in drawn(loader)) == list(range(10))


def test_persistent_workers_see_the_epoch(stream):
    dataset = ClipDataset(stream, **SIZE)
    loader = DataLoader(dataset, batch_size=None, num_workers=2, persistent_workers=True)
    epochs = []
    for epoch in (0, 1, 0):
        dataset.set_epoch(epoch)
        epochs.append(drawn(loader))
    assert epochs[0] == epochs[2]
    assert epochs[0] != epochs[1]


def test_a_row_that_comes_twice_gives_another_clip(stream):
    twice = datasets.concatenate_datasets([stream, stream])
    for shuffle_buffer in (100, 3):
        clips = drawn(ClipDataset(twice, shuffle_buffer=shuffle_buffer, **SIZE))
        assert Counter(clip[0][0] for clip in clips) == dict.fromkeys(range(10), 2)
        assert len({clip for clip in clips if clip[0][0] == 4}) == 2


@pytest.mark.parametrize("options", [pytest.param({}, marks=pytest.mark.slow), {"fixed_offsets": True}])
@pytest.mark.parametrize("epoch", [pytest.param(0, marks=pytest.mark.slow), 3])
def test_a_state_goes_on_with_the_very_next_item(folder, epoch, options):
    arguments = {"shuffle_buffer": 4, "clips_per_video": 2, "num_still_images": 1, **SIZE, **options}
    dataset = ClipDataset(str(folder), streaming=True, **arguments)
    dataset.set_epoch(epoch)
    states, clips = [dataset.state_dict()], []
    for item in dataset:
        clips += drawn([item])
        states.append(dataset.state_dict())
    for position in range(len(clips) + 1):
        resumed = ClipDataset(str(folder), streaming=True, **arguments)
        resumed.load_state_dict(json.loads(json.dumps(states[position])))
        assert drawn(resumed) == clips[position:], position
        assert len(list(resumed)) == len(clips)  # the next epoch is whole again


def test_a_shuffled_stream_goes_on_with_the_very_next_item(stream):
    shuffled = stream.shuffle(seed=3, buffer_size=4)
    dataset = ClipDataset(shuffled, shuffle_buffer=3, **SIZE)
    states, clips = [dataset.state_dict()], []
    for item in dataset:
        clips += drawn([item])
        states.append(dataset.state_dict())
    assert sorted(clip[0][0] for clip in clips) == list(range(10))
    for position in range(len(clips) + 1):
        resumed = ClipDataset(shuffled, shuffle_buffer=3, **SIZE)
        resumed.load_state_dict(json.loads(json.dumps(states[position])))
        assert drawn(resumed) == clips[position:], position


def test_a_state_of_another_set_up_is_refused(stream):
    def dataset(**options):
        return ClipDataset(stream, **{"shuffle_buffer": 4, **SIZE, **options})

    interrupted = dataset()
    next(iter(interrupted))
    state = interrupted.state_dict()
    others = {"seed": 1, "shuffle_buffer": 5, "clips_per_video": 2, "fixed_offsets": True, "window": 20}
    for name, value in others.items():
        with pytest.raises(ValueError, match=f"state_dict: was taken with {name} .*, and it is {value} now"):
            dataset(**{name: value}).load_state_dict(state)
    with pytest.raises(ValueError, match="num_processes 1, and it is 2 now"):
        dataset().split_among_processes(2, 0).load_state_dict(state)
    with pytest.raises(ValueError, match="num_shards 4, and it is 2 now"):
        ClipDataset(stream.shard(2, 0), shuffle_buffer=4, **SIZE).load_state_dict(state)
    for nothing in ({}, {"epoch": 0}, None):
        with pytest.raises(ValueError, match="state_dict: expected a dict of set_up, worker, epoch"):
            dataset().load_state_dict(nothing)
    resumed = dataset()
    resumed.load_state_dict(state | {"item": 99})
    with pytest.raises(ValueError, match="says item 99 of a block that has 4"):
        list(resumed)
    resumed.load_state_dict(state)
    with pytest.raises(ValueError, match=r"worker \[0, 0\], and it is \[0, 2\] now"):
        list(DataLoader(resumed, batch_size=None, num_workers=2))


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_stateful_data_loader_goes_on_with_the_very_next_batch(stream, num_workers):
    def loader():
        dataset = ClipDataset(stream, shuffle_buffer=3, num_still_images=1, **SIZE)
        dataset.set_epoch(1)
        return StatefulDataLoader(dataset, batch_size=2, num_workers=num_workers)

    def clips(batches):
        return [drawn([{"video": video} for video in batch["video"]]) for batch in batches]

    expected = clips(loader())
    assert len(expected) in (5, 6)
    for position in range(1, len(expected) + 1):
        interrupted = loader()
        assert clips(itertools.islice(iter(interrupted), position)) == expected[:position]
        resumed = loader()
        resumed.load_state_dict(interrupted.state_dict())
        assert clips(resumed) == expected[position:]


@pytest.mark.parametrize(("num_processes", "left_over"), [(2, 0), (3, 1), (4, 2)])
def test_processes_share_the_rows_equally(stream, num_processes, left_over):
    shares = []
    for i in range(num_processes):
        dataset = ClipDataset(stream, shuffle_buffer=2, **SIZE).split_among_processes(num_processes, i)
        shares.append({clip[0][0] for clip in drawn(dataset)})
        assert dataset.num_left_over == left_over
    assert [len(share) for share in shares] == [10 // num_processes] * num_processes
    assert len(set.union(*shares)) == 10 - left_over


def shared(stream, num_processes, **options):
    found = [
        ClipDataset(stream, **options, **SIZE).split_among_processes(num_processes, i) for i in range(num_processes)
    ]
    return [drawn(dataset) for dataset in found]


def without(rows, *broken, is_short=False) -> datasets.IterableDataset:
    """A stream in which some videos cannot be read."""
    short = rows[5]["video"]["bytes"]
    bare = [{"video": row["video"]} for row in rows]
    for i in broken:
        bare[i] = {"video": {"path": f"{i}.mkv", "bytes": short if is_short else b"nothing"}}
    columns = datasets.Features({"video": datasets.Video(decode=False)})
    return datasets.Dataset.from_list(bare, features=columns).to_iterable_dataset()


@pytest.mark.parametrize("broken", [(0, 2), (1, 3), (4, 6), (8,), (0, 2, 4, 6)])
def test_processes_have_equally_many_items_whatever_is_broken(rows, broken):
    stream = without(rows, *broken)
    shares = shared(stream, 2, shuffle_buffer=2)
    assert [len(share) for share in shares] == [5, 5]
    videos = Counter(clip[0][0] for share in shares for clip in share)
    assert set(videos) == set(range(10)) - set(broken)


def test_a_process_without_any_usable_row_says_so(rows):
    stream = without(rows, 0, 2, 4, 6, 8)
    dataset = ClipDataset(stream, shuffle_buffer=2, **SIZE).split_among_processes(2, 0)
    assert len(drawn(dataset)) == 5  # those of the other stand in
    nothing = ClipDataset(without(rows, *range(10)), **SIZE).split_among_processes(2, 0)
    with pytest.raises(ValueError, match="no usable row: 5 could not be read"):
        list(nothing)
    assert nothing.num_broken == 5


@pytest.mark.parametrize("num_processes", [2, 3])
@pytest.mark.parametrize("broken", [(), (0, 3), (9,)])
def test_fixed_clips_are_shared_without_loss(rows, num_processes, broken):
    options = {"fixed_offsets": True, "clips_per_video": 3, "shuffle_buffer": 4, "num_frames": 17}
    stream = without(rows, *broken)
    expected = drawn(ClipDataset(stream, **options, **SIZE))
    shares = shared(stream, num_processes, **options)
    assert [clip for turn in itertools.zip_longest(*shares) for clip in turn if clip is not None] == expected

    dataset = ClipDataset(stream, **options, **SIZE).split_among_processes(num_processes, 1)
    states = [dataset.state_dict() for _ in dataset]
    for position, state in enumerate(states, start=1):
        resumed = ClipDataset(stream, **options, **SIZE).split_among_processes(num_processes, 1)
        resumed.load_state_dict(state)
        assert drawn(resumed) == shares[1][position:]


@pytest.mark.parametrize("dispatch_batches", [pytest.param(True, marks=pytest.mark.slow), False])
def test_rows_are_not_shared_out_twice(stream, dispatch_batches):
    dataset = ClipDataset(stream, **SIZE).split_among_processes(2, 0)
    for options in ({}, {"num_workers": 1}, {"num_workers": 1, "multiprocessing_context": "spawn"}):
        loader = DataLoader(dataset, **options)
        options = {"num_processes": 2, "process_index": 0, "dispatch_batches": dispatch_batches}
        prepared = prepare_data_loader(loader, torch.device("cpu"), put_on_device=True, **options)
        with pytest.raises(ValueError, match=r"Accelerator.prepare does it once more"):
            list(prepared)
    split = split_dataset_by_node(stream, rank=0, world_size=2)
    with pytest.raises(ValueError, match="split_dataset_by_node has shared out the stream"):
        ClipDataset(split, **SIZE).split_among_processes(2, 0)


SHARE = """
import sys, json, torch
from accelerate import Accelerator
from datasets import load_dataset
from torch.utils.data import DataLoader
from diffusers_endora import ClipDataset
accelerator = Accelerator(cpu=True)
found = {}
for name in ("split", "dispatched", "map"):
    source = load_dataset(sys.argv[1], split="train", streaming=name != "map", cache_dir=sys.argv[2] + name)
    dataset = ClipDataset(source, resolution=8, **({"epoch_over": "videos"} if name == "map" else {}))
    if name == "split":
        dataset.split_among_processes(accelerator.num_processes, accelerator.process_index)
    loader = DataLoader(dataset, batch_size=1)
    if name != "split":
        loader = accelerator.prepare(loader)
    found[name] = [round(float((b["video"][0, 0, 0, 0, 0] + 1) * 127.5)) for b in loader]
with open(f"{sys.argv[2]}{accelerator.process_index}.json", "w") as file:
    json.dump([accelerator.num_processes, found], file)
accelerator.end_training()
"""


@pytest.mark.slow
def test_two_processes_under_accelerate(folder, tmp_path):
    script = tmp_path / "share.py"
    script.write_text(SHARE)
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", "0"]
    subprocess.run([*command, "--standalone", script, folder, f"{tmp_path}/"], check=True, capture_output=True)
    (n, first), (_, second) = (json.loads((tmp_path / f"{i}.json").read_text()) for i in range(2))
    assert n == 2
    for name in ("split", "dispatched", "map"):
        assert len(first[name]) == len(second[name]) == 5, name
        assert sorted(first[name] + second[name]) == list(range(10)), name


def test_fixed_offsets_are_those_of_a_dataset(folder, stream):
    arguments = {"fixed_offsets": True, "clips_per_video": 3, **SIZE}
    expected = drawn(ClipDataset(str(folder), **arguments))
    assert len(expected) == 3 + 1 + 3 + 1 + 3 + 1 + 1 + 1 + 3 + 3
    assert drawn(ClipDataset(stream, **arguments)) == expected
    dataset = ClipDataset(stream, shuffle_buffer=1, **arguments)
    for epoch in range(4):
        dataset.set_epoch(epoch)
        assert drawn(dataset) == expected


def test_broken_short_and_unlabelled_rows_are_counted_and_replaced(rows, caplog):
    damaged = [dict(row) for row in rows]
    damaged[1] = damaged[1] | {"video": {"path": "nothing.mkv", "bytes": b""}}
    damaged[2] = damaged[2] | {"video": {"path": "cut.mkv", "bytes": damaged[2]["video"]["bytes"][:3000]}}
    damaged[3] = damaged[3] | {"num_frames": 15}
    damaged[4] = damaged[4] | {"label": None}
    damaged[6] = damaged[6] | {"video": {"path": "absent.mkv", "bytes": None}}
    stream = datasets.Dataset.from_list(damaged, features=features()).to_iterable_dataset()
    dataset = ClipDataset(stream, class_labels=True, **SIZE)
    with caplog.at_level(logging.WARNING):
        videos = Counter(clip[0][0] for clip in drawn(dataset))
    assert sum(videos.values()) == 8  # as many as rows that say that they will do, so that processes stay in step
    assert set(videos) <= {0, 2, 5, 7, 8, 9}
    assert dataset.num_broken in (2, 3)  # the clip may lie in the intact part of the cut video
    assert (dataset.num_too_short, dataset.num_unlabelled) == (1, 1)
    assert "nothing.mkv" in caplog.text

    nothing = ClipDataset(datasets.Dataset.from_list(damaged[1:2], features=features()).to_iterable_dataset(), **SIZE)
    with pytest.raises(ValueError, match="no usable row: 1 could not be read"):
        list(nothing)


def test_intact_parts_of_damaged_rows_stay_in_use_and_resuming_is_exact(rows):
    cut = rows[4]["video"]["bytes"]  # 90 frames, of which the last cannot be decoded
    damaged = [{"video": {"path": f"{i}.mkv", "bytes": cut[: len(cut) // 2]}, "num_frames": 90} for i in range(6)]
    columns = datasets.Features({"video": datasets.Video(decode=False), "num_frames": datasets.Value("int64")})
    stream = datasets.Dataset.from_list(damaged, features=columns).to_iterable_dataset()
    arguments = {"clips_per_video": 4, "window": 16, "shuffle_buffer": 4, **SIZE}
    dataset = ClipDataset(stream, **arguments)
    states = [dataset.state_dict()]
    clips = []
    for item in dataset:
        clips += drawn([item])
        states.append(dataset.state_dict())
    assert len(clips) == 24
    assert len(set(clips)) > 12
    assert 0 < dataset.num_broken <= 6
    for position, state in enumerate(states):
        resumed = ClipDataset(stream, **arguments)
        resumed.load_state_dict(state)
        assert drawn(resumed) == clips[position:]


def test_rows_need_not_state_their_number_of_frames(rows):
    bare = [{"video": row["video"]} for row in rows]
    short = {"video": {"path": "short.mkv", "bytes": rows[5]["video"]["bytes"]}}
    stream = datasets.IterableDataset.from_generator(lambda: iter([*bare, short]))
    dataset = ClipDataset(stream, num_frames=17, **SIZE)
    assert {clip[0][0] for clip in drawn(dataset)} == set(range(10)) - {5}
    assert dataset.num_too_short == 2


def test_a_label_of_minus_one_is_none(rows):
    unlabelled = [row | {"label": -1 if i < 3 else row["label"]} for i, row in enumerate(rows)]
    found = datasets.Dataset.from_list(unlabelled, features=features(label=datasets.Value("int64")))
    stream = ClipDataset(found.to_iterable_dataset(), class_labels=True, **SIZE)
    assert sorted(clip[0][0] for clip in drawn(stream)) == list(range(3, 10))
    assert stream.num_unlabelled == 3
    assert ClipDataset(found, class_labels=True, **SIZE).num_unlabelled == 3


def test_videos_behind_urls(rows, tmp_path):
    with zipfile.ZipFile(tmp_path / "videos.zip", "w") as archive:
        for i, row in enumerate(rows):
            archive.writestr(f"{i}.mkv", row["video"]["bytes"])
    names = [f"zip://{i}.mkv::{tmp_path}/videos.zip" for i in (*range(10), 77)]
    columns = datasets.Features({"video": datasets.Video(decode=False)})
    found = datasets.Dataset.from_dict({"video": [{"path": name, "bytes": None} for name in names]}, features=columns)
    stream = ClipDataset(found.to_iterable_dataset(), **SIZE)
    videos = Counter(clip[0][0] for clip in drawn(stream))
    assert (set(videos), sum(videos.values()), stream.num_broken) == (set(range(10)), 11, 1)
    of_rows = ClipDataset(found, epoch_over="videos", **SIZE)
    assert [origins(of_rows[i]["video"])[0][0] for i in range(10)] == list(range(10))
    assert "FileNotFoundError" in of_rows.broken_files["row 10"]


def test_a_stream_whose_generator_cannot_be_copied(rows):
    def generate(lock):
        with lock:
            yield from ({"video": row["video"]} for row in rows)

    stream = datasets.IterableDataset.from_generator(generate, gen_kwargs={"lock": threading.Lock()})
    dataset = ClipDataset(stream, shuffle_buffer=3, **SIZE)
    clips = drawn(dataset)
    assert sorted(clip[0][0] for clip in clips) == list(range(10))
    iterator = iter(dataset)
    assert drawn(itertools.islice(iterator, 4)) == clips[:4]
    state = dataset.state_dict()
    iterator.close()
    dataset.load_state_dict(state)
    assert drawn(dataset) == clips[4:]


def test_a_stand_in_leaves_the_place_of_a_stream_without_copy(rows):
    def generate(lock):  # held for a row alone, as the stand-in is read meanwhile
        for i, row in enumerate(rows):
            with lock:
                row = {"video": {"path": "absent.mkv", "bytes": b"-"} if i in (2, 4) else row["video"]}
            yield row

    stream = datasets.IterableDataset.from_generator(generate, gen_kwargs={"lock": threading.Lock()})
    dataset = ClipDataset(stream, shuffle_buffer=1, **SIZE)
    states = [dataset.state_dict()]
    clips = []
    for item in dataset:
        clips += drawn([item])
        states.append(dataset.state_dict())
    assert [clip[0][0] for clip in clips] == [0, 1, 0, 3, 0, 5, 6, 7, 8, 9]
    for position, state in enumerate(states):
        resumed = ClipDataset(stream, shuffle_buffer=1, **SIZE)
        resumed.load_state_dict(state)
        assert drawn(resumed) == clips[position:], position


def test_a_block_is_limited_in_bytes(stream, monkeypatch):
    monkeypatch.setattr(streaming_clips, "_BLOCK_BYTES", 1)
    assert [clip[0][0] for clip in drawn(ClipDataset(stream, **SIZE))] == list(range(10))


def test_other_columns_are_not_read(folder):
    dataset = ClipDataset(str(folder), streaming=True, class_labels=True, **SIZE)
    assert sorted(next(iter(dataset._stream))) == ["label", "num_frames", "video"]


def test_wrong_sources(folder, tmp_path, rows):
    with pytest.raises(ValueError, match=r"split='test'|cannot be loaded \(ValueError: .*test"):
        ClipDataset(str(folder), streaming=True, split="test")
    (tmp_path / "videos").mkdir()
    with pytest.raises(ValueError, match="streaming is for Parquet or WebDataset shards"):
        ClipDataset(tmp_path / "videos", streaming=True)
    with pytest.raises(ValueError, match=r"streaming=True with a list"):
        ClipDataset(rows, streaming=True)
    with pytest.raises(ValueError, match=r"video_column='clip': expected one of the columns video, label"):
        ClipDataset(str(folder), streaming=True, video_column="clip")
    with pytest.raises(ValueError, match=r"process_index=2: expected 0 to 1"):
        ClipDataset(str(folder), streaming=True).split_among_processes(2, 2)
    bad = datasets.Dataset.from_list([rows[0] | {"label": "yes"}], features=features(label=datasets.Value("string")))
    with pytest.raises(ValueError, match=r"0.mkv: label='yes': expected an integer label"):
        list(ClipDataset(bad.to_iterable_dataset(), class_labels=True))
    for option in ({"cache_gb": 1.0}, {"epoch_over": "videos"}, {"still_images": "images"}):
        with pytest.raises(ValueError, match=f"{next(iter(option))}=.*: is not for streams"):
            ClipDataset(str(folder), streaming=True, **option)
    with pytest.raises(ValueError, match="shuffle_buffer: is for streams"):
        ClipDataset(str(folder), shuffle_buffer=3)
    with pytest.raises(ValueError, match="source is an empty name"):
        ClipDataset("")
    shapes = {"shuffle_buffer": 0, "clips_per_video": 0, "window": 3, "num_frames": 0, "seed": -1}
    for name, value in shapes.items():
        with pytest.raises(ValueError, match=f"{name}={value}: expected"):
            ClipDataset(str(folder), streaming=True, **{name: value})
