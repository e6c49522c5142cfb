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
#SBATCH --requeue
#SBATCH --open-mode=append
set -euo pipefail

# Each task's number is in SLURM_PROCID.
export GLM_JAX_NUM_PROCESSES="$SLURM_NTASKS"
exec srun --kill-on-bad-exit=0 "${GLM_JAX_PYTHON:-.venv/bin/python}" -m convert.sat_to_orbax "$@"
