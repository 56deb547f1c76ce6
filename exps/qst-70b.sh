#!/usr/bin/env bash
# Quantized side tuning beside a 4-bit (NF4) Llama-2-70B-chat on OpenAssistant, with the published script's values: 16
# documents a step of up to 512 + 512 tokens, 1,875 steps (about 3 epochs), of which the warm-up takes 3 %.
# One process on one GPU; on N GPUs that share the model: NPROC=N and --model_parallel_size N.
USAGE="usage: bash qst-70b.sh BASE [PARAMS_JSON|- [TOKENIZER|-]] [further flags of main_finetune.py]"
source "$(dirname "${BASH_SOURCE[0]}")/finetune/finetune.sh"
METHOD_CONFIG="$ROOT/configs/model/finetune/sg/llamaQst.json"
NPROC="${NPROC:-1}"
finetune "qst-70b" \
    --llama_type llama_qst --data_config oasst1 --data_dir "$ROOT/data" --dialog \
    --epochs 4 --max_steps 1875 --warmup_epochs 0.09 --batch_size 1 --accum_iter 16 --num_workers 3 --max_words 1024 \
    --lr 0.0001 --lr_schedule constant --adam_beta2 0.999 --clip_grad 0.3 --weight_decay 0 --seed 0 \
    --save_steps 200 --keep_last 40 --quant --only_save_trainable \
    "${FLAGS[@]}"
