#!/usr/bin/env bash
# Quantized side tuning beside a 4-bit (NF4) OPT on Alpaca.
# 3 epochs, 8 processes x 4 documents = 32 documents a step.
USAGE="usage: bash alpaca_optQst_QF.sh BASE [PARAMS_JSON|- [TOKENIZER|-]] [further flags of main_finetune.py]"
source "$(dirname "${BASH_SOURCE[0]}")/../finetune.sh"
METHOD_CONFIG="$ROOT/configs/model/finetune/sg/optQst.json"
finetune "finetune/sg/alpaca_optQst_QF" \
    --llama_type opt_qst --data_config alpaca --data_dir "$ROOT/data" \
    --epochs 3 --warmup_epochs 0.09 --batch_size 4 --accum_iter 1 --num_workers 4 --max_words 512 \
    --lr 0.0002 --lr_schedule constant --adam_beta2 0.999 --clip_grad 0.3 --weight_decay 0 \
    --data_parallel sdp --model_parallel_size 1 --no_visual --quant --only_save_trainable \
    "${FLAGS[@]}"
