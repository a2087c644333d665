# The demonstration, as a user would type it: the corpus, the training, the report. `make demo` calls it.
# Usage: sh data/demo.sh SEED RUN
set -eu
seed=$1
run=$2
corpus=data/tuxpaint

say() { echo "\$ $*"; "$@"; }

status=0
say python -m data.tuxpaint --seed "$seed" || status=$?
if [ "$status" -eq 3 ]; then  # the package cannot be had; the line above says why
    echo "going on with data/scenes, a corpus that is made on the spot"
    corpus=data/scenes
    say python -m data.scenes --seed "$seed"
elif [ "$status" -ne 0 ]; then
    exit "$status"
fi

shards=$corpus/shards/$seed
settings="seed=$seed run_dir=$run evaluate.pictures.on=$shards/validation-*.tar evaluate.voices.on=$shards/validation-*.tar"
settings="$settings sources.pictures.shards=$shards/train-*.tar sources.voices.shards=$shards/train-*.tar"
for source in pictures voices; do settings="$settings sources.$source.validation=$shards/validation-*.tar"; done
if [ "$corpus" = data/tuxpaint ]; then
    settings="$settings sources.effects.shards=$shards/train-*.tar"
else  # the scenes have no effects: their place goes to the voices
    settings="$settings sources.effects.shards=$shards/train-*.tar sources.effects.where.role=spoken"
fi
set -f  # the patterns are the program's to expand
# shellcheck disable=SC2086
say mmfm pretrain configs/demo.yaml $settings --resume auto
say mmfm report "$run"
say mmfm embed "$run" "$shards/validation-*.tar" --out "$run/collection"
say mmfm index "$run/collection"
echo "to search what the run never saw, in a browser: mmfm serve $run/collection"
