# Sourced by the scripts that train: takes BASE [PARAMS_JSON [TOKENIZER]] from what they were called with.
#
# Leaves base, params and tokenizer as flags (none for `-` and for what is left out: the base brings its own), and in
# FLAGS what follows them, for main_finetune.py.

take_arguments() {
    if [ $# = 0 ] || [[ "$1" = -?* ]]; then echo "$USAGE" >&2; exit 2; fi
    base=(--pretrained_path "$1") params=() tokenizer=()
    shift
    if [[ $# -gt 0 && "$1" != --* ]]; then [ "$1" = - ] || params=("$1"); shift; fi
    if [[ $# -gt 0 && "$1" != --* ]]; then [ "$1" = - ] || tokenizer=(--tokenizer_path "$1"); shift; fi
    FLAGS=("$@")
}
take_arguments "$@"
