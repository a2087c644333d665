#!/usr/bin/env bash
# The GPU check: one call, under ten minutes on one H100 or H200, from the repository root, without a network.
#
#   benchmarks/gpu.sh [FOLDER [--small]]      FOLDER: $OUT, or benchmarks/results/gpu-DATE
#
# Installs the wheels in .whl/ (benchmarks/wheels.sh) and trains on the shards in carry/, where there are any. A stage
# that fails or runs out of time does not stop the next; the exit code is then 1. LIMIT: the seconds for all of it.
set -uo pipefail
cd "$(dirname "$0")/.."
OUT=${1:-${OUT:-benchmarks/results/gpu-$(date +%Y-%m-%d)}}
LIMIT=${LIMIT:-570}
PYTHON=${PYTHON:-python3}
SMALL=(${2:+"$2"})
mkdir -p "$OUT"
rm -f "$OUT"/{report.md,profile.txt,metrics.jsonl,curve.png} "$OUT"/{attention,step,peers,pretrain}.json
exec > >(tee "$OUT/log.txt") 2>&1

left() { echo $((LIMIT - SECONDS)); }
rows=()
failed=0

stage() {  # stage NAME SECONDS COMMAND ...
    local name=$1 most=$2 start=$SECONDS code
    shift 2
    [ "$most" -lt "$(left)" ] || most=$(left)
    echo "=== $name (at most $most s)"
    if [ "$most" -lt 5 ]; then code=124; else timeout -k 5 "$most" "$@"; code=$?; fi
    local verdict=passed
    [ $code -eq 0 ] || { failed=1; verdict="failed ($code)"; }
    [ $code -ne 124 ] && [ $code -ne 137 ] || verdict="out of time"
    rows+=("$(printf '%-12s %-14s %4d s' "$name" "$verdict" $((SECONDS - start)))")
}

install() {
    "$PYTHON" -m pip install -q --disable-pip-version-check --no-index --no-deps --no-compile --no-cache-dir \
        --upgrade --target "$1" .whl/*.whl
}

about() {
    nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader 2>/dev/null || echo "no GPU"
    "$PYTHON" -c 'import platform, torch; print("python", platform.python_version(), "torch", torch.__version__)'
    "$PYTHON" -c 'import multimodal_fm.cli, multimodal_fm.train.loop, soundfile, torchaudio, torchvision, webdataset'
}

corpora() {  # scenes, JPEG and FLAC, for the stages that train, where nothing was carried
    find -L carry -name 'train-*.tar' 2>/dev/null | grep -q . && return
    "$PYTHON" -m data.scenes --seed 0 --train "$SCENES" --validation 400 --to carry/scenes >/dev/null
}

export -f install about corpora
SCENES=$([ ${#SMALL[@]} -gt 0 ] && echo 60 || echo 4000)
export SCENES
export PYTHON PYTHONUNBUFFERED=1 TOKENIZERS_PARALLELISM=false PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
if compgen -G '.whl/*.whl' >/dev/null; then
    site=$(mktemp -d)
    trap 'rm -rf "$site"' EXIT
    stage wheels 60 bash -c "install '$site'"
    PYTHONPATH="$site:$PYTHONPATH"
fi
stage about 60 bash -c 'set -e; about'
stage corpora 60 bash -c corpora
CUDA_VISIBLE_DEVICES=${CUDA_VISIBLE_DEVICES:-0} stage tests 60 "$PYTHON" -m pytest -q -p no:cacheprovider -m gpu tests
stage attention 60 "$PYTHON" benchmarks/gpu.py attention --out "$OUT" "${SMALL[@]}"
stage step 150 "$PYTHON" benchmarks/gpu.py step --out "$OUT" "${SMALL[@]}"
stage peers 150 "$PYTHON" benchmarks/gpu.py peers --out "$OUT" "${SMALL[@]}"
spare=$(($(left) - 40))
seconds=$((spare < 240 ? spare : 240))
stage pretrain $((seconds + 35)) "$PYTHON" benchmarks/gpu.py pretrain --out "$OUT" --seconds $seconds "${SMALL[@]}"

echo "=== results in $OUT, $SECONDS s in all"
printf '%s\n' "${rows[@]}"
exit $failed
