"""Several processes as one job: the only place that calls jax.distributed."""

import contextlib
import functools
import json
import os
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import jax
import numpy as np
from absl import flags, logging
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from sae_jax import cli
from sae_jax.config import Config
from sae_jax.errors import UserError
from sae_jax.parallel.mesh import DATA

# What a job that lost a process exits with: the same command goes on (the
# EX_TEMPFAIL of sysexits.h).
TRY_AGAIN = 75
# Processes have unequal shares of the work: at its end one waits for the others
# as long as they live. (JAX's default, 300 s, would then abort them all.)
_FOREVER = 1_000_000
# For a process that fails to end in order: all fail together, or it waits.
_GRACE_SECONDS = 5
# Errors of the runtime that are not another process's.
_OURS = ('RESOURCE_EXHAUSTED', 'INVALID_ARGUMENT', 'UNIMPLEMENTED')

R = TypeVar('R')


def define_flags() -> Callable[[Config], contextlib.AbstractContextManager]:
  """Defines the flags that make a program in launch/ one of several processes.

  Returns job(config): the job that they and config.distributed describe, for
  as long as this process works in it (start_processes, ends_its_job).
  """
  coordinator = flags.DEFINE_string(
    'coordinator', '', "host:port of process 0, 'auto' on Slurm, GKE or a TPU."
  )
  processes = flags.DEFINE_integer('processes', 1, 'How many there are.')
  process_id = flags.DEFINE_integer('process_id', 0, 'Which one this is.')

  @contextlib.contextmanager
  def job(config: Config) -> Iterator[None]:
    start_processes(
      coordinator.value,
      processes.value,
      process_id.value,
      heartbeat_seconds=config.distributed.heartbeat_seconds,
      start_seconds=config.distributed.start_seconds,
    )
    with ends_its_job():
      yield

  return job


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
  given = f'--processes={processes}' if processes != 1 else ''
  if not given and process_id != 0:
    given = f'--process_id={process_id}'
  if not coordinator:
    if given:
      raise UserError(f'{given}: give --coordinator=HOST:PORT of process 0 too')
    return
  if coordinator == 'auto':
    if given:
      raise UserError(
        f'{given}: --coordinator=auto takes it from the cluster: leave it out, '
        'or give --coordinator=HOST:PORT'
      )
  elif not 0 <= process_id < processes:
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
  # Its C++ handler of SIGTERM would swallow the signal: train/stopping.py has
  # our own.
  jax.config.update('jax_enable_preemption_service', False)
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
  cure = 'the same --coordinator and --processes'
  if coordinator == 'auto':  # before all are there nobody has a number
    whom = 'not all processes found each other'
    cure = "the same command, and look whether the job's other hosts are up"
  elif process_id == 0:
    whom = 'not all processes are there'
  logging.flush()
  print(
    f'error: --coordinator={coordinator}: {whom} after {seconds} s '
    '(config.distributed.start_seconds): start all processes of the job with '
    f'{cure}',
    file=sys.stderr,
    flush=True,
  )
  os._exit(TRY_AGAIN)


def several() -> bool:
  """Whether this process has others beside it. Asks for no device if not."""
  return jax.distributed.is_initialized() and jax.process_count() > 1


def is_first() -> bool:
  """Whether this process speaks and writes for its job."""
  return not several() or jax.process_index() == 0


def agreed(work: Callable[[], R]) -> R:
  """What `work` gives here; all processes call this together.

  A UserError of one process (or an OSError of that kind) ends all: the others
  raise one that names it.
  """
  result, error = None, None
  try:
    result = work()
  except (UserError, OSError) as mistake:
    error = cli.mistake_of(mistake) or mistake
    if not isinstance(error, UserError):
      raise
  if several():
    failed = _gather(np.array(error is not None))
    if error is None and failed.any():
      raise UserError(
        f'process {failed.argmax()} of this job stopped: see there'
      )
  if error is not None:
    raise error
  return result  # type: ignore[return-value]


def from_first(values: np.ndarray) -> np.ndarray:
  """Process 0's `values`, of the same shape (and at most 32 bits) in all."""
  with jax.transfer_guard('allow'):
    return np.asarray(multihost_utils.broadcast_one_to_all(values))


def _gather(value: np.ndarray) -> np.ndarray:
  with jax.transfer_guard('allow'):
    return np.asarray(multihost_utils.process_allgather(value))


def check_same(values: dict[str, Any]) -> None:
  """UserError, in all processes, unless they have the same values (JSON)."""
  if not several():
    return
  count, local = jax.process_count(), jax.local_device_count()
  if count * local != jax.device_count():
    raise UserError(
      f'process {jax.process_index()} has {local} of {jax.device_count()} '
      f'devices: all {count} processes of a job must have as many'
    )
  mine = np.frombuffer(json.dumps(values).encode(), np.uint8)
  size = int(from_first(np.array(len(mine), np.int32)))
  text = from_first(np.resize(mine, size))
  first = json.loads(text.tobytes())

  def compare() -> None:
    for key in sorted(values.keys() | first.keys()):
      a, b = values.get(key), first.get(key)
      if json.dumps(a) != json.dumps(b):
        raise UserError(
          f'{key} is {a!r} in process {jax.process_index()} and {b!r} in '
          'process 0: start all processes of a job with the same flags'
        )

  agreed(compare)


def data_parts(mesh: Mesh) -> tuple[list[int], int]:
  """([p, ...], P): of every batch this process needs the p-th P-ths.

  P is the size of `data`. Processes that differ only in `dict` need the same;
  on the torus of a TPU a process's devices are seldom one run of the axis.
  """
  lines = np.moveaxis(mesh.devices, mesh.axis_names.index(DATA), 0)
  me = jax.process_index()
  parts = [
    i
    for i, line in enumerate(lines)
    if any(device.process_index == me for device in line.flat)
  ]
  return parts, len(lines)


@contextlib.contextmanager
def ends_its_job() -> Iterator[None]:
  """Around all a process does in its job: when it fails, so does the job.

  The others would wait for it in collectives, and it for them in JAX's
  shutdown: after an error of its own it is gone in seconds.
  """
  try:
    with dies_with_its_job():
      yield
  except UserError as error:
    if not several():
      raise
    _leave_soon(2)
    cli.stop(f'process {jax.process_index()}: {error}')
  except KeyboardInterrupt:
    _leave_soon(130)
    raise


@contextlib.contextmanager
def dies_with_its_job() -> Iterator[None]:
  """Around what needs the other processes, inside of what waits for them at
  its end: when one of them died, a collective fails, and this one ends at once
  with one line and exit code 75. Raises UserError for what the disk did."""
  try:
    yield
  except UserError:
    raise
  except Exception as error:
    if not several():
      raise
    if mistake := cli.mistake_of(error):
      raise mistake from error
    i, count = jax.process_index(), jax.process_count()
    if not isinstance(error, jax.errors.JaxRuntimeError) or any(
      status in str(error) for status in _OURS
    ):
      traceback.print_exc()
      logging.error('process %d of %d failed', i, count)
      _leave(1)
    logging.error(
      'process %d of %d: another process of the job died or is out of reach '
      '(%s). Start the whole job again: it goes on from its last checkpoint',
      i, count, str(error).splitlines()[0],
    )  # fmt: skip
    _leave(TRY_AGAIN)


def _leave_soon(code: int) -> None:
  """Ends this process in a few seconds if it has not ended by itself."""
  if several():
    limit = threading.Timer(_GRACE_SECONDS, _leave, (code,))
    limit.daemon = True
    limit.start()


def _leave(code: int) -> None:
  logging.flush()
  sys.stderr.flush()
  os._exit(code)
