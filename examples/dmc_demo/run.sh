#!/usr/bin/env bash
# A plain model is trained, then retrofitted to half its KV cache by DMC in three stages, on CPU in minutes.
# Usage: examples/dmc_demo/run.sh [FOLDER]     (default: runs/dmc_demo; the dataset of examples/demo is made where it is missing)
set -euo pipefail
cd "$(dirname "$0")/../.."
out=${1:-runs/dmc_demo}
data=${DATA:-runs/demo}
export PYTHON=${PYTHON:-python}
say() { printf '\n== %s\n' "$*"; }

DATASET_ONLY=1 examples/demo/run.sh "$data"
mkdir -p "$out"

# train STAGE [STAGE BEFORE]
train() {
    say "$1"
    rm -rf "${out:?}/$1"
    load=()
    if [ $# -gt 1 ]; then load=(--checkpoint.load "$out/$2/checkpoints" --checkpoint.finetune true); fi
    OMP_NUM_THREADS=1 "$PYTHON" -m torch.distributed.run --standalone --nproc-per-node 2 pretrain_lckv.py \
        --config examples/dmc_demo/base.yaml --config "examples/dmc_demo/$1.yaml" \
        --data.data_path "$data/dataset" --data.tokenizer_type sentencepiece --data.tokenizer_model "$data/tokenizer.model" \
        "${load[@]}" --checkpoint.save "$out/$1/checkpoints" --logging.metrics_file "$out/$1/metrics.jsonl"
}

train dense
train control dense
train zero_out dense
train retrofit zero_out
train finetune retrofit

say "result"
"$PYTHON" -m lckv_megatron plot "$out"/{dense,control,zero_out,retrofit,finetune} -o "$out/curves.png"
"$PYTHON" examples/dmc_demo/judge.py "$out"
