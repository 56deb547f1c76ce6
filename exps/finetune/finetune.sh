# Sourced by the scripts that fine-tune: reads their arguments and starts main_finetune.py by exps/launch.sh.

source "$(dirname "${BASH_SOURCE[0]}")/../launch.sh"
source "$ROOT/exps/arguments.sh"

# finetune EXP_NAME FLAG... : flags given last win. base, params and tokenizer are the script's arguments.
finetune() {
    launch main_finetune.py "$1" "${base[@]}" "${tokenizer[@]}" \
        --llama_config "${params[@]}" ${METHOD_CONFIG:+"$METHOD_CONFIG"} "${@:2}"
}
