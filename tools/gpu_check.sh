#!/usr/bin/env bash
# What has to be seen once on a GPU, the most valuable first, in at most eight minutes:
#   tools/gpu_check.sh [--minutes 8] [--output FILE] [--tiny]
# Without a network: WHEELS names a folder of wheels of the packages that are missing there.
# It writes one JSON file under tools/benchmarks/results/. --tiny runs every part on a CPU.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
if [ -n "${WHEELS:-}" ]; then
    packages=$(mktemp -d)
    "$python" -m pip install --quiet --no-index --no-deps --no-compile --target "$packages" "$WHEELS"/*.whl
    export PYTHONPATH="$PYTHONPATH:$packages"
fi
exec "$python" -m tools.gpu_check "$@"
