#!/usr/bin/env bash
# Pretraining of a LLaMA of 13B on files of tokens (tools/pack_data.py), each model on two processes, and sharded.
# 4 models x 4 rows of 2048 tokens x 16 micro-batches = 524,288 tokens a step on 8 processes.
USAGE="usage: bash 13B_packed.sh PARAMS_JSON TOKENIZER FILES_JSON [DATA_ROOT] [further flags of main_pretrain.py]"
source "$(dirname "${BASH_SOURCE[0]}")/pretrain.sh"

pretrain "pretrain/13B_packed" \
    --llama_type llama --batch_size 4 --accum_iter 16 --num_workers 4 --packed_data \
    --lr 0.0001 --min_lr 0.00001 --warmup_iters 5000 --lr_decay_iters 400000 --clip_grad 2 --weight_decay 0.02 \
    --data_parallel fsdp --model_parallel_size 2 \
    "${FLAGS[@]}"
