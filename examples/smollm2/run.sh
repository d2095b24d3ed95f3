#!/usr/bin/env bash
# A real model, there and back: SmolLM2-135M-Instruct from Hugging Face's format to Megatron's, on one and on three tensor-parallel ranks, with
# and without a sharing map, and back. Perplexity of every one of them; fails where equal models differ.
# Usage: examples/smollm2/run.sh [--text FILE] [--rows N] [--row-length N] [--map LAYER_TYPES] [FOLDER]     (default: runs/smollm2)
set -euo pipefail
cd "$(dirname "$0")/../.."
out=runs/smollm2 text=examples/smollm2/wikitext-2-excerpt.txt rows=4 length=1024 map=
while [ $# -gt 0 ]; do
    case $1 in
        --text) text=$2; shift ;;
        --rows) rows=$2; shift ;;
        --row-length) length=$2; shift ;;
        --map) map=$2; shift ;;
        -*) echo "unknown option $1; see the head of $0" >&2; exit 2 ;;
        *) out=$1 ;;
    esac
    shift
done
python=${PYTHON:-python}
# Layers 14 to 16 read the keys and values of layer 17 above them, and layers 18 to 20 those below: 24 of 30 layers have a KV cache.
map=${map:-0_1_2_3_4_5_6_7_8_9_10_11_12_13_17_17_17_17_17_17_17_21_22_23_24_25_26_27_28_29}
mkdir -p "$out"
say() { printf '\n== %s\n' "$*"; }

# perplexity NAME RANKS OPTIONS...
perplexity() {
    say "perplexity: $1"
    local launcher=("$python")
    if [ "$2" -gt 1 ]; then launcher=("$python" -m torch.distributed.run --standalone --nproc-per-node "$2"); fi
    OMP_NUM_THREADS=$((2 / $2 > 0 ? 2 / $2 : 1)) "${launcher[@]}" -m lckv_megatron perplexity "${@:3}" --text "$text" --rows "$rows" \
        --row-length "$length" --output "$out/$1.json"
}

say "the model: dequantised from GGUF"
PYTHON=$python examples/smollm2/fetch_model.sh "$out"

say "conversion to Megatron, and back"
rm -rf "$out/plain" "$out/back" "$out/copy" "$out/average" "$out/svd" "$out/svd-huggingface" "$out"/*.json
"$python" -m checkpoints_conversion hf-to-megatron --hf-path "$out/original" --megatron-path "$out/plain"
"$python" -m checkpoints_conversion megatron-to-hf --megatron-path "$out/plain" --hf-path "$out/back"

run=(--tokenizer_type huggingface --tokenizer_model "$out/original")
perplexity huggingface 1 --model "$out/original" --through transformers
perplexity megatron-tp1 1 --load "$out/plain" "${run[@]}"
perplexity megatron-tp3 3 --load "$out/plain" "${run[@]}" --tensor-model-parallel-size 3

for how in copy average; do
    say "conversion to a sharing map by $how"
    "$python" -m checkpoints_conversion hf-to-megatron --hf-path "$out/original" --megatron-path "$out/$how" --no-verify \
        --compression.layer_types "$map" --init "$how"
    "$python" -m checkpoints_conversion verify --hf-path "$out/original" --megatron-path "$out/$how" \
        --parallel.tensor_model_parallel_size 3
    perplexity "shared-by-$how" 1 --load "$out/$how" "${run[@]}"
done

say "conversion to a sharing map, fitted to the text behind what is measured"
"$python" examples/smollm2/rest_of_text.py "$out/original" "$text" $((rows * length)) "$out/calibration.txt"
"$python" -m checkpoints_conversion hf-to-megatron --hf-path "$out/original" --megatron-path "$out/svd" --no-verify \
    --compression.layer_types "$map" --init svd --calibration-text "$out/calibration.txt" --calibration-tokens 4096
"$python" -m checkpoints_conversion megatron-to-hf --megatron-path "$out/svd" --hf-path "$out/svd-huggingface" --no-verify
"$python" -m checkpoints_conversion verify --hf-path "$out/svd-huggingface" --megatron-path "$out/svd" \
    --parallel.tensor_model_parallel_size 3
perplexity shared-by-svd 1 --load "$out/svd" "${run[@]}"

say "result"
"$python" examples/smollm2/judge.py "$out"
