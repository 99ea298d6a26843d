#!/usr/bin/env bash
# Make the environment: .venv in the repository's root, with the package (editable), all extras and the tested versions.
# It needs Python >= 3.10 with pip, nothing else; a second call finds the stamp of the first and installs nothing.
# Prints the environment's Python on stdout; all messages go to stderr.
#
#   PRUNET_VENV=DIR          another place for the environment
#   PRUNET_PYTHON=PROGRAM    the Python to make it with
#   PRUNET_CONSTRAINTS=FILE  other pins than constraints.txt (a GPU that needs an older torch)
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
venv=${PRUNET_VENV:-$root/.venv}
case $venv in /*) ;; *) venv=$PWD/$venv ;; esac
venv=${venv%/}
constraints=${PRUNET_CONSTRAINTS:-$root/constraints.txt}
python=$venv/bin/python
stamp=$venv/.prunet_installed # holds the key of what is installed; written last
unfinished=$venv.unfinished   # there while an installation runs: if it is found, one was interrupted
log=$venv.log

say() { printf '%s\n' "setup: $*" >&2; }
fail() { printf '%s\n' "error: $*" >&2; exit 2; }

key() { # what the environment depends on, as one hash
  "$python" - "$root" "$constraints" <<'PY'
import hashlib, pathlib, sys
root, constraints = map(pathlib.Path, sys.argv[1:])
files = [root / "setup.py", root / "pyproject.toml", root / "prunet_zoo" / "version.py", constraints]
text = "\n".join([sys.version, str(root), *(f.read_text(encoding="utf-8") for f in files)])
print(hashlib.sha256(text.encode()).hexdigest())
PY
}

recent() { "$1" -c 'import sys; sys.exit(sys.version_info < (3, 10))' >/dev/null 2>&1; }

find_python() { # the first Python that is recent enough
  local name
  for name in ${PRUNET_PYTHON:-python3 python3.13 python3.12 python3.11 python3.10 python}; do
    if command -v "$name" >/dev/null 2>&1 && recent "$name"; then
      command -v "$name"
      return
    fi
  done
  local have
  have=$("${PRUNET_PYTHON:-python3}" --version 2>&1 | head -n 1) || have="none that runs"
  fail "Python 3.10 or newer is needed; ${PRUNET_PYTHON:-python3} is: $have." \
    "Install one, or name it: PRUNET_PYTHON=/path/to/python3.11 bash $0"
}

make_venv() { # $1: the Python to use
  say "making $venv with $("$1" --version) ($1)"
  if "$1" -c 'import ensurepip' >/dev/null 2>&1; then
    "$1" -m venv --clear "$venv"
  else # Debian ships Python without ensurepip: let the system's pip put one into the environment
    "$1" -m venv --clear --without-pip "$venv" || fail "'$1 -m venv' does not work; install python3-venv"
    "$1" -m pip --python "$python" install --quiet pip ||
      fail "$1 has neither ensurepip nor a pip >= 22.3; install python3-venv or a newer pip"
  fi
}

progress() { # pip's output → one line that changes on a terminal, a few lines elsewhere
  local line first=yes
  while IFS= read -r line; do
    case $line in
      ERROR:*)
        printf '\n%s\n' "$line" >&2
        continue
        ;;
      Collecting* | *Downloading* | "Installing collected"*) ;;
      *) continue ;;
    esac
    if [ -t 2 ]; then
      printf '\r\033[Ksetup: %.70s' "$line" >&2
    elif [ -n "$first" ] || [ "${line%%:*}" = "Installing collected packages" ]; then
      say "${line:0:70}…"
      first=""
    fi
  done
  if [ -t 2 ]; then printf '\r\033[K' >&2; fi
}

pip_install() {
  "$python" -m pip install --no-input --disable-pip-version-check --progress-bar off "$@" 2>&1 |
    tee -a "$log" | progress || fail "pip failed, nothing is lost: run the same command again. The whole output: $log"
}

use_headless_opencv() { # the usual OpenCV needs libGL and X libraries, which a bare server lacks
  local version
  version=$("$python" -c 'from importlib.metadata import version; print(version("opencv-python"))')
  say "OpenCV needs libraries that this machine lacks: taking opencv-python-headless $version instead"
  "$python" -m pip uninstall --quiet --yes opencv-python >>"$log" 2>&1
  pip_install --no-deps --force-reinstall "opencv-python-headless==$version"
}

check() { # everything that the tools import can be imported
  "$python" -c 'import torch, torchvision, timm, sklearn, onnx, onnxruntime, openvino, cv2, mmengine, mmcv, mmdet, pycocotools.mask, torch_pruning
import prunet_zoo' >>"$log" 2>&1 || fail "the environment does not import; the reason is at the end of $log"
}

is_current() {
  [ -x "$python" ] && [ -f "$stamp" ] && [ ! -e "$unfinished" ] && [ "$(cat "$stamp")" = "$(key)" ]
}

[ -f "$constraints" ] || fail "no such constraints file: $constraints"
if is_current; then
  echo "$python"
  exit 0
fi

mkdir -p "$(dirname "$venv")"
if command -v flock >/dev/null 2>&1; then # two calls at once: the second waits, then finds the work done
  exec 9>"$venv.lock"
  flock 9
  if is_current; then
    echo "$python"
    exit 0
  fi
fi

SECONDS=0
: >"$log"
origin=ours # whether this script made the environment: only then may it start over from nothing
if [ -e "$unfinished" ]; then
  origin=$(cat "$unfinished")
  say "an earlier installation was interrupted: repairing it"
elif [ -x "$python" ] && [ ! -f "$stamp" ]; then
  origin=given
fi
if [ ! -x "$python" ] || ! recent "$python" || { [ -e "$unfinished" ] && [ "$origin" != given ]; }; then
  if [ -d "$venv" ] && [ ! -e "$unfinished" ] && [ ! -e "$venv/pyvenv.cfg" ] && [ -n "$(ls -A "$venv")" ]; then
    fail "$venv exists and is no Python environment; move it away, or choose another place with PRUNET_VENV"
  fi
  host=$(find_python)
  echo ours >"$unfinished"
  make_venv "$host"
fi
echo "$origin" >"$unfinished"
rm -f "$stamp"
say "installing prunet_zoo and what it needs into $venv (about two minutes and 6 GB; log: $log)"
pip_install --constraint "$constraints" --editable "$root[all]"
"$python" -c 'import cv2' >>"$log" 2>&1 || use_headless_opencv
check
key >"$stamp.new"
mv "$stamp.new" "$stamp"
rm -f "$unfinished"
say "done in $SECONDS s"
echo "$python"
