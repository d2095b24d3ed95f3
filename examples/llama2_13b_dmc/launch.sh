#!/usr/bin/env bash
# One stage of Llama 2 13B to DMC on 8 nodes of 8 GPUs; a stage that was interrupted goes on.
# From the checkout's folder: sbatch examples/llama2_13b_dmc/launch.sh zero_out|retrofit|finetune [--section.key VALUE ...]
#SBATCH --job-name=llama2_13b_dmc
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
recipe=examples/llama2_13b_dmc
stage=${1:-}
case $stage in
zero_out | retrofit | finetune) shift ;;
*)
    echo "usage: launch.sh zero_out|retrofit|finetune [--section.key VALUE ...]" >&2
    exit 2
    ;;
esac
export CONFIG=$recipe/$stage.yaml
export CHECKPOINTS=${CHECKPOINTS:-runs/llama2_13b_dmc/$stage/checkpoints}
export MINUTES=${MINUTES:-1410} # half an hour before --time: a checkpoint has to be written
exec bash examples/launch_on_slurm.sh "$recipe" "$@"
