# shellcheck shell=bash
# What the jobs of this folder have in common. Their scripts source it; they are submitted from the repository's folder, in
# which Slurm starts them (the script itself it copies elsewhere).
#
# Set in the shell that submits:
#   SBATCH_PARTITION, SBATCH_ACCOUNT, SBATCH_QOS, SBATCH_TIMELIMIT, SBATCH_GPUS_PER_NODE, ...
#             sbatch reads them itself ("INPUT ENVIRONMENT VARIABLES" in its manual). They go before the #SBATCH lines of a
#             script; options on the command line, in front of the script's name, go before both.
#   CONFIG    the config, where it is not the first argument.
#   ACTIVATE  a file to source before Python is called, with lines such as `module load cuda` or `conda activate clip`.
#             Default: the environment that is active where the job is submitted; without a virtual one, .venv.

refuse() {
  echo "$*" >&2
  exit 2
}

# start_job EXAMPLE: inside a job only.
start_job() {
  if [ -z "${SLURM_JOB_ID:-}" ]; then
    refuse "This script runs inside a Slurm job; submit it: $1"
  fi
  activate
  export PYTHONUNBUFFERED=1 PYTHONFAULTHANDLER=1
  # Since Slurm 22.05 srun no longer takes --cpus-per-task over from the job: all workers would share one core.
  export SRUN_CPUS_PER_TASK=${SLURM_CPUS_PER_TASK:-1}
  local job=${SLURM_ARRAY_JOB_ID:+${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID}
  echo "$(date '+%F %T') job ${job:-$SLURM_JOB_ID} (restart ${SLURM_RESTART_COUNT:-0}) on $SLURM_JOB_NODELIST: $(command -v python)"
}

activate() {
  if [ -n "${ACTIVATE:-}" ]; then
    # Files of others rarely bear `set -u`.
    set +u
    # shellcheck source=/dev/null
    . "$ACTIVATE" || refuse "ACTIVATE=$ACTIVATE failed: it has to be a file that this shell can source"
    set -u
  elif [ -z "${VIRTUAL_ENV:-}" ] && [ -f .venv/bin/activate ]; then
    # shellcheck source=/dev/null
    . .venv/bin/activate
  fi
  python -c 'import importlib.metadata; importlib.metadata.version("lightning_xai")' 2>/dev/null ||
    refuse "lightning_xai is not installed for $(command -v python || echo 'any python'): make the README's .venv, or name a" \
      "file that activates your environment, ACTIVATE=FILE"
}

# take_config [CONFIG] [OPTION...]: what to call a command with stands in `arguments` afterwards.
take_config() {
  if [ $# -gt 0 ] && [ "${1#-}" = "$1" ]; then
    CONFIG=$1
    shift
  fi
  if [ -z "${CONFIG:-}" ]; then
    refuse "No config: name it after the script, as its first argument, or set CONFIG"
  fi
  if [ ! -r "$CONFIG" ]; then
    refuse "The config $CONFIG cannot be read from $PWD: give its path from the folder in which you submit"
  fi
  arguments=(--config "$CONFIG" "$@")
}

# step COMMAND [ARGUMENT...]: one process of lightning_xai for each task of the job.
step() {
  # A rank that dies takes the job down at once; the others would wait for it until the time limit. They may also wait for
  # one that has ended as if all were well: ten minutes are for what the first rank writes and draws at the end.
  # `sbatch --export=NONE` would hold for srun, too: its tasks would not have the environment that was activated here.
  srun --export=ALL --kill-on-bad-exit=1 --wait=600 python -m lightning_xai "$@"
}

# Options of Lightning's Trainer: the devices are those of the job.
trainer_options() {
  echo "$SLURM_NNODES node(s) with $SLURM_NTASKS_PER_NODE task(s) each, $CONFIG"
  arguments+=(--trainer.num_nodes="$SLURM_NNODES" --trainer.devices="$SLURM_NTASKS_PER_NODE")
}
