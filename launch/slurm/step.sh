#!/usr/bin/env bash
# Runs a command as one step of a Slurm job, and decides what its end means:
#
#   exec bash launch/slurm/step.sh COMMAND...    in a batch script
#
# (exec: SIGTERM ends a shell that waits for it, and Slurm then kills the step.)
#
# 0 and 1 (a bug: its traceback is in the output) end the job with that code, 2
# (the user's mistake) too, whatever the other tasks of the step ended with.
# Anything else (143 saved after SIGTERM, 75 another process died, 137 killed)
# puts the job back into the queue, SAE_MAX_RESTARTS times (default 100) at
# most; a job that was cancelled stays cancelled. The command must go on where
# it was stopped.
set -uo pipefail

# srun reports the highest exit code of all tasks; a mistake must be that.
MISTAKE=252
# shellcheck disable=SC2016  # expanded by the tasks
TASK='trap : TERM INT; "$@"; rc=$?; [ $rc != 2 ] || rc='$MISTAKE'; exit $rc'

# When one task has ended, the others notice by themselves: they save, or exit
# with 75 after config.distributed.heartbeat_seconds. srun must not kill them.
export SLURM_KILL_BAD_EXIT=0
# Since 22.05 srun does not take this one from the job.
[ -z "${SLURM_CPUS_PER_TASK:-}" ] ||
  export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK

# A signal is for the tasks, which Slurm sends it too; this script waits.
trap : TERM INT
srun bash -c "$TASK" task "$@" &
step=$!
wait $step
rc=$?
while kill -0 $step 2>/dev/null; do # a signal has ended the wait
  wait $step
  rc=$?
done

[ $rc != $MISTAKE ] || rc=2
if [ $rc -le 2 ]; then exit $rc; fi
# The first task of an array has the number of the whole array.
job=$SLURM_JOB_ID
[ -z "${SLURM_ARRAY_TASK_ID:-}" ] ||
  job=${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID
state=$(scontrol show job -o "$job" |
  sed -n 's/.* JobState=\([A-Z_]*\).*/\1/p')
restarts=${SLURM_RESTART_COUNT:-0}
if [ "$state" != RUNNING ]; then # somebody cancelled or requeued it
  echo "step.sh: exit code $rc, the job is $state: left as it is"
  exit $rc
fi
if [ "$restarts" -ge "${SAE_MAX_RESTARTS:-100}" ]; then
  echo "step.sh: exit code $rc after $restarts restarts: given up" >&2
  exit $rc
fi
echo "step.sh: exit code $rc: back into the queue (restart $((restarts + 1)))"
scontrol requeue "$job"
exit $rc
