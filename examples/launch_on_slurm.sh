#!/usr/bin/env bash
# Runs a recipe on all nodes of a Slurm job: launch_on_slurm.sh FOLDER [--section.key VALUE ...]
# The launch.sh of each recipe calls it; docs/cluster.md explains the set-up and these variables:
#   CONFIG             file of settings                              (default: FOLDER/pretrain.yaml)
#   CONTAINER_IMAGE    image as pyxis takes it, or none for no container       (default: an NGC PyTorch image)
#   CONTAINER_MOUNTS   more mounts, such as /data:/data              (default: the checkout only)
#   VENV               environment made inside of that image         (default: .venv-ngc)
#   CHECKPOINTS        where to save; a job that starts again goes on from there (default: runs/RECIPE/checkpoints)
#   MINUTES            save and exit after so long, before Slurm's limit       (default: never)
#   GPUS_PER_NODE      processes per node                            (default: 8)
#   INTERFACE          network interface for NCCL's and gloo's sockets, such as ib0 (default: they choose)
set -euo pipefail
recipe=${1:?usage: launch_on_slurm.sh FOLDER [--section.key VALUE ...]}
shift
: "${SLURM_JOB_ID:?this runs inside of a Slurm job: sbatch $recipe/launch.sh}"

image=${CONTAINER_IMAGE:-nvcr.io#nvidia/pytorch:25.12-py3}
container=()
if [ "$image" != none ]; then
    container=(--container-image="$image" --container-workdir="$PWD"
        --container-mounts="$PWD:$PWD${CONTAINER_MOUNTS:+,$CONTAINER_MOUNTS}")
fi
checkpoints=${CHECKPOINTS:-runs/$(basename "$recipe")/checkpoints}
options=(--config "${CONFIG:-$recipe/pretrain.yaml}" --checkpoint.save "$checkpoints")
if [ -n "${MINUTES:-}" ]; then
    options+=(--train.exit_duration_minutes "$MINUTES")
fi
if [ -n "${INTERFACE:-}" ]; then
    export NCCL_SOCKET_IFNAME=$INTERFACE GLOO_SOCKET_IFNAME=$INTERFACE
fi

# Every node meets at the first one. The port depends on the job: two jobs may share a node.
hosts=$(scontrol show hostnames "$SLURM_JOB_NODELIST")
MASTER_ADDR=${hosts%%$'\n'*}
MASTER_PORT=$((20000 + SLURM_JOB_ID % 10000))
export MASTER_ADDR MASTER_PORT
export PYTHON=${VENV:-.venv-ngc}/bin/python
export GPUS_PER_NODE=${GPUS_PER_NODE:-8}
# srun gives a task one core unless it is told; torchrun's processes and their data readers share them all.
cpus=${SLURM_CPUS_PER_TASK:-${SLURM_CPUS_ON_NODE:-$((8 * GPUS_PER_NODE))}}
export OMP_NUM_THREADS=$((cpus / GPUS_PER_NODE > 8 ? 8 : cpus / GPUS_PER_NODE > 1 ? cpus / GPUS_PER_NODE : 1))
export CUDA_DEVICE_MAX_CONNECTIONS=1 # Megatron overlaps communication and matrix products in the order in which they are launched
export PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True
export TORCH_ALLOW_TF32_CUBLAS_OVERRIDE=0 # NVIDIA's images set 1: float32 products would be TF32
export NCCL_DEBUG=${NCCL_DEBUG:-WARN}

# One torchrun per node. SLURM_NODEID is known only there, hence the single quotes; "$@" are the options.
# shellcheck disable=SC2016
srun --ntasks-per-node=1 --cpus-per-task="$cpus" --kill-on-bad-exit=1 "${container[@]}" \
    bash -c 'exec "$PYTHON" -m torch.distributed.run \
        --nnodes "$SLURM_JOB_NUM_NODES" --node-rank "$SLURM_NODEID" --nproc-per-node "$GPUS_PER_NODE" \
        --master-addr "$MASTER_ADDR" --master-port "$MASTER_PORT" \
        pretrain_lckv.py "$@"' launch "${options[@]}" "$@"
