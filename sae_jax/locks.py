"""Locks of files, which keep other processes away: the one place for them.

They are flock's, which end with their process. Where a file system has no flock
SAE_JAX_LOCK=file in the environment of all programs takes links beside the
files instead, which name host and process. (POSIX locks would not do: Lustre
and NFS lack them where they lack flock.)
"""

import fcntl
import os
import socket
import time
from pathlib import Path

from absl import logging

from sae_jax.errors import UserError

HELD = '.held'  # ending of the links
_HOST, _ME = socket.gethostname(), str(os.getpid())
_links: dict[int, Path] = {}  # by the descriptors of this process


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
      os.close(descriptor)
      raise
    release(descriptor)


def release(descriptor: int) -> None:
  """Gives back what `take` gave."""
  if link := _links.pop(descriptor, None):
    link.unlink(missing_ok=True)
  os.close(descriptor)


def taken(path: Path) -> bool:
  """Whether a process has the file; writes nothing."""
  try:
    descriptor = os.open(path, os.O_RDONLY)
  except OSError:  # nobody has ever had it
    return False
  try:
    _lock(path, descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    return False
  except BlockingIOError:
    return True
  finally:
    os.close(descriptor)


def _lock(path: Path, descriptor: int, how: int) -> None:
  if os.environ.get('SAE_JAX_LOCK') == 'file':
    return _lock_by_link(path, descriptor, how)
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


def _lock_by_link(path: Path, descriptor: int, how: int) -> None:
  link = Path(os.path.realpath(path) + HELD)
  while True:
    if who := _holder(link):
      said = f' ({who}; if that process has ended, remove {link})'
      if how & fcntl.LOCK_NB:
        raise BlockingIOError(0, said)
      logging.log_every_n_seconds(
        logging.INFO, 'waiting for a lock%s', 30, said
      )
      time.sleep(0.2)
    elif how & fcntl.LOCK_SH:
      return
    elif _made(link):
      _links[descriptor] = link
      return
    elif _made(guard := link.with_name(link.name + HELD)) or not _holder(guard):
      # Left by a process that has ended. One at a time removes it, or the
      # second would remove the first one's new link.
      if not _holder(link):
        link.unlink(missing_ok=True)
      guard.unlink(missing_ok=True)


def _made(link: Path) -> bool:
  """Makes a link of this process; False: there is one."""
  try:  # with what it says at once, also over NFS
    os.symlink(f'{_HOST}:{_ME}', link)
    return True
  except FileExistsError:
    return False


def _holder(link: Path) -> str:
  """The host:process that has a link; '': it has ended, for what this host can
  tell, or there is none."""
  try:
    found = os.readlink(link)
    host, _, process = found.rpartition(':')
    if host == _HOST and link not in _links.values():
      os.kill(int(process), 0)
      # A container's processes have the numbers of those before.
      return '' if process == _ME else found
  except (FileNotFoundError, ProcessLookupError):
    return ''
  except PermissionError:  # another user's
    pass
  return found
