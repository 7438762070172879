#!/usr/bin/env bash
# What needs a GPU, in ten minutes: the tests marked gpu and what the bench says, without Ray. Each part
# is a process of its own with a time limit, so that what hangs or spoils the device harms no other.
#
#   tests/gpu.sh [folder for what is found] [folder of wheels to install from]
#
# On a machine without a network and with torch alone, bring wheels:
#   pip download --only-binary=:all: --no-deps --python-version 3.12 -d wheels \
#     -r tests/gpu-packages.txt
set -u
cd "$(dirname "$0")/.."
out=${1:-build/gpu}
mkdir -p "$out"
if [ $# -gt 1 ]; then
  python -m pip install --quiet --no-index --no-deps --find-links "$2" --target build/gpu-packages \
    -r tests/gpu-packages.txt || exit 1
fi
export PYTHONPATH=$PWD:$PWD/build/gpu-packages COLUMNS=160

part() { # name, seconds, command
  local name=$1 limit=$2 began=$SECONDS
  shift 2
  timeout --kill-after=5 "$limit" "$@" >"$out/$name.log" 2>&1
  echo "== $name: exit $?, $((SECONDS - began)) s"
  tail -n 14 "$out/$name.log"
}

# size, patch, edge of the images, batch, decoder, compiled
study() {
  cat <<YAML
study: gpu
data: {source: smears, size: $3, images: $4, val: 2}
trial:
  model: {size: $1, patch: $2, decoder: $5}
  masking: {ratio: {name: constant, value: 0.75}}
  pretrain: {epochs: 1, batch: $4, compile: $6}
budget: {trials: 2}
YAML
}

bench() { # name, seconds, strategies, then what study() takes
  local name=$1 limit=$2 strategies=$3
  shift 3
  study "$@" >"$out/$name.yaml"
  part "$name" "$limit" python -m study bench "$out/$name.yaml" --strategies "$strategies" \
    --seconds 2 --output "$out/$name.json"
}

large="{depth: 8, width: 512}"
part tests 180 python -m pytest -m gpu -q -p no:cacheprovider \
  tests/trainables/test_gpu.py tests/trainables/test_batches.py tests/trainables/test_store.py
bench base16 40 random base 16 224 512 "$large" false
bench base16-compiled 70 random base 16 224 512 "$large" true
bench large16 40 random large 16 224 256 "$large" false
bench base8 40 random base 8 224 128 "$large" false
bench base4 40 random base 4 128 64 "$large" false
bench strategies 60 all base 16 224 256 "$large" false
bench tiny8 40 random tiny 8 64 256 "{depth: 2, width: 128}" false
bench tiny8-compiled 50 random tiny 8 64 256 "{depth: 2, width: 128}" true
