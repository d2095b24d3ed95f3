#!/usr/bin/env bash
# A tiny model learns to find needles in rows of 64 tokens and goes on with rows of 512, 4,096 and 65,536; the last are split over two
# processes, activations on the host. It is stopped, goes on, is converted, and is asked for needles in 65,536 tokens. Fails where it
# misses one. On CPU, in minutes.
# Usage: examples/long_context_toy/run.sh [FOLDER]     (default: runs/long_context_toy)
# Other sizes: ROWS (as of haystacks.py, at least three), SHORT, MIDDLE and LONG (settings of the runs), JUDGE (options of judge.py).
set -euo pipefail
cd "$(dirname "$0")/../.."
out=${1:-runs/long_context_toy}
python=${PYTHON:-python}
read -ra rows <<<"${ROWS:-4096x64 256x512 128x4096 8x65536}"
read -ra short <<<"${SHORT:-}"
read -ra middle <<<"${MIDDLE:-}"
read -ra long <<<"${LONG:-}"
read -ra judge <<<"${JUDGE:-}"
lengths=("${rows[@]#*x}")
first=${lengths[0]} last=${lengths[-1]}
mkdir -p "$out"
say() { printf '\n== %s\n' "$*"; }

# train PROCESSES TOKENS SETTINGS: with rows of so many tokens
train() {
    processes=$1 tokens=$2
    shift 2
    OMP_NUM_THREADS=1 "$python" -m torch.distributed.run --standalone --nproc-per-node "$processes" pretrain_lckv.py \
        --config examples/long_context_toy/short.yaml --train.seq_length "$tokens" "$@" \
        --data.data_path "$out/$tokens" --data.tokenizer_type huggingface --data.tokenizer_model "$out/tokenizer" \
        --checkpoint.save "$out/$tokens-run/checkpoints" --logging.metrics_file "$out/$tokens-run/metrics.jsonl"
}

# lengthen CONFIG BEFORE TOKENS SETTINGS: go on from the model of rows of BEFORE tokens
lengthen() {
    config=$1 before=$2 tokens=$3
    shift 3
    train 2 "$tokens" --config "examples/long_context_toy/$config.yaml" --train.seq_length "$tokens" \
        --model.rope_scaling.factor $((tokens / first)) --checkpoint.load "$out/$before-run/checkpoints" "$@"
}

say "rows with needles, and questions"
"$python" examples/long_context_toy/haystacks.py "$out" "${rows[@]}"
for tokens in "${lengths[@]}"; do
    "$python" -m lckv_megatron preprocess --input "$out/$tokens.jsonl" --output-prefix "$out/$tokens" --overwrite --append-eod \
        --tokenizer-type huggingface --tokenizer-model "$out/tokenizer"
    rm -rf "$out/$tokens-run"
done
rm -rf "$out/model" "$out/answers.jsonl"

say "rows of $first tokens"
train 1 "$first" "${short[@]}"
before=$first
for tokens in "${lengths[@]:1:${#lengths[@]}-2}"; do
    say "rows of $tokens tokens"
    lengthen middle "$before" "$tokens" "${middle[@]}"
    before=$tokens
done

say "rows of $last tokens, until the first one is done"
lengthen long "$before" "$last" --train.exit_duration_minutes 0.001 "${long[@]}"

say "rows of $last tokens, from the checkpoint"
lengthen long "$before" "$last" "${long[@]}"

say "to Hugging Face"
"$python" -m checkpoints_conversion megatron-to-hf --megatron-path "$out/$last-run/checkpoints" --hf-path "$out/model"

say "questions"
"$python" -m lckv_megatron generate --model "$out/model" --batch "$out/questions.jsonl" --output "$out/answers.jsonl" \
    --temperature 0 --max-new-tokens 1 --batch-size 1 --prefill-chunk 2048 # one after the other: they begin alike
"$python" examples/long_context_toy/judge.py "$out" "${judge[@]}"
