#!/usr/bin/env bash
# Supervised fine-tuning of a real model on a CPU: SmolLM2-135M-Instruct learns to answer in JSON. Conversations -> dataset -> training ->
# Hugging Face; answers to questions that it was not trained on, before and after. Fails where the loss does not fall.
# Usage: examples/sft_smollm2/run.sh [--model HUGGING_FACE_FOLDER] [FOLDER] [-- SETTINGS OF THE RUN]     (default: runs/sft_smollm2)
set -euo pipefail
cd "$(dirname "$0")/../.."
out=runs/sft_smollm2 model= settings=()
while [ $# -gt 0 ]; do
    case $1 in
        --model) model=$2; shift ;;
        --) shift; settings=("$@"); break ;;
        -*) echo "unknown option $1; see the head of $0" >&2; exit 2 ;;
        *) out=$1 ;;
    esac
    shift
done
python=${PYTHON:-python}
mkdir -p "$out"
say() { printf '\n== %s\n' "$*"; }

if [ -z "$model" ]; then
    say "the model: dequantised from GGUF"
    model=$out/original
    PYTHON=$python examples/smollm2/fetch_model.sh "$out"
fi

say "conversations, as a dataset"
"$python" examples/sft_smollm2/chats.py "$out"
"$python" -m lckv_megatron preprocess --data-format chat --input "$out/chats.jsonl" --output-prefix "$out/chats" --overwrite \
    --tokenizer-type huggingface --tokenizer-model "$model"

say "training"
rm -rf "$out/plain" "$out/checkpoints" "$out/tuned" "$out"/metrics.jsonl "$out"/before.jsonl "$out"/after.jsonl
"$python" -m checkpoints_conversion hf-to-megatron --hf-path "$model" --megatron-path "$out/plain" --no-verify
OMP_NUM_THREADS=${OMP_NUM_THREADS:-2} "$python" -m torch.distributed.run --standalone --nproc-per-node 1 pretrain_lckv.py \
    --config examples/sft_smollm2/sft.yaml --config "$out/plain/model.yaml" --checkpoint.load "$out/plain" \
    --data.data_path "$out/chats" --data.tokenizer_type huggingface --data.tokenizer_model "$model" \
    --checkpoint.save "$out/checkpoints" --logging.metrics_file "$out/metrics.jsonl" "${settings[@]}"

say "back to Hugging Face"
"$python" -m checkpoints_conversion megatron-to-hf --megatron-path "$out/checkpoints" --hf-path "$out/tuned"

say "answers, before and after"
"$python" -m lckv_megatron generate --model "$model" --batch "$out/questions.jsonl" --output "$out/before.jsonl" --temperature 0 \
    --max-new-tokens 24
"$python" -m lckv_megatron generate --model "$out/tuned" --batch "$out/questions.jsonl" --output "$out/after.jsonl" --temperature 0 \
    --max-new-tokens 24
"$python" examples/sft_smollm2/judge.py "$out"
