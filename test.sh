#!/usr/bin/env bash
# All tests, in two processes side by side.   bash test.sh [arguments of pytest: one process with these]
set -euo pipefail
cd "$(dirname "$0")"
. ./setup.sh requirements-test.txt
export GOMP_SPINCOUNT=5000      # threads that wait leave the cores to the other process, see girl.py
[ $# -eq 0 ] || exec python -m pytest -q tests "$@"
half=(tests/test_{hostile,resume,labs,report,trace,demo,pretrained}.py)   # about half of the time
said=$(mktemp)
trap 'kill $other 2>/dev/null || true; rm -f "$said"' EXIT
python -m pytest -q -rs "${half[@]}" >"$said" 2>&1 & other=$!
failed=0
python -m pytest -q -rs tests "${half[@]/#/--ignore=}" || failed=$?
wait "$other" || failed=$?
cat "$said"
exit "$failed"
