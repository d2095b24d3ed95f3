#!/usr/bin/env bash
# LCKV in the sizes of TinyLlama on 2 nodes of 8 GPUs.
# From the checkout's folder: sbatch examples/llama_1b_lckv/launch.sh [--section.key VALUE ...]
#SBATCH --job-name=llama_1b_lckv
#SBATCH --nodes=2
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
exec bash examples/launch_on_slurm.sh examples/llama_1b_lckv "$@"
