"""Several processes as one job: the only place that calls jax.distributed."""

import functools
import os
import sys
import threading

import jax
from absl import logging

from sae_jax.errors import UserError

# What a job that lost a process exits with: the same command goes on (the
# EX_TEMPFAIL of sysexits.h).
TRY_AGAIN = 75
# Processes have unequal shares of the work: at its end one waits for the others
# as long as they live. (JAX's default, 300 s, would then abort them all.)
_FOREVER = 1_000_000


def start_processes(
  coordinator: str,
  processes: int,
  process_id: int,
  *,
  heartbeat_seconds: int = 100,
  start_seconds: int = 300,
) -> None:
  """Joins this process to its job, before any device is asked for.

  coordinator: host:port of process 0; 'auto' takes all three from the cluster
  (Slurm, GKE, TPU slices); '' means that this process is alone.
  heartbeat_seconds: a process silent for so long is taken for dead, and all
  others end. start_seconds: how long to wait for all to be there.

  Raises UserError for numbers that do not fit together. Ends the process with
  one line and exit code 75 when the others do not come.
  """
  if not coordinator:
    if processes != 1:
      raise UserError(
        f'--processes={processes}: give --coordinator=HOST:PORT of process 0 '
        'too'
      )
    return
  if coordinator != 'auto' and not 0 <= process_id < processes:
    raise UserError(
      f'--process_id={process_id}: must be below --processes={processes}'
    )
  # JAX's own time limit aborts the process with a C++ trace (exit code 134),
  # which Python cannot catch; so ours comes first.
  limit = threading.Timer(
    start_seconds, _nobody_there, (coordinator, process_id, start_seconds)
  )
  limit.daemon = True
  limit.start()
  join = functools.partial(
    jax.distributed.initialize,
    initialization_timeout=start_seconds + 60,
    heartbeat_timeout_seconds=heartbeat_seconds,
    shutdown_timeout_seconds=_FOREVER,
  )
  try:
    if coordinator == 'auto':
      join()
    else:
      join(coordinator, processes, process_id)
  except (RuntimeError, ValueError) as error:
    if coordinator == 'auto':
      raise UserError(
        f'--coordinator=auto: this is no Slurm, GKE or TPU job that JAX knows '
        f'({error}): give --coordinator=HOST:PORT, --processes, --process_id'
      ) from error
    raise UserError(
      f'--coordinator={coordinator}: the processes of this job did not find '
      f'each other ({error}): is process 0 running there?'
    ) from error
  finally:
    limit.cancel()


def _nobody_there(coordinator: str, process_id: int, seconds: int) -> None:
  """Ends this process, whose main thread waits in C++."""
  whom = 'process 0 does not answer'
  if process_id == 0:
    whom = 'not all processes are there'
  logging.flush()
  print(
    f'error: --coordinator={coordinator}: {whom} after {seconds} s '
    '(config.distributed.start_seconds): start all processes of the job with '
    'the same --coordinator and --processes',
    file=sys.stderr,
    flush=True,
  )
  os._exit(TRY_AGAIN)
