#!/usr/bin/env bash
# Make the environment if needed, then search, train, detect and measure on the built-in digits:
# bash tools/quickstart.sh [arguments of tools/quickstart.py]
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
python=$(bash "$root/tools/setup_env.sh")
exec "$python" "$root/tools/quickstart.py" "$@" # no cd: a relative --work-dir is the caller's
