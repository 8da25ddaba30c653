"""CholecT45 and CholecT50 as Parquet or WebDataset shards for training, streaming and the Hub; README.md is the card.

    python datasets_scripts/cholectriplet/cholectriplet.py --data_dir CholecT50 --output_dir OUT --transcode 128

`endora prepare cholectriplet` is the same; the rows are made by `diffusers_endora.data.corpora.cholectriplet`.
"""

from diffusers_endora.cli import run_prepare_script

if __name__ == "__main__":
    run_prepare_script("cholectriplet")
