"""What can be wrong with the folder a store is written in, said in one line.

Another harvest's store, somebody's own files, a second writer, a full disk.
"""

import contextlib
import errno
import fcntl
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from sae_jax.errors import UserError
from sae_jax.store.manifest import FILE, SEQUENCES, Manifest, read_manifest
from sae_jax.store.plan import differences


def check_folder(root: Path, manifest: Manifest) -> None:
  """UserError when the folder holds another harvest's store, or no store."""
  if (root / FILE).exists():
    old = read_manifest(root, complete=False)
    if keys := differences(old, manifest):
      raise another_harvest(root, keys)
  elif root.exists():
    # A run killed before its manifest leaves sequences and temporary files.
    names = {path.name for path in root.iterdir()} if root.is_dir() else {'.'}
    other = {n for n in names if n != SEQUENCES and not n.endswith('.tmp')}
    if other:
      raise UserError(
        f'store.path: {root} is not an empty folder and holds no store: give '
        'another one'
      )


def another_harvest(root: Path, keys: list[str]) -> UserError:
  """The mistake of harvesting into the store of another config."""
  return UserError(
    f'store.path: {root} holds the store of another harvest; different: '
    f'{", ".join(keys)}: set them back, give another folder or delete this one'
  )


@contextlib.contextmanager
def disk_errors_are_users(root: Path) -> Iterator[None]:
  """Turns the errors of a disk that is full or read-only into a UserError."""
  try:
    yield
  except OSError as error:
    if error.errno not in (
      errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS, errno.EPERM,
      errno.ENOTDIR,
    ):  # fmt: skip
      raise
    raise UserError(
      f'store.path: cannot write in {root} ({error.strerror}): make room or '
      'give another folder, then run the same harvest again'
    ) from error


def lock(root: Path) -> int:
  """An exclusive lock on the folder, held until the descriptor is closed."""
  descriptor = os.open(root, os.O_RDONLY)
  try:
    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
  except BlockingIOError:
    os.close(descriptor)
    raise UserError(
      f'store.path: another harvest is writing in {root}: wait for it'
    ) from None
  return descriptor


def allocate(path: Path, size: int) -> None:
  """Makes a file of that size, with its blocks where the system can.

  A full disk must be an error here: in a mapped file it would be a SIGBUS.
  """
  with open(path, 'wb') as file:
    if hasattr(os, 'posix_fallocate'):  # not on macOS
      os.posix_fallocate(file.fileno(), 0, size)
    else:
      os.truncate(file.fileno(), size)


def check_space(root: Path, manifest: Manifest, missing: list[int]) -> None:
  """UserError when the shards to come do not fit on the disk."""
  needed = sum(
    file.bytes for s in missing for file in manifest.shards[s].files.values()
  )
  free = shutil.disk_usage(root).free
  if needed > free:
    raise UserError(
      f'store.path: {needed / 1e9:,.1f} GB to write, {free / 1e9:,.1f} GB free '
      f'at {root}: make room, lower harvest.rows or give another folder'
    )
