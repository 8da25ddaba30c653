"""Rendered colons as Parquet or WebDataset shards for training, streaming and the Hub; README.md is the card.

    python datasets_scripts/phantom/phantom.py --output_dir OUT --num_videos 300

`endora prepare phantom` is the same; the rows are made by `diffusers_endora.data.corpora.phantom`.
"""

from diffusers_endora.cli import run_prepare_script

if __name__ == "__main__":
    run_prepare_script("phantom")
