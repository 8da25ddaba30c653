#!/bin/sh
# The model that comes with the package, from nothing: corpus, a teacher for the prior, autoencoder, transformer,
# evaluation. Most of a day on two CPU cores; a killed run goes on where it was.
#
#     examples/phantom_model.sh [WORK]
#
# All pictures are rendered (diffusers_endora.data.phantom); training, validation and test videos show different colons.
set -eu
work=${1:-outputs/phantom_model}
examples=$(cd "$(dirname "$0")" && pwd)
bundled=$(python -c "from diffusers_endora import bundled; print(bundled.__path__[0])")/phantom

echo "== 1. videos of 2000, 128 and 1024 rendered colons"
python "$examples/render_phantom.py" --output_dir "$work/phantom/train" --split train --num_videos 2000 --num_frames 32
for split in validation:128 test:1024; do
    python "$examples/render_phantom.py" --output_dir "$work/phantom/${split%:*}" --split "${split%:*}" \
        --num_videos "${split#*:}" --num_frames 16
done

echo "== 2. a teacher for the prior"
python "$examples/train_teacher.py" --train_data_dir "$work/phantom/train" \
    --validation_data_dir "$work/phantom/validation" --output_dir "$work/teacher" \
    --max_train_steps 1800 --mixed_precision bf16

echo "== 3. the autoencoder"
python "$examples/train_autoencoder.py" --train_data_dir "$work/phantom/train" \
    --validation_data_dir "$work/phantom/validation" --output_dir "$work/autoencoder_first" --mixed_precision bf16
python "$examples/train_autoencoder.py" --train_data_dir "$work/phantom/train" \
    --validation_data_dir "$work/phantom/validation" --output_dir "$work/autoencoder_second" --mixed_precision bf16 \
    --pretrained_vae "$work/autoencoder_first" --max_train_steps 2500 --learning_rate 0.01
python "$examples/train_autoencoder.py" --train_data_dir "$work/phantom/train" \
    --validation_data_dir "$work/phantom/validation" --output_dir "$work/autoencoder" --mixed_precision bf16 \
    --pretrained_vae "$work/autoencoder_second" --max_train_steps 2000 --learning_rate 0.01 --decoder_only

echo "== 4. the transformer"
train_transformer() {
    python "$examples/train_endora.py" --train_data_dir "$work/phantom/train" \
        --pretrained_vae "$work/autoencoder" --dino_model "$work/teacher" --cache_features "$work/features" \
        --cache_dino_dtype int8 --preset demo --num_layers 5 --resolution 128 --window 16 --num_still_images 2 \
        --class_conditional --no-horizontal_flip --prediction_type flow --timestep_density logit_normal --ema_warmup \
        --train_batch_size 4 --optimizer muon --lr_scheduler cosine --mixed_precision bf16 \
        --dataloader_num_workers 1 --validation_steps 1000 --num_validation_clips 3 --validation_inference_steps 20 \
        --checkpointing_steps 500 --resume_from_checkpoint latest "$@"
}
train_transformer --output_dir "$work/transformer_first" --max_train_steps 7000 --learning_rate 3e-3

echo "== 5. the transformer, guided by what it was after 2000 steps"
train_transformer --output_dir "$work/transformer" --max_train_steps 4000 --learning_rate 2e-3 --seed 1 \
    --pretrained_model "$work/transformer_first" --weaker_model "$work/transformer_first/checkpoint-2000" \
    --autoguidance_scale 2

echo "== 6. into the package"
python "$examples/bundle_model.py" --model "$work/transformer" --output_dir "$bundled"

echo "== 7. evaluation on the test videos"
endora evaluate --real "$work/phantom/test" --train "$work/phantom/train" --fake "$bundled" --output "$work/report" \
    --frame_interval 1 --num_clips 512 --num_seeds 1 --ladder --metrics fvd
