#!/usr/bin/env bash
# Full fine-tuning of a 13B LLaMA with a Q-Former, cut over 2 processes, on GPT-4's Alpaca and LLaVA's questions.
# 3 epochs, 4 groups of 2 x 4 documents x 2 micro-batches = 32 documents a step.
USAGE="usage: bash alpacaLlava_llamaQformerv2_13B.sh BASE [PARAMS_JSON|- [TOKENIZER|-]] [further flags of main_finetune.py]"
source "$(dirname "${BASH_SOURCE[0]}")/../finetune.sh"

finetune "finetune/mm/alpacaLlava_llamaQformerv2_13B" \
    --llama_type llama_qformerv2 --data_config "$ROOT/configs/data/finetune/mm/alpaca_llava.yaml" \
    --epochs 3 --warmup_epochs 0.2 --batch_size 4 --accum_iter 2 --num_workers 4 --max_words 512 \
    --lr 0.00003 --min_lr 0.000005 --clip_grad 2 --weight_decay 0.02 \
    --data_parallel fsdp --model_parallel_size 2 --checkpointing \
    "${FLAGS[@]}"
