#!/usr/bin/env bash
# Evaluates on several nodes, a model a node:
#
#     sbatch --nodes=4 launch/slurm/evaluate.sh --checkpoint=MODEL --task=configs/tasks \
#         --data=DATA --output=DIR --mesh=4,1,8
#
# The same command again, with any number of nodes, scores what is left; the last process to
# end writes the results.
#SBATCH --job-name=glm-evaluate
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --exclusive
#SBATCH --signal=TERM@60
#SBATCH --requeue
#SBATCH --open-mode=append
set -euo pipefail

# Each task's number is in SLURM_PROCID. GLM_JAX_TOGETHER=1 joins them to run one model, too
# large for a node, over all of them; then one that fails ends all.
export GLM_JAX_NUM_PROCESSES="$SLURM_NTASKS"
if [ -n "${GLM_JAX_TOGETHER:-}" ]; then
    # No pipe into `head`: `scontrol` would end by SIGPIPE, and with it, now and then, the script.
    read -r first < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
    export GLM_JAX_COORDINATOR="$first:${GLM_JAX_PORT:-9876}"
fi
status=0
srun --kill-on-bad-exit="${GLM_JAX_TOGETHER:-0}" \
    "${GLM_JAX_PYTHON:-.venv/bin/python}" -m launch.evaluate "$@" || status=$?
# 143: SIGTERM, at the end of the time or of the node's. Slurm requeues only what is asked for.
if [ "$status" = 143 ]; then
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"
