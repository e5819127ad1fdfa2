"""Signals that ask a run to save and stop, in one process or in many."""

import contextlib
import signal
import threading
import time
from collections.abc import Callable, Iterator

import jax
import numpy as np
from jax.sharding import NamedSharding

from sae_jax.parallel.mesh import P as Spec
from sae_jax.parallel.processes import several

_REPEAT_SECONDS = 2.0  # in which a second signal is the first one's copy
_DEFAULT = {
  signal.SIGTERM: signal.SIG_DFL,
  signal.SIGINT: signal.default_int_handler,
  signal.SIGHUP: signal.SIG_DFL,  # a closed terminal; nohup has it ignored
}


@contextlib.contextmanager
def stop_signals() -> Iterator[Callable[[], int]]:
  """Gives a function that tells which of SIGTERM, SIGINT and SIGHUP came, or 0.

  In a job of several processes all call it as often as each other, under the
  job's mesh, and are told the same: one call late, what came to any of them.
  The same signal again kills, but not within a second or two: Slurm may send
  one to a process and to the parent that passes it on. Leaves alone what a
  caller has installed, and threads other than the main one, which cannot have
  handlers.
  """
  came: list[int] = []
  first = 0.0

  def note(number, frame):
    nonlocal first
    del frame
    if number not in came:
      came.append(number)
      first = time.monotonic()
    elif time.monotonic() - first > _REPEAT_SECONDS:
      signal.signal(number, _DEFAULT[number])
      signal.raise_signal(number)

  main = threading.current_thread() is threading.main_thread()
  ours = [s for s, f in _DEFAULT.items() if main and signal.getsignal(s) == f]
  for number in ours:
    signal.signal(number, note)
  here = lambda: came[0] if came else 0
  try:
    yield _in_any_process(here) if several() else here
  finally:
    for number in ours:
      signal.signal(number, _DEFAULT[number])


def _in_any_process(here: Callable[[], int]) -> Callable[[], int]:
  """The largest of all processes' `here()`, one call late.

  One number a device and a step, on the devices, between the steps: when it is
  read, the step before it has been waited for already. (JAX's own protocol
  counts the steps of all its callers, and Orbax's threads are among them: they
  make it miss steps.)
  """
  largest = jax.jit(lambda numbers: numbers.max())
  under_way: list[jax.Array] = []
  agreed = 0

  def asked() -> int:
    nonlocal agreed
    if under_way and not agreed:
      agreed = int(jax.device_get(under_way.pop()))
    if not agreed:
      number = np.full(1, here(), np.int32)
      mesh = jax.sharding.get_mesh()
      parts = [jax.device_put(number, d) for d in mesh.local_devices]
      sharding = NamedSharding(mesh, Spec(mesh.axis_names))
      under_way.append(
        largest(
          jax.make_array_from_single_device_arrays(
            (mesh.size,), sharding, parts
          )
        )
      )
    return agreed

  return asked
