#!/usr/bin/env bash
# Make the environment from requirements.lock: `bash scripts/setup.sh .venv`. Needs python3 (3.11 or 3.12) or uv.
# Every package, uv itself included, comes from the lock with its hash checked.
set -euo pipefail
venv=${1:-.venv}
here=$(cd "$(dirname "$0")/.." && pwd)
cd "$here"

die() { printf 'setup: %s\n' "$*" >&2; exit 1; }

supported_python() {
  for name in python3.11 python3.12 python3 python; do
    if command -v "$name" >/dev/null 2>&1 &&
      "$name" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] < (3, 13))' 2>/dev/null; then
      command -v "$name"
      return 0
    fi
  done
  return 1
}

bootstrap=$venv/.uv
uv=$(command -v uv || true)
if [ -z "$uv" ]; then
  python=$(supported_python) ||
    die "Python 3.11 or 3.12 is needed (found: $(python3 --version 2>&1 || echo none)). Install one, or install uv, which fetches its own."
  if [ ! -x "$bootstrap/bin/uv" ]; then
    echo "setup: installing uv into $bootstrap"
    mkdir -p "$venv"
    if ! "$python" -m venv "$bootstrap" >/tmp/fivefold-venv.$$ 2>&1; then
      cat /tmp/fivefold-venv.$$ >&2; rm -f /tmp/fivefold-venv.$$
      die "'$python -m venv' failed. On Debian and Ubuntu: apt-get install python3-venv; or install uv."
    fi
    rm -f /tmp/fivefold-venv.$$
    pin=$(awk '/^uv==/{found=1} found{print} found && !/\\$/{exit}' requirements.lock)
    printf '%s\n' "$pin" >"$bootstrap/uv.txt"
    "$bootstrap/bin/python" -m pip install --quiet --disable-pip-version-check --require-hashes -r "$bootstrap/uv.txt"
  fi
  uv=$bootstrap/bin/uv
fi

if [ ! -x "$venv/bin/python" ]; then
  echo "setup: creating $venv"
  if python=$(supported_python); then
    "$uv" venv --quiet --allow-existing --python "$python" "$venv"
  else
    "$uv" venv --quiet --allow-existing --python 3.11 "$venv"
  fi
fi
echo "setup: installing the locked packages (about 6 GB the first time, mostly torch's CUDA build)"
"$uv" pip sync --quiet --require-hashes --python "$venv/bin/python" requirements.lock
"$uv" pip install --quiet --no-deps --no-build-isolation --python "$venv/bin/python" --editable .
"$venv/bin/python" - <<'PY'
import torch, torchvision
print(f"setup: ready, torch {torch.__version__}, torchvision {torchvision.__version__}")
PY
