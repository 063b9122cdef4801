#!/bin/sh
# Latent thinking from beginning to end, on one core in about an hour:
#
#     examples/latent_thinking/run.sh OUTPUT_FOLDER [SEED]
#
# A step whose result is there already is left out. README.md says what to change for a language model of your own.
set -eu
out=$1 seed=${2:-0}
here=$(dirname "$0")
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-2}"
train() { llada-trm train --max_length 64 --dataset_name arithmetic "$@"; }
made() { [ -e "$out/$1/model.safetensors" ]; }

# 1. A language model that solves chains of eight digits with a written thought, and fails without one.
made lm || python "$here/language_model.py" "$out/lm" --num_problems "${PROBLEMS:-100000}" \
    --max_steps "${LM_STEPS:-2500}" --seed "$seed" --threads "$OMP_NUM_THREADS"

# 2. Compressor: the principal directions of its last hidden states.
made compressor || train --recipe compressor_1b --backbone "$out/lm" --data_files "$out/lm/train.jsonl" \
    --split "train[:4000]" --init pca --compressed_size 96 --num_train_epochs 0 --output_dir "$out/compressor"

# 3. Hidden pairs: it thinks about its problems; its states before, and after.
llada-trm datagen --model "$out/lm" --dataset "$out/lm/train.jsonl" --num_samples "${PAIRS:-60000}" --batch_size 512 \
    --max_new_tokens 64 --checkpoint_every 4096 --compressor "$out/compressor" --output_dir "$out/pairs"

# 4. Distillation: SequenceTRM learns to get from the states before to the state after.
made trm || llada-trm train --recipe trm --pairs_dir "$out/pairs" --backbone "$out/lm" --compressor "$out/compressor" \
    --eval_fraction 0.02 --n_heads 4 --dropout 0 --n_latent_steps 4 --n_deep_recursions 1 --n_supervision_steps 1 \
    --lr 1e-3 --batch_size 64 --num_epochs "${TRM_EPOCHS:-6}" --logging_steps 100 --seed "$seed" --output_dir "$out/trm"

# 5. Answer supervision: compressor, SequenceTRM and projector learn to make the frozen language model answer.
made answers || train --recipe latent_answer --backbone "$out/lm" --compressor "$out/compressor" \
    --trm "$out/trm" --num_latents 2 --data_files "$out/lm/train.jsonl" --dropout 0 --lr 3e-4 --batch_size 64 \
    --max_steps "${ANSWER_STEPS:-10000}" --logging_steps 100 --save_strategy no --seed "$seed" \
    --output_dir "$out/answers"

# 6. GRPO: the same three parts, by which of their answers to long chains are right.
made grpo || train --recipe grpo --checkpoint "$out/answers" --num_terms 8 --split "train[:6400]" \
    --eval_data_files "$out/lm/test.jsonl" --eval_split "train[:300]" --max_completion_length 4 --curriculum false \
    --scale_rewards none --lr 5e-6 --batch_size 256 --per_device_eval_batch_size 400 --eval_strategy steps \
    --eval_steps 50 --eval_on_start true --max_steps "${GRPO_STEPS:-150}" --save_strategy no --seed "$seed" \
    --output_dir "$out/grpo"
