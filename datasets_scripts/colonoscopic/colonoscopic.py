"""Colonoscopic as Parquet or WebDataset shards for training, streaming and the Hub; README.md is the card.

    python datasets_scripts/colonoscopic/colonoscopic.py --data_dir RAW --output_dir OUT --transcode 128

`endora prepare colonoscopic` is the same; the rows are made by `diffusers_endora.data.corpora.colonoscopic`.
"""

from diffusers_endora.cli import run_prepare_script

if __name__ == "__main__":
    run_prepare_script("colonoscopic")
