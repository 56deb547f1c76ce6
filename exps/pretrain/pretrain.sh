# Sourced by the scripts beside it: reads their arguments PARAMS_JSON TOKENIZER FILES_JSON [DATA_ROOT] [FLAG ...].
#
# Sets FLAGS to what stands behind them. Without DATA_ROOT, files are beside FILES_JSON.

source "$(dirname "${BASH_SOURCE[0]}")/../launch.sh"
if [[ $# -lt 3 || "$1" = -* || "$2" = -* || "$3" = -* ]]; then echo "$USAGE" >&2; exit 2; fi
params="$1" tokenizer="$2" files="$3" root=()
shift 3
if [[ $# -gt 0 && "$1" != --* ]]; then root=(--data_root "$1"); shift; fi
FLAGS=("$@")

# pretrain EXP_NAME FLAG... : flags given last win.
pretrain() {
    launch main_pretrain.py "$1" --llama_config "$params" --tokenizer_path "$tokenizer" --data_meta_path "$files" \
        "${root[@]}" "${@:2}"
}
