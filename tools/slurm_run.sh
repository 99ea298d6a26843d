#!/usr/bin/env bash
# Run a tool as a job step of Slurm; slurm_train.sh and slurm_search.sh call this.
#
#   bash tools/slurm_run.sh TOOL PARTITION JOB_NAME CONFIG WORK_DIR [ARGUMENTS...]      TOOL: train or search
#
# As in mmdet's scripts:  GPUS=8  GPUS_PER_NODE=8 (never more than GPUS)  CPUS_PER_TASK=5  SRUN_ARGS="..."
# GRES= (empty) asks for no GPUs: GPUS processes on CPU.  PYTHON=PROGRAM is the interpreter (default: python).
set -euo pipefail

tools=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
if [ $# -lt 5 ] || [ ! -f "$tools/$1.py" ]; then
  printf 'error: usage: bash tools/slurm_%s.sh PARTITION JOB_NAME CONFIG WORK_DIR [ARGUMENTS...]\n' "${1:-run}" >&2
  exit 2
fi
tool=$1 partition=$2 name=$3 config=$4 work_dir=$5
arguments=("${@:6}")

gpus=${GPUS:-8}
per_node=${GPUS_PER_NODE:-8}
cpus=${CPUS_PER_TASK:-5}
for number in "$gpus" "$per_node" "$cpus"; do
  if ! [[ $number =~ ^[1-9][0-9]*$ ]]; then
    printf 'error: GPUS, GPUS_PER_NODE and CPUS_PER_TASK must be numbers from 1 on, got: %s\n' "$number" >&2
    exit 2
  fi
done
if ! command -v srun >/dev/null; then
  printf 'error: srun is not on PATH: this is no machine of a Slurm cluster; on one machine use tools/dist_%s.sh\n' "$tool" >&2
  exit 2
fi
if [ "$per_node" -gt "$gpus" ]; then per_node=$gpus; fi
gres=${GRES-gpu:$per_node}
asked=(--partition "$partition" --job-name "$name" --ntasks "$gpus" --ntasks-per-node "$per_node"
  --cpus-per-task "$cpus" --kill-on-bad-exit 1)
if [ -n "$gres" ]; then asked+=(--gres "$gres"); fi
read -r -a more <<<"${SRUN_ARGS:-}"

# the tool's messages and records repeat this command
settings=()
for key in GPUS GPUS_PER_NODE CPUS_PER_TASK GRES SRUN_ARGS; do
  if [ -n "${!key+x}" ]; then settings+=("$key=${!key}"); fi
done
PRUNET_COMMAND=$(printf '%q ' env ${settings[@]+"${settings[@]}"} bash "$tools/slurm_$tool.sh" \
  "$partition" "$name" "$config" "$work_dir" ${arguments[@]+"${arguments[@]}"})
export PRUNET_COMMAND
exec srun "${asked[@]}" ${more[@]+"${more[@]}"} "${PYTHON:-python}" -u "$tools/$tool.py" "$config" \
  --work-dir "$work_dir" --launcher slurm ${arguments[@]+"${arguments[@]}"}
