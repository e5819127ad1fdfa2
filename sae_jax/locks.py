"""Locks of files, which keep other processes away: the one place for them.

They are flock's, which end with their process. Where a file system has no flock
SAE_JAX_LOCK=file in the environment of all programs takes files beside those
instead, which name host and process. (POSIX locks would not do: Lustre and NFS
lack them where they lack flock.)
"""

import fcntl
import os
from pathlib import Path
from typing import Any

from absl import logging

from sae_jax.errors import UserError

HELD = '.held'  # ending of those files
_held: dict[int, Any] = {}  # by descriptor


def take(path: Path, wait: bool = False) -> int:
  """Makes or takes over a file, alone, until `release` of the descriptor that
  it returns, or, of a flock, until no process has that any more.

  Raises BlockingIOError while another process has it and there is no `wait`,
  whose strerror is what is known of that; UserError where there is no flock.
  """
  while True:
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
      _lock(path, descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
      # Renamed or deleted just now: try again.
      if os.path.samestat(os.fstat(descriptor), path.stat()):
        return descriptor
    except FileNotFoundError:
      pass
    except BaseException:
      release(descriptor)
      raise
    release(descriptor)


def release(descriptor: int) -> None:
  """Gives back what `take` gave."""
  if descriptor in _held:
    _held.pop(descriptor).release()
  os.close(descriptor)


def taken(path: Path) -> bool:
  """Whether a process has the file."""
  try:
    descriptor = os.open(path, os.O_RDONLY)
  except OSError:  # nobody has ever had it
    return False
  try:
    _lock(path, descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
  except BlockingIOError:
    return True
  finally:
    release(descriptor)
  return False


def _lock(path: Path, descriptor: int, how: int) -> None:
  if os.environ.get('SAE_JAX_LOCK') == 'file':
    return _lock_by_file(f'{path}{HELD}', descriptor, bool(how & fcntl.LOCK_NB))
  try:
    fcntl.flock(descriptor, how)
  except BlockingIOError:
    raise BlockingIOError(0, '') from None
  except OSError as error:
    raise UserError(
      f'{path}: no locks on this file system (flock: {error.strerror}): set '
      'SAE_JAX_LOCK=file for all programs that use the folder (lock files), or '
      'take another one'
    ) from None


def _lock_by_file(name: str, descriptor: int, at_once: bool) -> None:
  # It takes over what a process of this host has left that has ended.
  from filelock import SoftFileLock, Timeout  # 40 ms

  lock = SoftFileLock(name, thread_local=False)
  try:
    lock.acquire(timeout=0.2)
  except Timeout:
    said = f' (its host and number are in {name}: remove that if it has ended)'
    if at_once:
      raise BlockingIOError(0, said) from None
    logging.info('waiting for another process%s', said)
    lock.acquire()
  _held[descriptor] = lock
