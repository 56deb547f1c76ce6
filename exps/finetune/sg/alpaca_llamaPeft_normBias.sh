#!/usr/bin/env bash
# NormBias fine-tuning of a LLaMA in bf16 on Alpaca.
# 4 epochs, 8 processes x 4 documents x 2 micro-batches = 64 documents a step.
USAGE="usage: bash alpaca_llamaPeft_normBias.sh BASE [PARAMS_JSON|- [TOKENIZER|-]] [further flags of main_finetune.py]"
source "$(dirname "${BASH_SOURCE[0]}")/../finetune.sh"

finetune "finetune/sg/alpaca_llamaPeft_normBias" \
    --llama_type llama_peft --data_config "$ROOT/configs/data/finetune/sg/alpaca.yaml" \
    --epochs 4 --warmup_epochs 1 --batch_size 4 --accum_iter 2 --num_workers 4 --max_words 512 \
    --lr 0.00005 --min_lr 0.000005 --clip_grad 2 --weight_decay 0.02 \
    --data_parallel sdp --model_parallel_size 1 --checkpointing --no_visual \
    "${FLAGS[@]}"
