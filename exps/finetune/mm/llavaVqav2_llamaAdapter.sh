#!/usr/bin/env bash
# LLaMA-Adapter with pictures, NormBiasLoRA beside it, on VQAv2 and LLaVA's questions.
# 3 epochs, 8 processes x 16 documents x 2 micro-batches = 256 documents a step.
USAGE="usage: bash llavaVqav2_llamaAdapter.sh BASE [PARAMS_JSON|- [TOKENIZER|-]] [further flags of main_finetune.py]"
source "$(dirname "${BASH_SOURCE[0]}")/../finetune.sh"
METHOD_CONFIG="$ROOT/configs/model/finetune/mm/llamaAdapter_normBiasLora.json"
finetune "finetune/mm/llavaVqav2_llamaAdapter" \
    --llama_type llama_adapter --data_config "$ROOT/configs/data/finetune/mm/llava_vqav2.yaml" \
    --epochs 3 --warmup_epochs 0.2 --batch_size 16 --accum_iter 2 --num_workers 4 --max_words 512 \
    --lr 0.00005 --min_lr 0.000005 --clip_grad 2 --weight_decay 0.02 \
    --data_parallel sdp --model_parallel_size 1 --checkpointing \
    "${FLAGS[@]}"
