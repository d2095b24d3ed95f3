#!/usr/bin/env bash
# The whole way on a machine without a GPU: text -> tokenizer -> indexed dataset -> LCKV model on 2 processes -> curves and a sample.
# Usage: examples/demo/run.sh [FOLDER]     (default: runs/demo; what is there already is used, except for the training)
# DATASET_ONLY=1 stops after the dataset.
set -euo pipefail
cd "$(dirname "$0")/../.."
out=${1:-runs/demo}
python=${PYTHON:-python}
mkdir -p "$out"
say() { printf '\n== %s\n' "$*"; }

say "corpus: sources and documentation of Python's standard library"
[ -f "$out/corpus.jsonl" ] || "$python" -m lckv_megatron demo-corpus --output "$out/corpus.jsonl"

say "tokenizer: SentencePiece BPE, 4096 tokens"
[ -f "$out/tokenizer.model" ] ||
    "$python" -m lckv_megatron train-tokenizer --input "$out/corpus.jsonl" --vocab-size 4096 --max-mib 8 --threads 2 --output "$out/tokenizer.model"

say "indexed dataset"
[ -f "$out/dataset.idx" ] ||
    "$python" -m lckv_megatron preprocess --input "$out/corpus.jsonl" --output-prefix "$out/dataset" --workers 2 \
        --tokenizer-type sentencepiece --tokenizer-model "$out/tokenizer.model"

if [ -n "${DATASET_ONLY:-}" ]; then exit; fi

say "training: 2 processes"
rm -rf "$out/checkpoints" "$out/metrics.jsonl"
OMP_NUM_THREADS=1 "$python" -m torch.distributed.run --standalone --nproc-per-node 2 pretrain_lckv.py \
    --config examples/demo/pretrain.yaml \
    --data.data_path "$out/dataset" --data.tokenizer_type sentencepiece --data.tokenizer_model "$out/tokenizer.model" \
    --checkpoint.save "$out/checkpoints" --logging.metrics_file "$out/metrics.jsonl"

say "result"
"$python" -m lckv_megatron plot "$out/metrics.jsonl" --output "$out/curves.png"
"$python" examples/demo/judge.py "$out/dataset" "$out/metrics.jsonl"
"$python" -m lckv_megatron sample --load "$out/checkpoints" --prompt "def __init__(self" --new-tokens 60
printf '\nThe curves are in %s, the checkpoints in %s.\n' "$out/curves.png" "$out/checkpoints"
