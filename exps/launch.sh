# Sourced by the scripts under exps/finetune and exps/pretrain: starts an entry of accessory/ on NPROC processes.
#
#   NPROC=8            processes on this node
#   DEVICE=auto        auto, cpu or cuda
#   OUTPUT=ROOT/output where runs are kept
#   RESUME=            if set: go on from the run's newest whole checkpoint, where it has one
#   TORCHRUN_FLAGS     what torchrun needs beside NPROC, for example for several nodes (default: --standalone; nothing
#                      under Kubeflow's operator, which tells torchrun about the nodes by variables PET_*)
#   LAUNCHER=torchrun  or python, where SLURM or OpenMPI has started the processes: srun bash SCRIPT ...

set -euo pipefail
ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"

# launch ENTRY EXP_NAME FLAG... : becomes the launcher, which so hears every signal; tee outlives Ctrl-C and tells the end.
launch() {
    local entry="$ROOT/accessory/$1" output="${OUTPUT:-$ROOT/output}/$2" run resume=() standalone="--standalone"
    shift 2
    if [ "${LAUNCHER:-torchrun}" = python ]; then
        run=("$(command -v python || echo "$ROOT/.venv/bin/python")" -u)
    else
        [ -z "${PET_NNODES:-}" ] || standalone=""
        # shellcheck disable=SC2206  # TORCHRUN_FLAGS is a list of words
        run=("$(command -v torchrun || echo "$ROOT/.venv/bin/torchrun")" --nproc_per_node "${NPROC:-${PET_NPROC_PER_NODE:-8}}"
            ${TORCHRUN_FLAGS:-$standalone})
    fi
    if [ -n "${RESUME:-}" ] && compgen -G "$output/epoch*/manifest.json" > /dev/null; then resume=(--resume latest); fi
    mkdir -p "$output"
    exec "${run[@]}" "$entry" --output_dir "$output" --device "${DEVICE:-auto}" "$@" "${resume[@]}" \
        > >(tee -i -a "$output/output.log") 2>&1
}
