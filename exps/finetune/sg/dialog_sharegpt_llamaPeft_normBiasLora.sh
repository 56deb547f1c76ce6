#!/usr/bin/env bash
# NormBiasLoRA fine-tuning of a LLaMA on ShareGPT's conversations.
# 4 epochs, 8 processes x 4 documents x 2 micro-batches = 64 documents a step.
USAGE="usage: bash dialog_sharegpt_llamaPeft_normBiasLora.sh BASE [PARAMS_JSON|- [TOKENIZER|-]] [further flags of main_finetune.py]"
source "$(dirname "${BASH_SOURCE[0]}")/../finetune.sh"
METHOD_CONFIG="$ROOT/configs/model/finetune/sg/llamaPeft_normBiasLora.json"
finetune "finetune/sg/dialog_sharegpt_llamaPeft_normBiasLora" \
    --llama_type llama_peft --data_config "$ROOT/configs/data/finetune/sg/dialog_sharegpt.yaml" --dialog \
    --epochs 4 --warmup_epochs 1 --batch_size 4 --accum_iter 2 --num_workers 4 --max_words 4096 \
    --lr 0.00005 --min_lr 0.000005 --clip_grad 2 --weight_decay 0.02 \
    --data_parallel sdp --model_parallel_size 1 --checkpointing --no_visual \
    "${FLAGS[@]}"
