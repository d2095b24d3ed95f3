#!/usr/bin/env bash
# 7B with rows of a million tokens on 1 node of 8 GPUs.
# From the checkout's folder: sbatch examples/long_context_7b/launch.sh [--section.key VALUE ...]
#SBATCH --job-name=long_context_7b
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --exclusive
#SBATCH --time=24:00:00
#SBATCH --output=%x-%j.log
#SBATCH --open-mode=append
#SBATCH --requeue
set -euo pipefail
cd "${SLURM_SUBMIT_DIR:-.}"
export MINUTES=${MINUTES:-1410} # half an hour before --time: a checkpoint has to be written
exec bash examples/launch_on_slurm.sh examples/long_context_7b "$@"
