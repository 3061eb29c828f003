#!/usr/bin/env bash
# All of GIRL: data -> sft -> reward -> judge -> ppo -> evaluate -> recommend -> report. A stage whose result is there is not run again.
#   bash train.sh [--out DIR] [--data DIR] [--seed N] [--quick | --demo | --smoke] [--save-seconds S]
#                 [--init MODEL [--lora-rank R] [--lora-alpha A] [--lora-targets NAMES]] [--checkpointing]
# DIR and MODEL are folders: absolute, or as seen from this file's folder.     Each flag explained: python girl.py train --help
set -euo pipefail
cd "$(dirname "$0")"
case " $* " in *" --help "*|*" -h "*) sed -n '2,5s/^# //p' "$0"; exit 0;; esac
. ./setup.sh requirements.txt
exec python girl.py train "$@"
