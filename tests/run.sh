#!/usr/bin/env bash
# Everything that must hold, from a bare machine: makes .venv, installs with the test extras, runs ruff and all tests.
#
#   bash tests/run.sh                            19 minutes on 2 cores
#   bash tests/run.sh --quick                    2 minutes, before a commit: without slow tests and those that start processes
#   bash tests/run.sh tests/quant -k nested      arguments go to pytest
#   bash tests/run.sh --every-cell tests/test_finetuning.py
#                                                each method on each storage on each layout, not only those that stand for all
#   bash tests/run.sh --write-tables tests/test_finetuning.py tests/model/families
#                                                how these end is written into docs/, where otherwise it is compared
#   bash tests/run.sh --chaos                    some 30 minutes of kills, restarts, fuzzing and 3,000 steps
#
# With Node 20 or newer, llama.cpp's prebuilt library comes along, to judge GGUF files; without, those tests are skipped.
# PROCESSES=2 test files run at once, each process on one thread: what they start are mostly processes of one thread, too.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../exps/environment.sh"
install "[test]"
install_llama_cpp
cd "$ROOT"
export HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1
if [ "${1:-}" = --chaos ]; then
    shift
    CHAOS="${CHAOS:-$RANDOM}"
    export CHAOS
    echo "== chaos with seed $CHAOS"
    exec "$VENV/bin/python" -m pytest -s -o timeout=3600 tests/faults -k "test_07 or test_15 or fuzz or test_memory" "$@"
fi
"$VENV/bin/ruff" check .
"$VENV/bin/ruff" format --check --quiet .
exec "$VENV/bin/python" -m pytest -n "${PROCESSES:-2}" --dist loadfile --no-loadscope-reorder "$@"
