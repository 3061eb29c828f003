#!/usr/bin/env bash
# All of GIRL: data -> sft -> reward -> judge -> ppo -> evaluate -> recommend. A stage whose result is there is not run again.
#   bash train.sh [--out DIR] [--data DIR] [--seed N] [--smoke]       (DIR: absolute, or as seen from this file's folder)
set -euo pipefail
cd "$(dirname "$0")"
case " $* " in *" --help "*|*" -h "*) sed -n '2,3s/^# *//p' "$0"; exit 0;; esac
. ./setup.sh requirements.txt
exec python girl.py train "$@"
