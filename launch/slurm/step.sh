#!/usr/bin/env bash
# Runs a command as one step of a Slurm job, and decides what its end means:
#
#   exec bash launch/slurm/step.sh COMMAND...    in a batch script
#
# (exec: SIGTERM ends a shell that waits for it, and Slurm then kills the step.)
#
# 0 ends the job. 2 (the user's mistake) of any task ends it with 2, 1 (a bug:
# its traceback is in the output) of any task with 1, whatever the others ended
# with: they leave with 75 or 134 when they notice. Anything else (143 saved
# after SIGTERM, 75 another process died, 137 killed) puts the job back into the
# queue, SAE_MAX_RESTARTS times (default 100) at most; a job that was cancelled
# stays cancelled. The command must go on where it was stopped.
set -uo pipefail

# srun reports the highest exit code of all tasks; these two must be that.
BUG=251 MISTAKE=252
# A task passes signals on to its command: Slurm sends them to all processes of
# a step or, tracking them by cgroups, to its first ones only. SIGINT as SIGTERM:
# a command in the background ignores it.
# shellcheck disable=SC2016  # expanded by the tasks
TASK='trap : TERM INT; "$@" & p=$!; trap "kill -TERM $p" TERM INT
wait $p; rc=$?
while kill -0 $p 2>/dev/null; do wait $p; rc=$?; done
case $rc in 1) rc='$BUG' ;; 2) rc='$MISTAKE' ;; esac; exit $rc'
# For how long to ask a slurmctld that does not answer, every 5 s and more: it
# may restart, or a backup takes over after 120 s (SlurmctldTimeout).
PATIENCE=${SAE_SLURMCTLD_SECONDS:-150}

# When one task has ended, the others notice by themselves: they save, or exit
# with 75 after config.distributed.heartbeat_seconds. srun must not kill them.
export SLURM_KILL_BAD_EXIT=0
# Since 22.05 srun does not take this one from the job.
[ -z "${SLURM_CPUS_PER_TASK:-}" ] ||
  export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK

# glibc puts large arrays into huge pages: on CPUs a training step writes
# gigabytes of fresh ones, and is 10-30% faster. Other libcs ignore it.
export GLIBC_TUNABLES=${GLIBC_TUNABLES:-glibc.malloc.hugetlb=1}

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

case $rc in "$BUG") rc=1 ;; "$MISTAKE") rc=2 ;; esac
if [ $rc -le 2 ]; then exit $rc; fi
restarts=${SLURM_RESTART_COUNT:-0}
if [ "$restarts" -ge "${SAE_MAX_RESTARTS:-100}" ]; then
  echo "step.sh: exit code $rc after $restarts restarts: given up" >&2
  exit $rc
fi
# The first task of an array has the number of the whole array.
job=$SLURM_JOB_ID
[ -z "${SLURM_ARRAY_TASK_ID:-}" ] ||
  job=${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID
asked=$SECONDS
while [ $((SECONDS - asked)) -le "$PATIENCE" ]; do
  # No answer says nothing about the job. A requeue whose answer was lost has
  # changed its state.
  described=$(scontrol show job -o "$job")
  state=$(sed -n 's/.* JobState=\([A-Z_]*\).*/\1/p' <<<"$described")
  case "$state" in
    RUNNING) ;;
    '')
      sleep 5
      continue
      ;;
    *) # somebody cancelled or requeued it
      echo "step.sh: exit code $rc, the job is $state: left as it is"
      exit $rc
      ;;
  esac
  if [[ $described == *' Requeue=0 '* ]]; then
    echo "step.sh: exit code $rc, and no requeue allowed: submit it again" >&2
    exit $rc
  fi
  # Said before: a requeued job is killed.
  echo "step.sh: exit code $rc: back into the queue (restart $((restarts + 1)))"
  if scontrol requeue "$job"; then exit $rc; fi
  sleep 5
done
echo "step.sh: exit code $rc, and no answer from slurmctld: submit it again" >&2
exit $rc
