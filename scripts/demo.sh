#!/usr/bin/env bash
# From a checkpoint to an answer about a picture, on a CPU: export the sample Qwen-VL, then ask it.
set -euo pipefail
cd "$(dirname "$0")/.."
. scripts/lib.sh
setup cpu

run() { # prints a command as a reader would type it, and runs it
  local word
  printf '\n$'
  for word in "$@"; do case $word in *" "*) printf ' "%s"' "$word" ;; *) printf ' %s' "$word" ;; esac; done
  echo
  PATH="$PWD/.venv/bin:$PATH" "$@"
}

echo "The sample is tiny and knows drawn shapes only (and no chatter). Its commands work with any"
echo "Qwen-VL or LLaVA checkpoint: give its folder or hub id in place of tests/checkpoints/qwen_vl_shapes,"
echo "after \`. .venv/bin/activate\`."

run rtp-llm export --model qwen_vl --checkpoint tests/checkpoints/qwen_vl_shapes --output demo-bundle
run rtp-llm chat demo-bundle --image tests/images/red_circle.png "What is this?"
run rtp-llm chat demo-bundle --image tests/images/red_circle.png "Locate the circle."
