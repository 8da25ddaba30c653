"""Kvasir-Capsule as Parquet or WebDataset shards for training, streaming and the Hub; README.md is the card.

    python datasets_scripts/kvasir_capsule/kvasir_capsule.py \\
        --data_dir RAW --output_dir OUT --transcode 128 --config clips

`endora prepare kvasir_capsule` is the same; the rows are made by `diffusers_endora.data.corpora.kvasir_capsule`.
"""

from diffusers_endora.cli import run_prepare_script

if __name__ == "__main__":
    run_prepare_script("kvasir_capsule")
