#!/usr/bin/env bash
# ROAR+ as jobs that wait for each other: explain, retrain in an array (one trial a task), gather. From the repository's folder:
#
#   slurm/roar.sh [options of sbatch, as --time=02:00:00] configs/roar_paper.yaml [options of `python -m lightning_xai roar`]
#
# Prints the numbers of the jobs. Trials that are done are left out, so that the same line submits again what has failed or
# ran out of time. PARALLEL is how many trials run at a time (default 8); the other variables: slurm/common.sh.

set -euo pipefail
. slurm/common.sh || { echo "Call it from the repository's folder: $PWD has no slurm/common.sh" >&2; exit 2; }

# Where the first job fails, the array would wait for it for ever.
submit=(sbatch --parsable --kill-on-invalid-dep=yes)
while [ $# -gt 0 ] && [ "${1#-}" != "$1" ]; do
  submit+=("$1")
  shift
done
take_config "$@"
activate

trials=$(python -m lightning_xai roar "${arguments[@]}" --list-trials)
to_do=$(awk '/ to do$/ { print $1 }' <<<"$trials" | paste -sd, -)
echo "$(wc -l <<<"$trials") trials, to do: ${to_do:-none}"
after=()
if [ -n "$to_do" ]; then
  prepare=$("${submit[@]}" slurm/roar_prepare.sbatch "$@")
  prepare=${prepare%%;*} # "number;cluster" where there are several clusters
  echo "explain: job $prepare"
  array=$("${submit[@]}" --dependency="afterok:$prepare" --array="$to_do%${PARALLEL:-8}" slurm/roar_array.sbatch "$@")
  array=${array%%;*}
  echo "retrain: job array $array"
  after=(--dependency="afterany:$array")
fi
echo "gather: job $("${submit[@]}" ${after[@]+"${after[@]}"} slurm/roar_gather.sbatch "$@")"
