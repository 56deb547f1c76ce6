#!/usr/bin/env bash
# NormBias fine-tuning of a 4-bit LLaMA on Alpaca as a SLURM job, on any number of nodes with 8 GPUs each. Two minutes
# before its time is over, or when it is preempted, it saves and goes back into the queue; there it goes on by itself.
#
#   sbatch --nodes=2 --time=4:00:00 exps/slurm/finetune.sh BASE [PARAMS_JSON|- [TOKENIZER|-]] [further flags of main_finetune.py]
#
#SBATCH --job-name=accessory
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=4
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=USR1@120
#SBATCH --output=output/slurm/%x-%j.log
set -uo pipefail

USAGE="usage: sbatch finetune.sh BASE [PARAMS_JSON|- [TOKENIZER|-]] [further flags of main_finetune.py]"
root="${SLURM_SUBMIT_DIR:-$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)}"
source "$root/exps/arguments.sh"
output="${OUTPUT:-$root/output/slurm/$SLURM_JOB_ID}"
python="$(command -v python || echo "$root/.venv/bin/python")"
export MASTER_ADDR="${MASTER_ADDR:-$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)}"
export MASTER_PORT="${MASTER_PORT:-$((20000 + SLURM_JOB_ID % 20000))}"

# SLURM sends USR1 to the tasks; every process hears it, they agree on the step to save after, and end.
srun --kill-on-bad-exit=1 "$python" "$root/accessory/main_finetune.py" \
    "${base[@]}" "${tokenizer[@]}" --llama_config "${params[@]}" --llama_type llama_peft \
    --data_config "$root/configs/data/finetune/sg/alpaca.yaml" --output_dir "$output" \
    --quant --only_save_trainable --checkpointing --max_words 512 --epochs 4 --batch_size 4 --accum_iter 2 \
    --save_minutes 30 --keep_last 3 "${FLAGS[@]}"
status=$?

state="$("$python" -c "import json, sys; print(json.load(open(sys.argv[1]))['state'])" "$output/run_status.json")"
echo "== ended as: $state (status $status)"
if [ "$state" = preempted ]; then
    scontrol requeue "$SLURM_JOB_ID"  # SLURM_RESTART_COUNT tells the next start to go on from the newest checkpoint
    exit 0
fi
[ "$state" = finished ]
