"""Signals that ask a run to save and stop, in one process or in many."""

import contextlib
import itertools
import signal
import threading
from collections.abc import Callable, Iterator

from jax.experimental import multihost_utils

from sae_jax.parallel.processes import several

_DEFAULT = {
  signal.SIGTERM: signal.SIG_DFL,
  signal.SIGINT: signal.default_int_handler,
}


@contextlib.contextmanager
def stop_signals() -> Iterator[Callable[[], int]]:
  """Gives a function that tells which of SIGTERM and SIGINT came, or 0.

  The processes of a job call it as often as each other, and all are told at
  the same call that one of them was asked to stop (it is always SIGTERM then).
  The same signal again kills. Leaves alone what a caller has installed, and
  threads other than the main one, which cannot have handlers.
  """
  came: list[int] = []

  def note(number, frame):
    del frame
    signal.signal(number, _DEFAULT[number])
    if several():
      signal.raise_signal(signal.SIGTERM)
    else:
      came.append(number)

  # In a job JAX has a handler of SIGTERM in C++, which tells the other
  # processes through the coordinator, beside the running steps; one of
  # Python's would replace it.
  wanted = [signal.SIGINT] if several() else list(_DEFAULT)
  main = threading.current_thread() is threading.main_thread()
  ours = [s for s in wanted if main and signal.getsignal(s) == _DEFAULT[s]]
  for number in ours:
    signal.signal(number, note)
  calls = itertools.count()

  def asked() -> int:
    if several() and not came:
      if multihost_utils.reached_preemption_sync_point(next(calls)):
        came.append(signal.SIGTERM)
    return came[0] if came else 0

  try:
    yield asked
  finally:
    for number in ours:
      signal.signal(number, _DEFAULT[number])
