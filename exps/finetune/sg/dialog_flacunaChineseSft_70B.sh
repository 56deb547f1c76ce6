#!/usr/bin/env bash
# Full fine-tuning of a 70B LLaMA, cut over 8 processes, on Chinese dialogues.
# 2 epochs, 1 group of 8 x 2 documents x 64 micro-batches = 128 documents a step for each 8 GPUs.
USAGE="usage: bash dialog_flacunaChineseSft_70B.sh BASE [PARAMS_JSON|- [TOKENIZER|-]] [further flags of main_finetune.py]"
source "$(dirname "${BASH_SOURCE[0]}")/../finetune.sh"

finetune "finetune/sg/dialog_flacunaChineseSft_70B" \
    --llama_type llama --data_config "$ROOT/configs/data/finetune/sg/dialog_chineseSft.yaml" --dialog \
    --epochs 2 --warmup_epochs 0.04 --batch_size 2 --accum_iter 64 --num_workers 4 --max_words 2048 \
    --lr 0.00002 --min_lr 0 --clip_grad 2 --weight_decay 0 \
    --data_parallel sdp --model_parallel_size 8 --checkpointing --no_visual \
    "${FLAGS[@]}"
