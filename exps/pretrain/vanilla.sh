#!/usr/bin/env bash
# Pretraining of a LLaMA on files of text, one model on each process, sharded.
# 8 processes x 4 rows of 2048 tokens x 16 micro-batches = 1,048,576 tokens a step.
USAGE="usage: bash vanilla.sh PARAMS_JSON TOKENIZER FILES_JSON [DATA_ROOT] [further flags of main_pretrain.py]"
source "$(dirname "${BASH_SOURCE[0]}")/pretrain.sh"

pretrain "pretrain/vanilla" \
    --llama_type llama --batch_size 4 --accum_iter 16 --num_workers 4 --max_words 2048 \
    --lr 0.0001 --min_lr 0.00001 --warmup_iters 5000 --lr_decay_iters 400000 --clip_grad 2 --weight_decay 0.02 \
    --data_parallel fsdp --model_parallel_size 1 \
    "${FLAGS[@]}"
