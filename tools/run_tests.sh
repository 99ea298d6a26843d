#!/usr/bin/env bash
# Make the environment if needed, then run the tests: bash tools/run_tests.sh [pytest arguments]
# The slow ones are left out unless asked for: bash tools/run_tests.sh -m slow
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
python=$(bash "$root/tools/setup_env.sh")
cd "$root"
cores=$(getconf _NPROCESSORS_ONLN 2>/dev/null || echo 2)
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((cores < 4 ? cores : 4))} # small networks: more threads only wait
export MPLBACKEND=Agg
exec "$python" -m pytest -q "$@"
