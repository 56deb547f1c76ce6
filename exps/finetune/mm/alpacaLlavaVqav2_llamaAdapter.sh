#!/usr/bin/env bash
# LLaMA-Adapter with pictures, NormBiasLoRA beside it, on GPT-4's Alpaca, VQAv2 and LLaVA's questions.
# 3 epochs, 8 processes x 8 documents x 4 micro-batches = 256 documents a step.
USAGE="usage: bash alpacaLlavaVqav2_llamaAdapter.sh BASE [PARAMS_JSON|- [TOKENIZER|-]] [further flags of main_finetune.py]"
source "$(dirname "${BASH_SOURCE[0]}")/../finetune.sh"
METHOD_CONFIG="$ROOT/configs/model/finetune/mm/llamaAdapter_normBiasLora.json"
finetune "finetune/mm/alpacaLlavaVqav2_llamaAdapter" \
    --llama_type llama_adapter --data_config "$ROOT/configs/data/finetune/mm/alpaca_llava_vqav2.yaml" \
    --epochs 3 --warmup_epochs 0.2 --batch_size 8 --accum_iter 4 --num_workers 4 --max_words 512 \
    --lr 0.00005 --min_lr 0.000005 --clip_grad 2 --weight_decay 0.02 \
    --data_parallel sdp --model_parallel_size 1 \
    "${FLAGS[@]}"
