#!/usr/bin/env bash
# Runs a recipe on all nodes of a Slurm job, in a container (enroot and pyxis): launch_on_slurm.sh FOLDER [--section.key VALUE ...]
# The launch.sh of each recipe calls it; examples/README.md explains the set-up and these variables:
#   CONFIG             file of settings                              (default: FOLDER/pretrain.yaml)
#   CONTAINER_IMAGE    image as pyxis takes it                       (default: an NGC PyTorch image)
#   CONTAINER_MOUNTS   more mounts, such as /data:/data              (default: the checkout only)
#   VENV               environment made inside of that image         (default: .venv-ngc)
#   CHECKPOINTS        where to save; a job that starts again goes on from there (default: runs/RECIPE/checkpoints)
#   MINUTES            save and exit after so long, before Slurm's limit       (default: never)
#   GPUS_PER_NODE      processes per node                            (default: 8)
set -euo pipefail
recipe=${1:?usage: launch_on_slurm.sh FOLDER [--section.key VALUE ...]}
shift
: "${SLURM_JOB_ID:?this runs inside of a Slurm job: sbatch $recipe/launch.sh}"

image=${CONTAINER_IMAGE:-nvcr.io#nvidia/pytorch:25.06-py3}
mounts=$PWD:$PWD${CONTAINER_MOUNTS:+,$CONTAINER_MOUNTS}
checkpoints=${CHECKPOINTS:-runs/$(basename "$recipe")/checkpoints}
options=(--config "${CONFIG:-$recipe/pretrain.yaml}" --checkpoint.save "$checkpoints")
if [ -n "${MINUTES:-}" ]; then
    options+=(--train.exit_duration_minutes "$MINUTES")
fi

# Every node meets at the first one. The port depends on the job: two jobs may share a node.
hosts=$(scontrol show hostnames "$SLURM_JOB_NODELIST")
MASTER_ADDR=${hosts%%$'\n'*}
MASTER_PORT=$((20000 + SLURM_JOB_ID % 10000))
export MASTER_ADDR MASTER_PORT
export PYTHON=${VENV:-.venv-ngc}/bin/python
export GPUS_PER_NODE=${GPUS_PER_NODE:-8}
export OMP_NUM_THREADS=8
export CUDA_DEVICE_MAX_CONNECTIONS=1 # Megatron overlaps communication and matrix products in the order in which they are launched
export PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True
export NCCL_DEBUG=${NCCL_DEBUG:-WARN}

# One torchrun per node. SLURM_NODEID is known only there, hence the single quotes; "$@" are the options.
# shellcheck disable=SC2016
srun --ntasks-per-node=1 --kill-on-bad-exit=1 \
    --container-image="$image" --container-mounts="$mounts" --container-workdir="$PWD" \
    bash -c 'exec "$PYTHON" -m torch.distributed.run \
        --nnodes "$SLURM_JOB_NUM_NODES" --node-rank "$SLURM_NODEID" --nproc-per-node "$GPUS_PER_NODE" \
        --master-addr "$MASTER_ADDR" --master-port "$MASTER_PORT" \
        pretrain_lckv.py "$@"' launch "${options[@]}" "$@"
