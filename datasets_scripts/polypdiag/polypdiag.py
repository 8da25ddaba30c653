"""PolypDiag as Parquet or WebDataset shards for training, streaming and the Hub; README.md is the card.

    python datasets_scripts/polypdiag/polypdiag.py --data_dir PolypDiag --output_dir OUT --transcode 128

`endora prepare polypdiag` is the same; the rows are made by `diffusers_endora.data.corpora.polypdiag`.
"""

from diffusers_endora.cli import run_prepare_script

if __name__ == "__main__":
    run_prepare_script("polypdiag")
