#!/bin/sh
# The parts of a model of rendered colons, from nothing: corpus, a teacher for the prior, an autoencoder. Hours on two CPU
# cores; a killed run goes on where it was.
#
#     examples/phantom_parts.sh [WORK]
#
# All pictures are rendered (diffusers_endora.data.phantom); training and validation videos show different colons.
set -eu
work=${1:-outputs/phantom_parts}
examples=$(cd "$(dirname "$0")" && pwd)

echo "== 1. videos of 2000 and 128 rendered colons"
python "$examples/render_phantom.py" --output_dir "$work/phantom/train" --split train --num_videos 2000 --num_frames 32
python "$examples/render_phantom.py" --output_dir "$work/phantom/validation" --split validation --num_videos 128 \
    --num_frames 16

echo "== 2. a teacher for the prior, and for the autoencoder's sense of likeness"
python "$examples/train_teacher.py" --train_data_dir "$work/phantom/train" \
    --validation_data_dir "$work/phantom/validation" --output_dir "$work/teacher" \
    --max_train_steps 1800 --mixed_precision bf16

echo "== 3. the autoencoder"
python "$examples/train_autoencoder.py" --train_data_dir "$work/phantom/train" \
    --validation_data_dir "$work/phantom/validation" --output_dir "$work/autoencoder" --teacher "$work/teacher" \
    --max_train_steps 10000 --sharpening_start 5000 --mixed_precision bf16
