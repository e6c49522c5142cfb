#!/usr/bin/env bash
# Converts the released shards on several nodes, without accelerators:
#
#     sbatch --nodes=4 launch/slurm/convert.sh --input=SHARDS --output=MODEL
#
# The same command again, with any number of nodes, converts what is left; the last process
# to end gives the folder its name.
#SBATCH --job-name=glm-convert
#SBATCH --ntasks-per-node=1
#SBATCH --exclusive
#SBATCH --signal=TERM@60
#SBATCH --requeue
#SBATCH --open-mode=append
set -euo pipefail

# Each task's number is in SLURM_PROCID.
export GLM_JAX_NUM_PROCESSES="$SLURM_NTASKS"
status=0
srun --kill-on-bad-exit=0 "${GLM_JAX_PYTHON:-.venv/bin/python}" -m convert.sat_to_orbax "$@" || status=$?
# 143: SIGTERM, at the end of the time or of the node's. Slurm requeues only what is asked for.
if [ "$status" = 143 ]; then
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"
