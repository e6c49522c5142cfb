#!/usr/bin/env bash
# Serves a model that is too large for a node on several, one process a node with all its devices:
#
#     sbatch --nodes=2 launch/slurm/serve.sh --checkpoint=MODEL --mesh=1,1,16 \
#         --host=0.0.0.0 --allowed_host='*' --api_keys=FILE --port=8000
#
# The first of the job's nodes listens (`scontrol show hostnames` says which that is). Slurm sends
# SIGTERM two minutes before the time is up, and at `scancel`: running requests are answered, and
# the job ends with status 0.
#SBATCH --job-name=glm-serve
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
    -m launch.serve "$@" || status=$?
# 143: SIGTERM before it was ready. Slurm requeues only what is asked for.
if [ "$status" = 143 ]; then
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"
