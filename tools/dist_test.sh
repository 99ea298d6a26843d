#!/usr/bin/env bash
# tools/test.py in several processes:  bash tools/dist_test.sh CONFIG CHECKPOINT PROCESSES [ARGUMENTS...]   (see dist_run.sh)
set -euo pipefail

PRUNET_COMMAND=$(printf '%q ' bash "${BASH_SOURCE[0]}" "$@")
export PRUNET_COMMAND DIST_USAGE="tools/dist_test.sh CONFIG CHECKPOINT"
exec bash "$(dirname "${BASH_SOURCE[0]}")/dist_run.sh" test "${3:-}" "${1:-}" "${2:-}" "${@:4}"
