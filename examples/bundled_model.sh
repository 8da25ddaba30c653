#!/bin/sh
# Makes the model that comes with the package, from nothing: corpus, teacher, autoencoder, transformer, held-out numbers,
# and the files in src/diffusers_endora/bundled. Hours on two CPU cores; a killed run goes on where it was.
#
#     examples/bundled_model.sh [WORK]
#
# All pictures are rendered (diffusers_endora.data.phantom); training, validation and test videos show different colons.
set -eu
work=${1:-outputs/bundled}
examples=$(cd "$(dirname "$0")" && pwd)

echo "== 1. videos of 2000, 128 and 1024 rendered colons"
python "$examples/render_phantom.py" --output_dir "$work/phantom/train" --split train --num_videos 2000 --num_frames 32
python "$examples/render_phantom.py" --output_dir "$work/phantom/validation" --split validation --num_videos 128 \
    --num_frames 16
python "$examples/render_phantom.py" --output_dir "$work/phantom/test" --split test --num_videos 1024 --num_frames 16

echo "== 2. a teacher for the prior, and for the autoencoder's sense of likeness"
python "$examples/train_teacher.py" --train_data_dir "$work/phantom/train" \
    --validation_data_dir "$work/phantom/validation" --output_dir "$work/teacher" --num_small_views 2 \
    --max_train_steps 1200 --mixed_precision bf16

echo "== 3. the autoencoder"
python "$examples/train_autoencoder.py" --train_data_dir "$work/phantom/train" \
    --validation_data_dir "$work/phantom/validation" --output_dir "$work/autoencoder" --teacher "$work/teacher" \
    --max_train_steps 10000 --sharpening_start 5000 --mixed_precision bf16
