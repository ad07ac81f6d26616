# Shared set-up, to be sourced from the repository's root: `setup cpu` or `setup cpu,test` makes .venv with
# a CPU build of torch and installs the project into it. Quick when there is nothing to do.

find_python() { # prints a Python >= 3.11
  local candidate
  for candidate in ${PYTHON:-} python3 python python3.13 python3.12 python3.11 python3.14; do
    if "$candidate" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
      command -v "$candidate"
      return
    fi
  done
  return 1
}

setup() { # setup EXTRAS
  local extras=$1 stamp=".venv/.installed-${1//,/-}" wanted python
  wanted="$PWD $(cat pyproject.toml constraints.txt __init__.py | cksum)"
  if [ -x .venv/bin/python ] && [ "$(cat "$stamp" 2>/dev/null)" = "$wanted" ]; then return; fi

  echo "Downloads: about 300 MB with the CPU build of torch (1.4 GB unpacked in .venv), once."
  if command -v uv >/dev/null; then
    [ -x .venv/bin/python ] || uv venv -q --python '>=3.11' .venv
    uv pip install --python .venv/bin/python --torch-backend=cpu -c constraints.txt -e ".[$extras]"
  else
    if [ ! -x .venv/bin/python ]; then
      python=$(find_python) || { echo "No Python >= 3.11 with venv found: install one, or name it with PYTHON=/path/to/python." >&2; return 1; }
      "$python" -m venv .venv
    fi
    [ "$(uname -s)-$(uname -m)" != Linux-x86_64 ] || echo "(No uv: pip takes the torch that your index offers; if that is the CUDA build, add about 3 GB. With uv installed that cannot happen.)"
    .venv/bin/python -m pip install -q --disable-pip-version-check -c constraints.txt -e ".[$extras]"
  fi
  echo "$wanted" >"$stamp"
}
