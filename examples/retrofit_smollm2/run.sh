#!/usr/bin/env bash
# A real model gets a smaller cache, and learns from itself how to do with it: SmolLM2-135M-Instruct is given a sharing map, and DMS.
# Each student is distilled from the model as it was. Perplexity before, right after the change, and after distillation.
# Usage: examples/retrofit_smollm2/run.sh [--model HUGGING_FACE_FOLDER] [--text FILE] [--measured FILE] [--rows N] [--row-length N]
#            [--map LAYER_TYPES] [--init copy|average|svd] [FOLDER] [-- SETTINGS OF ALL RUNS]     (default: runs/retrofit_smollm2)
# --text is what is learned from (default: the demo's corpus), --measured what perplexity is measured on.
# METHODS names what is done (default: "map dms"). Stages that are done already are not done again.
set -euo pipefail
cd "$(dirname "$0")/../.."
out=runs/retrofit_smollm2 model= text= measured=examples/smollm2/wikitext-2-excerpt.txt rows=4 length=1024 init=svd settings=()
# Layers 14 to 16 read the keys and values of layer 17 above them, and layers 18 to 20 those below: 24 of 30 layers have a KV cache.
map=0_1_2_3_4_5_6_7_8_9_10_11_12_13_17_17_17_17_17_17_17_21_22_23_24_25_26_27_28_29
while [ $# -gt 0 ]; do
    case $1 in
        --model) model=$2; shift ;;
        --text) text=$2; shift ;;
        --measured) measured=$2; shift ;;
        --rows) rows=$2; shift ;;
        --row-length) length=$2; shift ;;
        --map) map=$2; shift ;;
        --init) init=$2; shift ;;
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

say "the text, as a dataset"
if [ -z "$text" ]; then
    text=$out/corpus.jsonl
    [ -f "$text" ] || "$python" -m lckv_megatron demo-corpus --output "$text"
fi
[ -f "$out/dataset.idx" ] ||
    "$python" -m lckv_megatron preprocess --input "$text" --output-prefix "$out/dataset" --tokenizer-type huggingface \
        --tokenizer-model "$model"

# perplexity NAME FOLDER: through the cache, in which what was dropped is gone
perplexity() {
    [ -f "$out/$1.json" ] ||
        "$python" -m lckv_megatron perplexity --model "$2" --text "$measured" --rows "$rows" --row-length "$length" --through cache \
            --output "$out/$1.json"
}

# convert NAME OPTIONS...: the model as it was, changed
convert() {
    [ -d "$out/$1" ] || "$python" -m checkpoints_conversion hf-to-megatron --hf-path "$model" --megatron-path "$out/$1" --no-verify "${@:2}"
}

# train NAME FROM MODEL_YAML FILE: a stage, from the weights in FROM
train() {
    [ -f "$out/$1.done" ] && return
    say "training: $1"
    "$python" -m torch.distributed.run --standalone --nproc-per-node 1 pretrain_lckv.py --config examples/retrofit_smollm2/base.yaml \
        --config "$3" --config "examples/retrofit_smollm2/$4" --checkpoint.load "$2" --train.distillation.teacher "$out/teacher" \
        --data.data_path "$out/dataset" --data.tokenizer_type huggingface --data.tokenizer_model "$model" \
        --checkpoint.save "$out/$1" --logging.metrics_file "$out/$1.jsonl" ${settings[@]+"${settings[@]}"}
    touch "$out/$1.done"
}

# export NAME: to Hugging Face's format
export_model() {
    [ -d "$out/$1-huggingface" ] ||
        "$python" -m checkpoints_conversion megatron-to-hf --megatron-path "$out/$1" --hf-path "$out/$1-huggingface"
}

export OMP_NUM_THREADS=${OMP_NUM_THREADS:-2}
say "the model as it was, which is the teacher"
convert teacher
perplexity original "$model"

for method in ${METHODS:-map dms}; do
    case $method in
        map)
            say "a sharing map, whose weights are made by $init"
            calibration=()
            if [ "$init" = svd ]; then calibration=(--calibration-text "$text" --calibration-tokens 4096); fi
            convert map --compression.layer_types "$map" --init "$init" ${calibration[@]+"${calibration[@]}"}
            export_model map
            perplexity map-before "$out/map-huggingface"
            train map-distilled "$out/map" "$out/map/model.yaml" map.yaml
            export_model map-distilled
            perplexity map-after "$out/map-distilled-huggingface"
            ;;
        dms)
            train dms-zero-out "$out/teacher" "$out/teacher/model.yaml" zero_out.yaml
            train dms-retrofit "$out/dms-zero-out" "$out/teacher/model.yaml" retrofit.yaml
            train dms-finetune "$out/dms-retrofit" "$out/teacher/model.yaml" finetune.yaml
            export_model dms-finetune
            perplexity dms-after "$out/dms-finetune-huggingface"
            ;;
        *) echo "METHODS has $method; it takes map and dms" >&2; exit 2 ;;
    esac
done

say "result"
"$python" examples/retrofit_smollm2/judge.py "$out"
