#!/usr/bin/env bash
# Trains on several nodes, one process a node with all its devices:
#
#     sbatch --nodes=96 launch/slurm/train.sh --config=configs/glm_130b.py --workdir=DIR ...
#
# With GLM_JAX_JOB=finetune before it, it is `launch.finetune`, whose flags it takes then.
# The same command again goes on where an earlier one stopped. Slurm sends SIGTERM two
# minutes before the time is up: the run saves, and is put into the queue again.
#SBATCH --job-name=glm-train
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --exclusive
#SBATCH --signal=TERM@120
#SBATCH --requeue
#SBATCH --open-mode=append
set -euo pipefail

# No pipe into `head`: `scontrol` would end by SIGPIPE, and with it, now and then, the script.
read -r first < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
export GLM_JAX_COORDINATOR="$first:${GLM_JAX_PORT:-9876}"
export GLM_JAX_NUM_PROCESSES="$SLURM_NTASKS"
# Each task's number is in SLURM_PROCID.
status=0
srun --kill-on-bad-exit=1 "${GLM_JAX_PYTHON:-.venv/bin/python}" \
    -m "launch.${GLM_JAX_JOB:-train}" "$@" || status=$?
# 143: SIGTERM, at the end of the time or of the node's. Slurm requeues only what is asked for.
if [ "$status" = 143 ]; then
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"
