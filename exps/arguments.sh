# Sourced by the scripts that train: reads their arguments BASE [PARAMS_JSON|- [TOKENIZER|-]] [FLAG ...].
#
# Sets the arrays base, params and tokenizer to flags of main_finetune.py, empty for `-` and for what is left out (the
# base brings its own), and FLAGS to the rest.

take_arguments() {
    if [ $# = 0 ] || [[ "$1" = -?* ]]; then echo "$USAGE" >&2; exit 2; fi
    base=(--pretrained_path "$1") params=() tokenizer=()
    shift
    if [[ $# -gt 0 && "$1" != --* ]]; then [ "$1" = - ] || params=("$1"); shift; fi
    if [[ $# -gt 0 && "$1" != --* ]]; then [ "$1" = - ] || tokenizer=(--tokenizer_path "$1"); shift; fi
    FLAGS=("$@")
}
take_arguments "$@"
