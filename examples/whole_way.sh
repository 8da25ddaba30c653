#!/bin/sh
# From nothing to a model page, and a clip generated from it: renders a corpus, trains on it in two processes with cached
# features until the held-out loss no longer falls, evaluates, publishes, and samples from what was published.
#
#     examples/whole_way.sh FOLDER YOU/NAME
#
# With small sizes, so that it takes minutes on two CPU cores; the steps are those of a real training. Autoencoder and
# teacher are trained for a few hundred steps, which is too little for either to be good. HF_ENDPOINT is where it publishes
# to. On GPUs: LAUNCH="accelerate launch --num_processes 2" examples/whole_way.sh ...
set -eu
if [ $# -ne 2 ]; then
    echo "usage: $0 FOLDER YOU/NAME" >&2
    exit 2
fi
work=$1
repo=$2
examples=$(cd "$(dirname "$0")" && pwd)
# On CPUs Accelerate leaves starting several processes to torchrun
launch=${LAUNCH:-torchrun --standalone --nproc_per_node 2}
mkdir -p "$work"

echo "== 1. a corpus with training, validation and test videos"
endora prepare phantom --output_dir "$work/corpus" --num_videos "${NUM_VIDEOS:-20}" --num_frames 32 --height 64 --width 64

echo "== 2. an autoencoder for its frames, and a teacher"
python - "$work" <<'PYTHON'
import sys
from pathlib import Path

from datasets import load_dataset

work = Path(sys.argv[1])
(work / "videos").mkdir(exist_ok=True)
for i, row in enumerate(load_dataset(str(work / "corpus"), split="train")):
    (work / "videos" / f"{i}.mp4").write_bytes(row["video"]["bytes"])
PYTHON
python "$examples/train_autoencoder.py" --train_data_dir "$work/videos" --output_dir "$work/vae" --resolution 64 \
    --latent_channels 4 --max_train_steps "${VAE_STEPS:-500}"
python "$examples/train_teacher.py" --train_data_dir "$work/videos" --output_dir "$work/teacher" --resolution 64 \
    --max_train_steps "${TEACHER_STEPS:-100}"

echo "== 3. training: features once, two processes, early stopping"
$launch "$examples/train_endora.py" --dataset_name "$work/corpus" --validation_split validation \
    --pretrained_vae "$work/vae" --dino_model "$work/teacher" --cache_features "$work/features" \
    --output_dir "$work/model" --preset demo --resolution 64 --window 32 --num_still_images 2 --class_conditional \
    --train_batch_size 4 --learning_rate "${LEARNING_RATE:-1e-3}" --max_train_steps "${MAX_TRAIN_STEPS:-900}" \
    --ema_warmup --no-horizontal_flip \
    --validation_steps "${VALIDATION_STEPS:-50}" --early_stopping_patience "${PATIENCE:-3}" --validation_loss_clips 32 \
    --checkpointing_steps "${VALIDATION_STEPS:-50}" --checkpoints_total_limit 2 --dataloader_num_workers 1 \
    --validation_inference_steps 10 --report_to tensorboard

echo "== 4. evaluation on the test videos"
mkdir -p "$work/test"
cp "$work"/corpus/data/test-*.parquet "$work/test"
endora evaluate --real "$work/test" --fake "$work/model" --output "$work/report" --num_clips "${NUM_CLIPS:-24}" \
    --frame_interval 2 --num_inference_steps 10 --scheduler dpmsolver++ --metrics fvd

echo "== 5. publication"
endora publish "$work/model" "$repo" --license apache-2.0 --report "$work/report/report.json"

echo "== 6. a clip from what was published"
endora generate "$repo" --output "$work/clips" --num_clips 3 --num_inference_steps 10 --seed 0
