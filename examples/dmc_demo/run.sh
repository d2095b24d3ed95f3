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

before=
for stage in dense zero_out retrofit finetune; do
    say "$stage"
    rm -rf "${out:?}/$stage"
    load=()
    if [ -n "$before" ]; then load=(--checkpoint.load "$out/$before/checkpoints" --checkpoint.finetune true); fi
    OMP_NUM_THREADS=1 "$PYTHON" -m torch.distributed.run --standalone --nproc-per-node "${PROCESSES:-2}" pretrain_lckv.py \
        --config examples/dmc_demo/base.yaml --config "examples/dmc_demo/$stage.yaml" \
        --data.data_path "$data/dataset" --data.tokenizer_type sentencepiece --data.tokenizer_model "$data/tokenizer.model" \
        --train.micro_batch_size 4 "${load[@]}" \
        --checkpoint.save "$out/$stage/checkpoints" --logging.metrics_file "$out/$stage/metrics.jsonl"
    before=$stage
done

say "result"
"$PYTHON" -m tools.plot_run "$out"/{dense,zero_out,retrofit,finetune} -o "$out/curves.png"
"$PYTHON" examples/dmc_demo/judge.py "$out"
