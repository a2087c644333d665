#!/usr/bin/env bash
# Download, into .whl/, the packages that a bare GPU machine lacks (Linux x86-64, Python 3.12), at .ci/constraints.txt's
# versions. benchmarks/gpu.sh installs them from there without a network. Usage: benchmarks/wheels.sh [NAME ...]
set -euo pipefail
cd "$(dirname "$0")/.."
names=(webdataset braceexpand soundfile cffi pycparser cyclopts attrs docstring-parser rich rich-rst simplejpeg tiktoken regex \
    open-clip-torch ftfy wcwidth)
[ $# -gt 0 ] && names=("$@")

platforms=()
for tag in manylinux_2_28 manylinux_2_27 manylinux_2_17 manylinux2014 manylinux1; do
    platforms+=(--platform "${tag}_x86_64")
done
mkdir -p .whl carry
for name in "${names[@]}"; do
    pinned=$(grep -E "^$name==" .ci/constraints.txt | head -1 | cut -d' ' -f1)
    [ -n "$pinned" ] || { echo "$name has no version in .ci/constraints.txt" >&2; exit 1; }
    rm -f .whl/"${name//-/_}"-*.whl
    python3 -m pip download -q --disable-pip-version-check --no-deps --only-binary=:all: --python-version 3.12 \
        --implementation cp "${platforms[@]}" -d .whl "$pinned"
done

bytes=$(find .whl carry -type f -printf '%s\n' 2>/dev/null | awk '{sum += $1} END {print sum + 0}')
echo ".whl and carry hold $((bytes >> 20)) MiB in $(find .whl carry -type f 2>/dev/null | wc -l) files"
[ "$bytes" -lt $((60 << 20)) ] || { echo "that is more than the 60 MiB that travel" >&2; exit 1; }
