#!/usr/bin/env bash
# tools/search.py on Slurm:  bash tools/slurm_search.sh PARTITION JOB_NAME CONFIG WORK_DIR [ARGUMENTS...]   (see slurm_run.sh)
set -euo pipefail

exec bash "$(dirname "${BASH_SOURCE[0]}")/slurm_run.sh" search "$@"
