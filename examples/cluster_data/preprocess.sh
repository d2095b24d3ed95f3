#!/usr/bin/env bash
# One part of a corpus in each task of a job array; a task that was interrupted goes on behind its last shard.
# From the checkout's folder: sbatch --array=0-15 examples/cluster_data/preprocess.sh PARTS INPUT PREFIX TOKENIZER
#   PARTS   how many parts there are: tasks of the whole array, also where only some of them are submitted again
#   INPUT   a quoted glob, as every task must see the same files
#   VENV    environment to run in (default: .venv)
#SBATCH --job-name=preprocess
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=32
#SBATCH --time=04:00:00
#SBATCH --output=%x-%j.log
set -euo pipefail
usage="usage: sbatch --array=0-15 preprocess.sh PARTS INPUT PREFIX TOKENIZER"
parts=${1:?$usage} input=${2:?$usage} prefix=${3:?$usage} tokenizer=${4:?$usage}
cd "${SLURM_SUBMIT_DIR:-.}"
exec "${VENV:-.venv}/bin/python" -m lckv_megatron preprocess --input "$input" --output-prefix "$prefix" \
    --part "${SLURM_ARRAY_TASK_ID:?$usage}/$parts" --workers "${SLURM_CPUS_PER_TASK:?$usage}" --shard-mib 4096 \
    --tokenizer-type huggingface --tokenizer-model "$tokenizer"
