"""Every layout of every corpus, all the way: raw folder, shards, rows, streams, clips, a training step."""

import importlib.util
import sys
from pathlib import Path

import datasets
import pytest
import torch
from accelerate.state import AcceleratorState
from diffusers import AutoencoderTiny
from trees import LAYOUTS, read_tree, write_tree

from diffusers_endora import ClipDataset, EndoraPipeline
from diffusers_endora.data.clips import find_videos
from diffusers_endora.data.corpora.prepare import prepare_corpus

SCRIPT = Path(__file__).resolve().parents[3] / "examples" / "train_endora.py"
EVERY_LAYOUT = [(corpus, layout) for corpus, layouts in LAYOUTS.items() for layout in layouts]


@pytest.fixture(scope="module")
def vae(tmp_path_factory) -> str:
    torch.manual_seed(0)
    blocks = {"encoder_block_out_channels": (8, 8, 8), "decoder_block_out_channels": (8, 8, 8)}
    counts = {"num_encoder_blocks": (1, 1, 1), "num_decoder_blocks": (1, 1, 1)}
    folder = tmp_path_factory.mktemp("vae")
    AutoencoderTiny(**blocks, **counts).save_pretrained(folder)
    return str(folder)


def train(vae: str, output_dir: Path, *source: object) -> str:
    """A step of the training script; returns the model card."""
    options = (
        "--prior none --preset demo --num_layers 1 --num_attention_heads 2 --attention_head_dim 8 --resolution 16"
    )
    options += " --num_still_images 2 --train_batch_size 2 --max_train_steps 1 --num_validation_clips 1"
    options += " --validation_inference_steps 1 --dataloader_num_workers 0"
    spec = importlib.util.spec_from_file_location("train_endora", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    AcceleratorState._reset_state(True)
    argv, sys.argv = (
        sys.argv,
        [str(SCRIPT), *options.split(), "--pretrained_vae", vae, "--output_dir", str(output_dir)],
    )
    sys.argv += map(str, source)
    try:
        module.main()
    finally:
        sys.argv = argv
        AcceleratorState._reset_state(True)
    EndoraPipeline.from_pretrained(output_dir)
    return (output_dir / "README.md").read_text()


@pytest.mark.parametrize(("corpus", "layout"), EVERY_LAYOUT)
@pytest.mark.parametrize("config_name", ["videos", "clips"])
def test_prepared_loaded_streamed_and_trained_on(corpus, layout, config_name, vae, tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    raw = write_tree(corpus, layout, tmp_path / "raw")
    out = tmp_path / "out"
    file_format = "parquet" if config_name == "videos" else "webdataset"
    prepared = prepare_corpus(corpus, raw, out, config_name=config_name, short_side=16, file_format=file_format)
    loaded = datasets.load_dataset(str(out))
    streamed = datasets.load_dataset(str(out), streaming=True)
    assert sorted(loaded) == sorted(streamed) == sorted(prepared.summary["splits"])
    for split, counts in prepared.summary["splits"].items():
        assert len(loaded[split]) == counts["rows"]
        clips = ClipDataset(out, resolution=16, split=split, epoch_over="videos")
        stream = ClipDataset(out, resolution=16, split=split, streaming=True)
        assert (len(clips), clips.num_broken) == (counts["rows"], 0)
        items = list(stream)
        assert (len(items), stream.num_broken) == (counts["rows"], 0)
        # A stream draws other windows, but a clip of 16 of 20 frames is much the same; and the videos differ
        means = [sorted(float(item["video"].mean()) for item in source) for source in (clips, items)]
        assert means[0] == pytest.approx(means[1], abs=0.1)
    if config_name == "videos":
        train(vae, tmp_path / "trained", "--dataset_name", out)


@pytest.mark.parametrize(("corpus", "layout"), [(corpus, layouts[0]) for corpus, layouts in LAYOUTS.items()])
def test_trained_on_the_raw_folder(corpus, layout, vae, tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    raw = write_tree(corpus, layout, tmp_path / "raw")
    num_videos = len(find_videos(raw)[0])
    assert f": {num_videos} videos" in train(vae, tmp_path / "as_videos", "--train_data_dir", raw)
    num_train = sum(video.split == "train" for video in read_tree(corpus, raw).videos)
    card = train(vae, tmp_path / "as_corpus", "--dataset_name", corpus, "--train_data_dir", raw)
    assert f": {num_train} videos" in card


def test_trained_on_the_prepared_phantom(vae, tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    prepare_corpus("phantom", None, tmp_path / "out", num_videos=10, num_frames=16, height=16, width=16)
    card = train(vae, tmp_path / "trained", "--dataset_name", tmp_path / "out", "--class_conditional")
    assert "`2` instrument" in card
