#!/usr/bin/env bash
# tools/train.py in several processes:  bash tools/dist_train.sh CONFIG PROCESSES [ARGUMENTS...]   (see dist_run.sh)
set -euo pipefail

PRUNET_COMMAND=$(printf '%q ' bash "${BASH_SOURCE[0]}" "$@")
export PRUNET_COMMAND DIST_USAGE="tools/dist_train.sh CONFIG"
exec bash "$(dirname "${BASH_SOURCE[0]}")/dist_run.sh" train "${2:-}" "${1:-}" "${@:3}"
