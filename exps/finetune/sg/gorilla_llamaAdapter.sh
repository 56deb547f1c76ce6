#!/usr/bin/env bash
# LLaMA-Adapter beside a LLaMA in bf16 on Gorilla's calls of APIs.
# 10 epochs, 8 processes x 4 documents x 2 micro-batches = 64 documents a step.
USAGE="usage: bash gorilla_llamaAdapter.sh BASE [PARAMS_JSON|- [TOKENIZER|-]] [further flags of main_finetune.py]"
source "$(dirname "${BASH_SOURCE[0]}")/../finetune.sh"

finetune "finetune/sg/gorilla_llamaAdapter" \
    --llama_type llama_adapter --data_config "$ROOT/configs/data/finetune/sg/gorilla.yaml" \
    --epochs 10 --warmup_epochs 2 --batch_size 4 --accum_iter 2 --num_workers 4 --max_words 512 \
    --lr 0.001 --min_lr 0.000005 --clip_grad 2 --weight_decay 0.02 \
    --data_parallel sdp --model_parallel_size 1 --checkpointing --no_visual \
    "${FLAGS[@]}"
