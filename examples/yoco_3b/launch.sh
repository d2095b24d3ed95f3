#!/usr/bin/env bash
# YOCO 3B as a pipeline on 8 nodes of 8 GPUs.
# From the checkout's folder: sbatch examples/yoco_3b/launch.sh [--section.key VALUE ...]
#SBATCH --job-name=yoco_3b
#SBATCH --nodes=8
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
exec bash examples/launch_on_slurm.sh examples/yoco_3b "$@"
