#!/usr/bin/env bash
# LLaMA-Adapter beside a LLaMA in bf16 on Alpaca's instructions answered by GPT-4.
# 4 epochs, 8 processes x 4 documents x 2 micro-batches = 64 documents a step.
USAGE="usage: bash alpaca_llamaAdapter.sh BASE [PARAMS_JSON|- [TOKENIZER|-]] [further flags of main_finetune.py]"
source "$(dirname "${BASH_SOURCE[0]}")/../finetune.sh"
METHOD_CONFIG="$ROOT/configs/model/finetune/sg/llamaAdapter.json"
finetune "finetune/sg/alpaca_llamaAdapter" \
    --llama_type llama_adapter --data_config "$ROOT/configs/data/finetune/sg/alpaca.yaml" \
    --epochs 4 --warmup_epochs 1 --batch_size 4 --accum_iter 2 --num_workers 4 --max_words 1024 \
    --lr 0.00005 --min_lr 0.000005 --clip_grad 2 --weight_decay 0.02 \
    --data_parallel sdp --model_parallel_size 1 --no_visual \
    "${FLAGS[@]}"
