#!/usr/bin/env bash
# Everything that must hold, from a bare machine: makes .venv, installs with the test extras, runs ruff and all tests.
# Arguments go to pytest:  bash tests/run.sh tests/quant -k nested
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../exps/environment.sh"
install "[test]"
cd "$ROOT"
"$VENV/bin/ruff" check .
"$VENV/bin/ruff" format --check --quiet .
HF_HUB_OFFLINE=1 "$VENV/bin/python" -m pytest "$@"
