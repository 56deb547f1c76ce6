# Sourced by the scripts under exps/finetune: starts main_finetune.py on NPROC processes.
#
#   NPROC=8            processes on this node
#   DEVICE=auto        auto, cpu or cuda
#   OUTPUT=ROOT/output where runs are kept
#   TORCHRUN_FLAGS     what torchrun needs beside NPROC, for example for several nodes (default: --standalone)

set -euo pipefail
ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
source "$ROOT/exps/arguments.sh"
TORCHRUN="$(command -v torchrun || echo "$ROOT/.venv/bin/torchrun")"

# finetune EXP_NAME FLAG... : flags given last win.
finetune() {
    local output="${OUTPUT:-$ROOT/output}/$1"
    shift
    mkdir -p "$output"
    # shellcheck disable=SC2086  # TORCHRUN_FLAGS is a list of words
    "$TORCHRUN" --nproc_per_node "${NPROC:-8}" ${TORCHRUN_FLAGS:---standalone} "$ROOT/accessory/main_finetune.py" \
        "${base[@]}" "${tokenizer[@]}" --llama_config "${params[@]}" ${METHOD_CONFIG:+"$METHOD_CONFIG"} \
        --output_dir "$output" --device "${DEVICE:-auto}" "$@" 2>&1 | tee -a "$output/output.log"
}
