#!/usr/bin/env bash
# The whole test command: ruff, mypy, pytest with its slow part. Arguments go to pytest
# (bash scripts/test.sh -m "not slow").
set -euo pipefail
cd "$(dirname "$0")/.."
. scripts/lib.sh
setup cpu,test

bin=.venv/bin
$bin/ruff check .
MYPYPATH=.types $bin/mypy -p rtp_llm
$bin/python -m pytest -q --durations=10 "$@"
