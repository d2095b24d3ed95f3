#!/usr/bin/env bash
# A tiny model learns to find needles in short rows and goes on with rows of 65,536 tokens, split over two processes, activations on the
# host. It is stopped, goes on, is converted, and is asked for needles in 65,536 tokens. Fails where it misses one. On CPU, in minutes.
# Usage: examples/long_context_toy/run.sh [FOLDER]     (default: runs/long_context_toy)
# Other sizes: HAYSTACKS (options of haystacks.py), SHORT, MIDDLE and LONG (settings of the runs), JUDGE (options of judge.py).
set -euo pipefail
cd "$(dirname "$0")/../.."
out=${1:-runs/long_context_toy}
python=${PYTHON:-python}
read -ra haystacks <<<"${HAYSTACKS:-}"
read -ra short <<<"${SHORT:-}"
read -ra middle <<<"${MIDDLE:-}"
read -ra long <<<"${LONG:-}"
read -ra judge <<<"${JUDGE:-}"
mkdir -p "$out"
say() { printf '\n== %s\n' "$*"; }

# train STAGE SETTINGS
train() {
    stage=$1
    shift
    OMP_NUM_THREADS=1 "$python" -m torch.distributed.run --standalone --nproc-per-node 2 pretrain_lckv.py \
        --config examples/long_context_toy/short.yaml "$@" \
        --data.data_path "$out/$stage" --data.tokenizer_type huggingface --data.tokenizer_model "$out/tokenizer" \
        --checkpoint.save "$out/$stage-run/checkpoints" --logging.metrics_file "$out/$stage-run/metrics.jsonl"
}

say "rows with needles, and questions"
"$python" examples/long_context_toy/haystacks.py "$out" "${haystacks[@]}"
for stage in short middle long; do
    "$python" -m lckv_megatron preprocess --input "$out/$stage.jsonl" --output-prefix "$out/$stage" --overwrite --append-eod \
        --tokenizer-type huggingface --tokenizer-model "$out/tokenizer"
done
rm -rf "$out"/{short,middle,long}-run "$out/model" "$out/answers.jsonl"

say "short rows"
train short "${short[@]}"

say "middle rows"
train middle --config examples/long_context_toy/middle.yaml --checkpoint.load "$out/short-run/checkpoints" "${middle[@]}"

say "long rows, until the first one is done"
lengthened=(--config examples/long_context_toy/long.yaml --checkpoint.load "$out/middle-run/checkpoints" "${long[@]}")
train long "${lengthened[@]}" --train.exit_duration_minutes 0.001

say "long rows, from the checkpoint"
train long "${lengthened[@]}"

say "to Hugging Face"
"$python" -m checkpoints_conversion megatron-to-hf --megatron-path "$out/long-run/checkpoints" --hf-path "$out/model"

say "questions"
"$python" -m lckv_megatron generate --model "$out/model" --batch "$out/questions.jsonl" --output "$out/answers.jsonl" \
    --temperature 0 --max-new-tokens 1
"$python" examples/long_context_toy/judge.py "$out" "${judge[@]}"
