#!/usr/bin/env bash
# Full fine-tuning of a LLaMA on ShareGPT's conversations.
# 3 epochs, 8 processes x 4 documents x 8 micro-batches = 256 documents a step.
USAGE="usage: bash dialog_sharegpt.sh BASE [PARAMS_JSON|- [TOKENIZER|-]] [further flags of main_finetune.py]"
source "$(dirname "${BASH_SOURCE[0]}")/../finetune.sh"

finetune "finetune/sg/dialog_sharegpt" \
    --llama_type llama --data_config "$ROOT/configs/data/finetune/sg/dialog_sharegpt.yaml" --dialog \
    --epochs 3 --warmup_epochs 0.04 --batch_size 4 --accum_iter 8 --num_workers 4 --max_words 4096 \
    --lr 0.00002 --min_lr 0 --clip_grad 2 --weight_decay 0 \
    --data_parallel sdp --model_parallel_size 1 --checkpointing --no_visual \
    "${FLAGS[@]}"
