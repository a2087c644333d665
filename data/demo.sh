# The demonstration, as a user would type it: the corpus, the training, the report. `make demo` calls it.
# Usage: sh data/demo.sh SEED RUN
set -eu
seed=$1
run=$2
corpus=data/tuxpaint
languages=be,bg,ca,da,el,es,fr,nl,pt,ro,ru  # those of the voices

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
emoji=data/emoji/shards/$seed
settings="seed=$seed run=$run evaluate.pictures.on=$shards/validation-*.tar evaluate.voices.on=$shards/validation-*.tar"
settings="$settings sources.pictures.shards=$shards/train-*.tar sources.voices.shards=$shards/train-*.tar"
settings="$settings sources.effects.shards=$shards/train-*.tar"
[ "$corpus" = data/tuxpaint ] || settings="$settings sources.effects.where.role=spoken"  # scenes have no effects
if [ "$corpus" = data/tuxpaint ]; then
    say python -m data.emoji --seed "$seed" --without "$shards/validation-*.tar" --languages "$languages" || status=$?
    [ "$status" -eq 0 ] || [ "$status" -eq 3 ] || exit "$status"
fi
if [ "$status" -eq 0 ]; then
    settings="$settings sources.emoji.shards=$emoji/train-*.tar"
else  # their place goes to more of the pictures
    settings="$settings sources.emoji.shards=$shards/train-*.tar sources.emoji.where.role=picture"
fi
if [ -e "$run" ]; then
    set -- --resume
    [ -e "$run/checkpoints" ] || { echo "$run has no checkpoint to go on from; remove it and start again"; exit 2; }
else
    set --
fi
set -f  # the patterns are the program's to expand
# shellcheck disable=SC2086
say mmfm pretrain configs/demo.yaml $settings "$@"
say mmfm report "$run"
