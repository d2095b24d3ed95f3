# Two images. For a cluster, on NVIDIA's PyTorch; and without CUDA, for development, tests and conversions:
#   docker build --tag lckv-megatron .
#   docker build --target cpu --tag lckv-megatron:cpu .
# The last stage is what docker builds by default. docs/cluster.md tells how to run them.

# The tag is the one that examples/launch_on_slurm.sh takes.
ARG NGC_PYTORCH=25.12-py3

FROM python:3.11-slim-bookworm AS cpu
SHELL ["/bin/bash", "-o", "pipefail", "-c"]
# PIP_EXTRA_INDEX_URL is where pip looks for CPU builds of torch, if the default index has only CUDA builds.
ARG PIP_EXTRA_INDEX_URL=""
# hadolint ignore=DL3008
RUN apt-get update && apt-get install --yes --no-install-recommends g++ git make && rm -rf /var/lib/apt/lists/*
WORKDIR /workspace/lckv-megatron
COPY . .
RUN make setup
ENV PATH="/workspace/lckv-megatron/.venv/bin:${PATH}"
RUN lckv-megatron doctor

FROM nvcr.io/nvidia/pytorch:${NGC_PYTORCH} AS gpu
SHELL ["/bin/bash", "-o", "pipefail", "-c"]
# What the image sets and what hurts here: float32 products as TF32, and a file that pins unrelated packages.
ENV TORCH_ALLOW_TF32_CUBLAS_OVERRIDE=0 PIP_CONSTRAINT="" PIP_ROOT_USER_ACTION=ignore
# Megatron overlaps communication and matrix products in the order in which they are launched.
ENV CUDA_DEVICE_MAX_CONNECTIONS=1 PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True
WORKDIR /workspace/lckv-megatron
COPY . .
# The image's own torch, Transformer Engine, flash-attn and apex stay: they are built for its CUDA.
RUN pip list --format=freeze | grep -iE '^(torch|triton|pytorch[-_]triton|transformer[-_]engine|flash[-_]attn|apex|numpy)==' \
        > /tmp/image.txt && \
    pip install --no-cache-dir --no-build-isolation --constraint /tmp/image.txt --editable '.[wandb,eval]' && \
    rm /tmp/image.txt
RUN lckv-megatron doctor
