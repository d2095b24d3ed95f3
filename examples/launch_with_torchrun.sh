#!/usr/bin/env bash
# Runs a recipe without a batch system. The same command on every node, but for NODE_RANK:
#   NODES=2 NODE_RANK=0 MASTER_ADDR=first-node bash examples/launch_with_torchrun.sh examples/llama_1b_lckv [--section.key VALUE ...]
# It starts again by itself when a process fails (RESTARTS), and goes on from the newest good checkpoint.
#   NODES, NODE_RANK   how many nodes, and which this is             (default: 1 and 0)
#   MASTER_ADDR, MASTER_PORT  where all nodes meet: a name or address of node 0 (default: localhost 29500)
#   CONFIG             file of settings                              (default: FOLDER/pretrain.yaml)
#   CHECKPOINTS        where to save, seen by all nodes              (default: runs/RECIPE/checkpoints)
#   GPUS_PER_NODE      processes per node                            (default: 8)
#   RESTARTS           how often to start again                      (default: 3)
#   INTERFACE          network interface for NCCL's and gloo's sockets (default: they choose)
#   PYTHON             the environment's Python                      (default: python)
set -euo pipefail
recipe=${1:?usage: launch_with_torchrun.sh FOLDER [--section.key VALUE ...]}
shift
nodes=${NODES:-1}
if [ "$nodes" -gt 1 ]; then
    : "${MASTER_ADDR:?is missing: a name or address of node 0, the same on every node}"
    : "${NODE_RANK:?is missing: 0 on the first node, up to $((nodes - 1)) on the last}"
fi
if [ -n "${INTERFACE:-}" ]; then
    export NCCL_SOCKET_IFNAME=$INTERFACE GLOO_SOCKET_IFNAME=$INTERFACE
fi
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-8}
export CUDA_DEVICE_MAX_CONNECTIONS=1 # Megatron overlaps communication and matrix products in the order in which they are launched
export PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True
export TORCH_ALLOW_TF32_CUBLAS_OVERRIDE=0 # NVIDIA's images set 1: float32 products would be TF32
export NCCL_DEBUG=${NCCL_DEBUG:-WARN}
exec "${PYTHON:-python}" -m torch.distributed.run \
    --nnodes "$nodes" --node-rank "${NODE_RANK:-0}" --nproc-per-node "${GPUS_PER_NODE:-8}" \
    --master-addr "${MASTER_ADDR:-localhost}" --master-port "${MASTER_PORT:-29500}" \
    --max-restarts "${RESTARTS:-3}" \
    pretrain_lckv.py --config "${CONFIG:-$recipe/pretrain.yaml}" \
    --checkpoint.save "${CHECKPOINTS:-runs/$(basename "$recipe")/checkpoints}" "$@"
