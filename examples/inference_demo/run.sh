#!/usr/bin/env bash
# Five small models, trained alike: plain, LCKV, YOCO, DMC, and LCKV with DMC. Each is converted to Hugging Face's format; then their
# generation is measured side by side: speed, memory, batch, perplexity, a sample. On CPU, in minutes.
# Usage: examples/inference_demo/run.sh [FOLDER]     (default: runs/inference_demo; models that are there already are used)
# The dataset is that of examples/demo, in DATA (default: runs/demo); it is made where it is missing.
set -euo pipefail
cd "$(dirname "$0")/../.."
out=${1:-runs/inference_demo}
data=${DATA:-runs/demo}
export PYTHON=${PYTHON:-python}
models=(plain lckv yoco dmc lckv_dmc)
say() { printf '\n== %s\n' "$*"; }

DATASET_ONLY=1 examples/demo/run.sh "$data"
mkdir -p "$out"

for model in "${models[@]}"; do
    [ -d "$out/$model" ] && continue
    say "training: $model"
    run=$out/training/$model
    rm -rf "$run"
    OMP_NUM_THREADS=1 "$PYTHON" -m torch.distributed.run --standalone --nproc-per-node 2 pretrain_lckv.py \
        --config examples/inference_demo/base.yaml --config "examples/inference_demo/$model.yaml" \
        --data.data_path "$data/dataset" --data.tokenizer_type sentencepiece --data.tokenizer_model "$data/tokenizer.model" \
        --checkpoint.save "$run/checkpoints" --logging.metrics_file "$run/metrics.jsonl"
    say "conversion: $model"
    "$PYTHON" -m checkpoints_conversion megatron-to-hf --megatron-path "$run/checkpoints" --hf-path "$out/$model"
done

say "generation, side by side"
tail -n 20 "$data/corpus.jsonl" >"$out/held_out.jsonl" # documents of the validation split
"$PYTHON" -m tools.benchmarks.inference --text "$out/held_out.jsonl" --lengths 128 448 --context 448 --threads 1 --clock cpu \
    --models plain="$out/plain" LCKV="$out/lckv" YOCO="$out/yoco" DMC="$out/dmc" "LCKV x DMC=$out/lckv_dmc" \
    --output "$out/inference.csv" --picture "$out/inference.png"

for model in "${models[@]}"; do
    say "$model: perplexity of held-out text through its cache, and a sample"
    "$PYTHON" -m lckv_megatron perplexity --model "$out/$model" --text "$out/held_out.jsonl" --through cache --max-tokens 8000
    "$PYTHON" -m lckv_megatron generate --model "$out/$model" --prompt "def __init__(self" --temperature 0.7 --seed 1 --max-new-tokens 60
done
printf '\nThe numbers are in %s, the picture is %s.\n' "$out/inference.csv" "$out/inference.png"
