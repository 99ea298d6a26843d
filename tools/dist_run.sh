#!/usr/bin/env bash
# Run a tool in several processes of this machine (launch.py); dist_train.sh, dist_test.sh and dist_search.sh call this.
#
#   bash tools/dist_run.sh TOOL PROCESSES [ARGUMENTS...]      TOOL: train, test or search; PROCESSES: one for each GPU
#
# Without GPUs the processes talk over gloo and share the cores. Several machines: run it on each, with
#   NNODES=N  NODE_RANK=0..N-1  MASTER_ADDR=HOST_OF_THE_FIRST  PORT=29500
# PYTHON=PROGRAM is the interpreter (default: python).
set -euo pipefail

tools=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
if [ $# -lt 2 ] || [ ! -f "$tools/$1.py" ] || ! [[ $2 =~ ^[1-9][0-9]*$ ]]; then
  printf 'error: usage: bash %s PROCESSES (a number from 1 on), got: %s\n' \
    "${DIST_USAGE:-tools/dist_run.sh TOOL}" "${*:2}" >&2
  exit 2
fi
tool=$1 processes=$2
shift 2

nnodes=${NNODES:-1} node=${NODE_RANK:-0}
for number in "$nnodes" "$node" "${PORT:-1}"; do
  if ! [[ $number =~ ^[0-9]+$ ]]; then
    printf 'error: NNODES, NODE_RANK and PORT must be numbers, got: %s\n' "$number" >&2
    exit 2
  fi
done
where=()
if [ "$nnodes" -gt 1 ] || [ -n "${PORT:-}" ] || [ -n "${MASTER_ADDR:-}" ]; then
  where=(--nnodes "$nnodes" --node-rank "$node"
    --master-addr "${MASTER_ADDR:-127.0.0.1}" --master-port "${PORT:-29500}")
fi # else a free port, so two runs on one machine do not meet

# the tool's messages and records repeat this command
PRUNET_COMMAND=${PRUNET_COMMAND:-$(printf '%q ' bash "${BASH_SOURCE[0]}" "$tool" "$processes" "$@")}
export PRUNET_COMMAND
exec "${PYTHON:-python}" "$tools/launch.py" ${where[@]+"${where[@]}"} --processes "$processes" "$tools/$tool.py" "$@"
