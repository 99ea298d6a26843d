#!/usr/bin/env bash
# Make the environment if needed, then run the tests: bash tools/run_tests.sh [pytest arguments]
# The slow ones are left out unless asked for: bash tools/run_tests.sh -m slow
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
python=$(bash "$root/tools/setup_env.sh")
cd "$root"
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} # tiny networks: a second thread only waits
export MPLBACKEND=Agg
[ $# -gt 0 ] || set -- -n 2 --dist loadfile # all of them: in two processes
exec "$python" -m pytest -q "$@"
