# Sourced by the scripts under exps/finetune: starts main_finetune.py on NPROC processes.
#
#   NPROC=8            processes on this node
#   DEVICE=auto        auto, cpu or cuda
#   OUTPUT=ROOT/output where runs are kept
#   TORCHRUN_FLAGS     what torchrun needs beside NPROC, for example for several nodes (default: --standalone)

set -euo pipefail
ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
TORCHRUN="$(command -v torchrun || echo "$ROOT/.venv/bin/torchrun")"

# finetune EXP_NAME BASE PARAMS_JSON TOKENIZER FLAG... : flags given last win.
finetune() {
    local exp_name="$1" base="${2:?$USAGE}" params="${3:?$USAGE}" tokenizer="${4:?$USAGE}"
    shift 4
    local output="${OUTPUT:-$ROOT/output}/$exp_name"
    mkdir -p "$output"
    # shellcheck disable=SC2086  # TORCHRUN_FLAGS is a list of words
    "$TORCHRUN" --nproc_per_node "${NPROC:-8}" ${TORCHRUN_FLAGS:---standalone} "$ROOT/accessory/main_finetune.py" \
        --pretrained_path "$base" --tokenizer_path "$tokenizer" --llama_config "$params" ${METHOD_CONFIG:+"$METHOD_CONFIG"} \
        --output_dir "$output" --device "${DEVICE:-auto}" "$@" 2>&1 | tee -a "$output/output.log"
}
