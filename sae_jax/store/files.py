"""One .bin file of a store: opened against the manifest, read by the block.

Every block is checked on read.
"""

import contextlib
import errno
import os
import weakref
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import xxhash

from sae_jax.errors import UserError
from sae_jax.store import quantise
from sae_jax.store.manifest import (
  FileEntry,
  Manifest,
  Site,
  bin_path,
  blocks_path,
  layout,
  part_rows,
  scale_part,
  site_part,
)
from sae_jax.store.records import finished_files

MEND = 'launch/verify.py --repair writes that shard again'


class ShardFile:
  """One .bin file of a store with the checksums of its blocks.

  Opening raises UserError when a size or the checksums' own checksum differ
  from the manifest. Threads need no lock. The file is opened for every read
  unless `keep_open` was called. `files` are the shard's entries where the
  manifest does not have them yet.
  """

  def __init__(
    self,
    root: Path,
    manifest: Manifest,
    part: str,
    shard: int,
    files: dict[str, FileEntry] | None = None,
  ):
    name = bin_path(part, shard, len(manifest.shards))
    expected = file_entry(root, manifest, shard, name, files)
    self.path = root / name
    self.dtype, self.width = layout(manifest, part)
    self._itemsize = self.dtype.itemsize  # on the disk
    self.rows = part_rows(manifest, part, shard)
    self.block_rows = manifest.rows_per_block
    self.blocks = -(-self.rows // self.block_rows)
    check_size(self.path, expected.bytes)
    sums = root / blocks_path(name)
    check_size(sums, 8 * self.blocks)
    raw = sums.read_bytes()
    if xxhash.xxh3_64_hexdigest(raw) != expected.checksum:
      raise UserError(f'{sums}: checksum differs from the manifest: {MEND}')
    self.checksums = np.frombuffer(raw, '<u8')
    self._kept, self._descriptor = False, -1

  def block_shape(self, block: int) -> tuple[int, int]:
    """(rows, width) of a block; the last one of a file may be shorter."""
    rows = min(self.block_rows, self.rows - block * self.block_rows)
    return rows, self.width

  def keep_open(self) -> None:
    """Leaves the file open from the next read on, until this is dropped.

    Not for a store with a budget: a removed shard must free its room.
    """
    self._kept = True

  def read_into(self, block: int, out: np.ndarray) -> None:
    """Fills `out`, C-contiguous of `block_shape(block)`, checking the sum."""
    view = out.view(np.uint8).reshape(-1).data
    offset, got = self._offset(block), 0
    with self._opened() as descriptor:
      while got < len(view):
        n = os.preadv(descriptor, [view[got:]], offset + got)
        if not n:
          raise UserError(
            f'{self.path}: cut off at {offset + got:,} bytes, block {block} '
            f'needs {offset + len(view):,}: {MEND}'
          )
        got += n
    self._check(block, view)

  def read_cached(self, block: int, out: np.ndarray) -> bool:
    """As `read_into` when that needs no disk, else returns False at once."""
    view = out.view(np.uint8).reshape(-1).data
    if not hasattr(os, 'RWF_NOWAIT'):  # Linux has it
      return False
    try:
      with self._opened() as descriptor:
        offset = self._offset(block)
        n = os.preadv(descriptor, [view], offset, os.RWF_NOWAIT)
    except OSError as error:
      if error.errno not in (errno.EAGAIN, errno.EOPNOTSUPP, errno.EINVAL):
        raise
      return False
    if n < len(view):  # the rest is on the disk, or missing
      return False
    self._check(block, view)
    return True

  def _check(self, block: int, view: memoryview) -> None:
    if xxhash.xxh3_64_intdigest(view) != self.checksums[block]:
      offset = self._offset(block)
      raise UserError(
        f'{self.path}: block {block} (bytes {offset:,} to '
        f'{offset + len(view):,}) does not match its checksum: {MEND}'
      )

  def announce(self, block: int) -> None:
    """Has the system read a block ahead; `read_into` will find it sooner."""
    if hasattr(os, 'posix_fadvise'):  # not on macOS
      rows, width = self.block_shape(block)
      size = rows * width * self._itemsize
      with self._opened() as descriptor:
        os.posix_fadvise(
          descriptor, self._offset(block), size, os.POSIX_FADV_WILLNEED
        )

  def _offset(self, block: int) -> int:
    return block * self.block_rows * self.width * self._itemsize

  @contextlib.contextmanager
  def _opened(self) -> Iterator[int]:
    if self._descriptor >= 0:
      yield self._descriptor
      return
    try:
      descriptor = os.open(self.path, os.O_RDONLY)
    except OSError as error:
      raise UserError(
        f'{self.path}: cannot be opened ({error.strerror}): was the store '
        'moved or deleted meanwhile?'
      ) from error
    if self._kept:
      weakref.finalize(self, os.close, descriptor).atexit = False
      self._descriptor = descriptor
      yield descriptor
      return
    try:
      yield descriptor
    finally:
      os.close(descriptor)

  def read(self, block: int) -> np.ndarray:
    """One block [rows, width]."""
    out = np.empty(self.block_shape(block), self.dtype)
    self.read_into(block, out)
    return out

  def read_all(self) -> np.ndarray:
    """The whole file [rows, width]."""
    out = np.empty((self.rows, self.width), self.dtype)
    for block in range(self.blocks):
      at = block * self.block_rows
      self.read_into(block, out[at : at + self.block_rows])
    return out


class Int8File(ShardFile):
  """int8 rows with their scales, read as float32."""

  def __init__(self, root, manifest: Manifest, site: Site, shard: int, files):
    super().__init__(root, manifest, site_part(site.name), shard, files)
    self.dtype = np.dtype(np.float32)
    self._steps = ShardFile(root, manifest, site_part(site.name), shard, files)
    self._scales = ShardFile(
      root, manifest, scale_part(site.name), shard, files
    )
    self._columns = column_codes(site)

  def keep_open(self) -> None:
    self._steps.keep_open()
    self._scales.keep_open()

  def announce(self, block: int) -> None:
    self._steps.announce(block)
    self._scales.announce(block)

  def read_cached(self, block: int, out: np.ndarray) -> bool:
    steps = np.empty(self._steps.block_shape(block), self._steps.dtype)
    scales = np.empty(self._scales.block_shape(block), self._scales.dtype)
    if not self._steps.read_cached(block, steps):
      return False
    if not self._scales.read_cached(block, scales):
      return False
    quantise.decode(steps, scales, *self._columns, out)
    return True

  def read_into(self, block: int, out: np.ndarray) -> None:
    steps, scales = self._steps.read(block), self._scales.read(block)
    quantise.decode(steps, scales, *self._columns, out)


def column_codes(site: Site) -> tuple[np.ndarray, np.ndarray]:
  """(offset, scale) [width] float32 of an int8 site."""
  return np.array(site.offset, np.float32), np.array(site.scale, np.float32)


def site_file(
  root: Path,
  manifest: Manifest,
  site: str,
  shard: int,
  files: dict[str, FileEntry] | None = None,
) -> ShardFile:
  """The rows of a site in one shard, whatever they are stored as."""
  entry = manifest.site(site)
  if entry.dtype == 'int8':
    return Int8File(root, manifest, entry, shard, files)
  return ShardFile(root, manifest, site_part(site), shard, files)


def file_entry(
  root: Path,
  manifest: Manifest,
  shard: int,
  name: str,
  files: dict[str, FileEntry] | None = None,
) -> FileEntry:
  """Size and checksum of a finished file; UserError where there is none."""
  entry = manifest.shards[shard].files[name]
  if entry.checksum is not None:  # planned before the first row, or complete
    return entry
  files = files or finished_files(root, manifest, shard)
  if files is None:
    raise UserError(
      f'{root / name}: not written yet: the store is being harvested'
    )
  return files[name]


def check_size(path: Path, expected: int) -> None:
  """UserError unless the file is there and has `expected` bytes."""
  try:
    actual = path.stat().st_size
  except (FileNotFoundError, NotADirectoryError):
    raise UserError(f'{path}: missing: {MEND}') from None
  if actual != expected:
    raise UserError(f'{path}: {actual:,} bytes, expected {expected:,}: {MEND}')
