#!/usr/bin/env bash
# The whole test command: ruff, mypy, pytest with its slow part. Arguments go to pytest
# (bash scripts/test.sh -m "not slow").
set -euo pipefail
cd "$(dirname "$0")/.."
. scripts/lib.sh
setup cpu,test

# the playground's tests drive Debian's Chromium, and are skipped without one
if ! command -v chromium >/dev/null && ! command -v chromium-browser >/dev/null; then
  if [ -n "${CI:-}" ] && [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
    apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends chromium >/dev/null
  else
    echo "No Chromium: the playground's tests are skipped (on Debian: apt-get install chromium)."
  fi
fi

bin=.venv/bin
$bin/ruff check .
MYPYPATH=.types $bin/mypy -p rtp_llm
if [ $# = 0 ]; then # three at once on two cores, for many wait; then those that measure times, one by one
  OMP_NUM_THREADS=1 $bin/python -m pytest -q --durations=10 -m "not alone" -n 3 --dist loadfile --no-loadscope-reorder
  set -- -m alone
fi
$bin/python -m pytest -q --durations=10 "$@"
