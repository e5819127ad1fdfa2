"""What can be wrong with the folder a store is written in, said in one line.

Another harvest's store, somebody's own files, a second writer, a full disk.
"""

import contextlib
import os
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

from absl import logging

from sae_jax import cli, locks
from sae_jax.errors import UserError
from sae_jax.store.manifest import (
  FILE,
  KEEP,
  SEQUENCES,
  Manifest,
  read_manifest,
  shard_bytes,
)
from sae_jax.store.plan import differences

LOCK = 'lock'  # empty; see `locked`


def check_folder(root: Path) -> None:
  """UserError when the folder holds something that is not a store."""
  if (root / FILE).exists() or not root.exists():
    return
  # A run killed before its manifest leaves sequences and temporary files.
  names = {path.name for path in root.iterdir()} if root.is_dir() else {'.'}
  ours = {SEQUENCES, KEEP, LOCK}
  names = {n.partition(locks.HELD)[0] for n in names}
  if any(n not in ours and not n.endswith('.tmp') for n in names):
    raise UserError(
      f'store.path: {root} is not an empty folder and holds no store: give '
      'another one'
    )


def check_same(root: Path, manifest: Manifest) -> Manifest | None:
  """The manifest in the folder, if any; UserError if it is of another store
  than `manifest` plans."""
  if not (root / FILE).exists():
    return None
  old = read_manifest(root, complete=False)
  if keys := differences(old, manifest):
    raise another_harvest(root, keys)
  return old


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
    if not cli.mistake_of(error):
      raise
    raise UserError(
      f'store.path: cannot write in {root} ({error.strerror}): make room or '
      'give another folder, then run the same harvest again'
    ) from error


@contextlib.contextmanager
def locked(root: Path, why: str = '') -> Iterator[None]:
  """Holds the folder, made if need be, alone: to plan a store, remove a shard,
  end a harvest.

  Waits for whoever has it, and says `why` if that takes a while. The lock is on
  a file in it, since locks of folders do not reach other hosts over NFS.
  """
  path = root / LOCK
  if why and locks.taken(path):
    logging.info('store: %s: waiting for another task that %s', root, why)
  descriptor = locks.take(path, wait=True)
  try:
    yield
  finally:
    locks.release(descriptor)


def claim(path: Path) -> int:
  """Makes or takes over a temporary file, alone, until `locks.release` of its
  descriptor; UserError when another process has it."""
  try:
    return locks.take(path)
  except BlockingIOError as error:
    raise UserError(
      f'store.path: another harvest is writing {path.name} in '
      f'{path.parents[1]}{error.strerror}: wait for it, or give the tasks of '
      'one store different numbers (--config.task=0/2, --config.task=1/2)'
    ) from None


def allocate(path: Path, size: int) -> None:
  """Makes a file of that size, with its blocks where the system can.

  A full disk must be an error here: in a mapped file it would be a SIGBUS.
  """
  with open(path, 'wb') as file:
    if hasattr(os, 'posix_fallocate'):  # not on macOS
      os.posix_fallocate(file.fileno(), 0, size)
    else:
      os.truncate(file.fileno(), size)


def check_space(root: Path, manifest: Manifest, missing: Sequence[int]) -> None:
  """UserError when the shards to come, of all tasks, do not fit on the disk."""
  absent = set(missing)
  sizes = [shard_bytes(manifest, s) for s in range(len(manifest.shards))]
  needed = sum(sizes[s] for s in absent)
  if manifest.keep_bytes:
    there = sum(
      sizes[s]
      for s, entry in enumerate(manifest.shards)
      if s not in absent and not entry.removed
    )
    needed = min(needed, max(manifest.keep_bytes - there, 0))
  for path in root.rglob('*.bin.tmp'):  # other tasks' shards have their room
    with contextlib.suppress(FileNotFoundError):  # finished just now
      needed -= path.stat().st_size
  free = shutil.disk_usage(root).free
  if needed > free:
    raise UserError(
      f'store.path: {needed / 1e9:,.1f} GB to write, {free / 1e9:,.1f} GB free '
      f'at {root}: make room, lower harvest.rows, set store.keep_bytes or give '
      'another folder'
    )
