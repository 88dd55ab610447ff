#!/usr/bin/env bash
# Make the environment from requirements.lock: `bash .ci/setup.sh .venv`. Needs uv, or any Python from 3.8 on to get uv
# with; where no Python 3.11 or 3.12 is found, uv fetches a 3.11. Every package, uv itself included, comes from the lock with
# its hash checked.
set -euo pipefail
venv=${1:-.venv}
here=$(cd "$(dirname "$0")/.." && pwd)
cd "$here"

die() { printf 'setup: %s\n' "$*" >&2; exit 1; }

# The first Python that is at least "$1" and below "$2", both written like "3, 11".
find_python() {
  for name in python3.11 python3.12 python3 python; do
    if command -v "$name" >/dev/null 2>&1 &&
      "$name" -c "import sys; sys.exit(not ($1) <= sys.version_info[:2] < ($2))" 2>/dev/null; then
      command -v "$name"
      return 0
    fi
  done
  return 1
}

# Take uv's wheel from the package index that pip or uv is set to use here, if its hash is one of the lock's. For a Python that
# has neither venv nor pip.
fetch_uv() {
  "$1" - "$bootstrap" <<'PY'
import configparser, hashlib, io, os, platform, re, sys, urllib.parse, urllib.request, zipfile

config = configparser.RawConfigParser()
homes = ["/etc/pip.conf", "~/.pip/pip.conf", os.path.join(os.environ.get("XDG_CONFIG_HOME", "~/.config"), "pip", "pip.conf")]
config.read([os.path.expanduser(file) for file in [*homes, os.environ.get("PIP_CONFIG_FILE", "")]])
asked = [os.environ.get(name) for name in ("UV_DEFAULT_INDEX", "UV_INDEX_URL", "PIP_INDEX_URL")]
index = next(filter(None, asked), None) or config.get("global", "index-url", fallback="")
if not index:
    sys.exit("no package index is configured")
pin = open(os.path.join(sys.argv[1], "uv.txt")).read()
version, hashes = re.search(r"uv==([^\s;]+)", pin).group(1), set(re.findall(r"sha256:([0-9a-f]{64})", pin))
family = "macosx" if sys.platform == "darwin" else "manylinux" if platform.libc_ver()[0] == "glibc" else "musllinux"
page = urllib.request.Request(index.rstrip("/") + "/uv/", headers={"Accept": "text/html"})
with urllib.request.urlopen(page, timeout=60) as answer:
    base, links = answer.geturl(), re.findall(r'href="([^"]+)"', answer.read().decode())
for link in links:
    name = urllib.parse.unquote(link.split("#")[0].rsplit("/", 1)[-1])
    if name.startswith("uv-%s-py3-" % version) and family in name and name.endswith("_%s.whl" % platform.machine()):
        with urllib.request.urlopen(urllib.parse.urljoin(base, link.split("#")[0]), timeout=600) as answer:
            wheel = answer.read()
        if hashlib.sha256(wheel).hexdigest() not in hashes:
            sys.exit("%s does not have the locked hash" % name)
        os.makedirs(os.path.join(sys.argv[1], "bin"), exist_ok=True)
        with open(os.path.join(sys.argv[1], "bin", "uv"), "wb") as file:
            file.write(zipfile.ZipFile(io.BytesIO(wheel)).read("uv-%s.data/scripts/uv" % version))
        os.chmod(file.name, 0o755)
        sys.exit()
sys.exit("the index has no uv %s for this machine" % version)
PY
}

bootstrap=$venv/.uv
uv=$(command -v uv || true)
if [ -z "$uv" ]; then
  python=$(find_python "3, 8" "4, 0") || die "uv, or some Python from 3.8 on to get uv with, is needed. Install one of them."
  if [ ! -x "$bootstrap/bin/uv" ]; then
    echo "setup: installing uv into $bootstrap"
    rm -rf "$bootstrap"
    mkdir -p "$bootstrap"
    awk '/^uv==/{found=1} found{print} found && !/\\$/{exit}' requirements.lock >"$bootstrap/uv.txt"
    pip_install=(-m pip install --quiet --disable-pip-version-check --require-hashes -r "$bootstrap/uv.txt")
    if "$python" -m venv "$bootstrap" >"$bootstrap/log.txt" 2>&1; then
      "$bootstrap/bin/python" "${pip_install[@]}"
    elif rm -rf "$bootstrap/bin" && "$python" -m pip --version >/dev/null 2>&1; then
      "$python" "${pip_install[@]}" --target "$bootstrap"
    else
      fetch_uv "$python" ||
        die "uv cannot be fetched: $python has neither venv nor pip. On Debian and Ubuntu: apt-get install python3-venv; or install uv."
    fi
  fi
  uv=$bootstrap/bin/uv
fi

if [ ! -x "$venv/bin/python" ]; then
  echo "setup: creating $venv"
  python=$(find_python "3, 11" "3, 13") || python=3.11
  "$uv" venv --quiet --allow-existing --python "$python" "$venv"
fi
# compiled here once: where PYTHONDONTWRITEBYTECODE is set, every process would compile everything it imports again
echo "setup: installing the locked packages (about 6 GB the first time, mostly torch's CUDA build)"
"$uv" pip sync --quiet --compile-bytecode --require-hashes --python "$venv/bin/python" requirements.lock
"$uv" pip install --quiet --no-deps --no-build-isolation --python "$venv/bin/python" --editable .
"$venv/bin/python" - <<'PY'
import torch, torchvision
print(f"setup: ready, torch {torch.__version__}, torchvision {torchvision.__version__}")
PY
