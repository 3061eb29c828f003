#!/usr/bin/env bash
# All tests.   bash test.sh [arguments of pytest]
set -euo pipefail
cd "$(dirname "$0")"
. ./setup.sh requirements-test.txt
exec python -m pytest -q tests "$@"
