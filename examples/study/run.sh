#!/usr/bin/env bash
# Loss against bytes of KV cache, for models of 6 million parameters on a CPU: the data, then the study.
# Usage: examples/study/run.sh [FOLDER [OPTION ...]]     (default: runs/study; options of `lckv-megatron study`)
# DATA_ONLY=1 stops after the data. STUDY names another file (default: examples/study/study.yaml).
set -euo pipefail
cd "$(dirname "$0")/../.."
out=${1:-runs/study}
python=${PYTHON:-python}
data=runs/study # where study.yaml says that the data lie
mkdir -p "$data" "$out"
say() { printf '\n== %s\n' "$*"; }

say "corpus: sources and documentation of Python's standard library; the last 40 documents are held out"
[ -f "$data/corpus.jsonl" ] || "$python" -m lckv_megatron demo-corpus --output "$data/corpus.jsonl"
head -n -40 "$data/corpus.jsonl" >"$data/training.jsonl"
tail -n 40 "$data/corpus.jsonl" >"$data/held_out.jsonl"

say "tokenizer: SentencePiece BPE, 1024 tokens"
[ -f "$data/tokenizer.model" ] ||
    "$python" -m lckv_megatron train-tokenizer --input "$data/corpus.jsonl" --vocab-size 1024 --max-mib 8 --threads 2 --output "$data/tokenizer.model"

say "indexed dataset"
[ -f "$data/dataset.idx" ] ||
    "$python" -m lckv_megatron preprocess --input "$data/training.jsonl" --output-prefix "$data/dataset" --workers 2 \
        --tokenizer-type sentencepiece --tokenizer-model "$data/tokenizer.model"

if [ -n "${DATA_ONLY:-}" ]; then exit; fi

say "study"
"$python" -m lckv_megatron study "${STUDY:-examples/study/study.yaml}" --output "$out" "${@:2}"
cat "$out/table.md"
