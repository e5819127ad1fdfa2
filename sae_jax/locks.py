"""Locks of files: flock's, which end with their process. Where there is none
SAE_JAX_LOCK=file in the environment of all programs takes files beside those
that name process and host. (Where Lustre and NFS lack flock they lack POSIX
locks too.)
"""

import contextlib
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
    with contextlib.ExitStack() as undo:
      undo.callback(release, descriptor)
      _lock(path, descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
      with contextlib.suppress(FileNotFoundError):
        if os.path.samestat(os.fstat(descriptor), path.stat()):
          undo.pop_all()
          return descriptor
    # Renamed or deleted just now: try again.


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
    return _lock_by_file(f'{path}{HELD}', descriptor, how)
  try:
    fcntl.flock(descriptor, how)
  except BlockingIOError:
    raise BlockingIOError(0, '') from None
  except OSError as error:
    raise UserError(
      f'{path}: no flock on this file system ({error.strerror}): set SAE_JAX_'
      'LOCK=file for all programs that use the folder, or take another one'
    ) from None


def _lock_by_file(name: str, descriptor: int, how: int) -> None:
  from filelock import SoftFileLock, Timeout  # 40 ms

  # What a process of this host has left that has ended is taken over.
  lock = SoftFileLock(name, thread_local=False)
  try:
    lock.acquire(timeout=0.2)
  except Timeout:
    said = f' (its host and number are in {name}: remove that if it has ended)'
    if how & fcntl.LOCK_NB:
      raise BlockingIOError(0, said) from None
    logging.info('waiting for another process%s', said)
    lock.acquire()
  _held[descriptor] = lock
