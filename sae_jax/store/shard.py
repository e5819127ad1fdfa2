"""The end of a shard: its rows reach the disk, and a record says so.

Checksums and statistics are computed while another thread writes.
"""

import errno
import mmap
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path
from typing import NamedTuple

import numpy as np
import xxhash

from sae_jax import locks
from sae_jax.errors import UserError
from sae_jax.paths import write_atomic
from sae_jax.store import quantise
from sae_jax.store.files import column_codes
from sae_jax.store.manifest import (
  TOKENS,
  FileEntry,
  Manifest,
  Site,
  bin_path,
  planned_parts,
  scale_part,
  site_part,
)
from sae_jax.store.plan import block_checksums
from sae_jax.store.records import Record, write_record
from sae_jax.store.statistics import merge_next, within

PAGE = 4096  # what direct writes are aligned to
_WRITE = 16 << 20  # bytes of one write


class NotFinite(UserError):
  """place: site, sequence and position of a row that is NaN or infinite."""

  def __init__(self, site: str, full: 'FullShard', bad: np.ndarray):
    sequence, position, token = map(int, full.rows[TOKENS][bad.argmax()])
    self.place, self.shard = (site, sequence, position), full.shard
    super().__init__(
      f'{site}: the row of token {token} at position {position} of sequence '
      f'{sequence} (shard {full.shard}) holds NaN or infinity: check the model '
      'file, and compute in float32'
    )


class FullShard(NamedTuple):
  """A shard whose rows are all at their places.

  rows: part -> [rows, width], in memory or mapped files; claim: the descriptor
  that keeps other processes away.
  """

  shard: int
  rows: dict[str, np.ndarray]
  claim: int


def finish_shard(
  root: Path, manifest: Manifest, full: FullShard, threads: ThreadPoolExecutor
) -> None:
  """Checksums, statistics, fsync, rename; the record comes last.

  Of a shard that fails nothing is left. Raises UserError for rows that are
  not finite.
  """
  count, record = len(manifest.shards), Record({}, {})
  paths = {p: root / bin_path(p, full.shard, count) for p in full.rows}
  writes = {
    part: threads.submit(write_rows, temporary(paths[part]), rows)
    for part, rows in full.rows.items()
  }
  try:
    sums = _checksums(manifest, full, record)
    # The claim is on the tokens' file: it takes its name last.
    for part, path in reversed(paths.items()):
      writes[part].result()  # on the disk before the name says so
      os.replace(temporary(path), path)
      write_atomic(path.with_suffix('.blocks'), sums[part])
      name = bin_path(part, full.shard, count)
      checksum = xxhash.xxh3_64_hexdigest(sums[part])
      record.files[name] = FileEntry(full.rows[part].nbytes, checksum)
    for part in planned_parts():
      name = bin_path(part, full.shard, count)
      record.files[name] = manifest.shards[full.shard].files[name]
    write_record(root, manifest, full.shard, record)
  except BaseException:
    wait(writes.values())
    for path in paths.values():
      temporary(path).unlink(missing_ok=True)
    raise
  finally:
    locks.release(full.claim)


def temporary(path: Path) -> Path:
  """The name of a .bin file while it is written."""
  return path.with_suffix('.bin.tmp')


def _checksums(
  manifest: Manifest, full: FullShard, record: Record
) -> dict[str, bytes]:
  """The .blocks of every part; enters the sites' moments in the record."""
  step, sums = manifest.rows_per_block, {}
  for site in manifest.sites:
    hashes, total = [], None
    for raw, rows in _blocks(site, full.rows, step):
      hashes.append(xxhash.xxh3_64_intdigest(raw.view(np.uint8).data))
      with np.errstate(invalid='ignore', over='ignore'):
        total = merge_next(total, within(rows, site.max_norm))
    if total is None or not np.isfinite(total.m2).all():
      blocks = _blocks(site, full.rows, step)
      bad = [~np.isfinite(rows).all(1) for _, rows in blocks]
      raise NotFinite(site.name, full, np.concatenate(bad))
    record.moments[site.name] = total
    sums[site_part(site.name)] = np.array(hashes, '<u8').tobytes()
  for part in full.rows.keys() - sums.keys():
    sums[part] = block_checksums(full.rows[part], step)
  return sums


def _blocks(
  site: Site, parts: dict[str, np.ndarray], step: int
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
  """(as stored, as a reader will see it) of each block of a site's rows."""
  rows = parts[site_part(site.name)]
  for at in range(0, len(rows), step):
    raw = rows[at : at + step]
    if site.dtype == 'int8':
      scales = parts[scale_part(site.name)][at : at + step]
      seen = np.empty(raw.shape, np.float32)
      quantise.decode(raw, scales, *column_codes(site), seen)
      yield raw, seen
    else:
      yield raw, raw


def write_rows(path: Path, rows: np.ndarray) -> None:
  """Fills a file that has its size already; it is on the disk at the end.

  Rows in memory go past the page cache where the file system allows it, which
  takes a fifth of the processor time and leaves no dirty pages behind.
  """
  if isinstance(rows, np.memmap):
    rows.flush()  # msync
    return
  view = rows.reshape(-1).view(np.uint8).data
  at = _write_direct(path, view[: len(view) // PAGE * PAGE])
  with open(path, 'r+b', buffering=0) as file:
    while at < len(view):
      at += os.pwrite(file.fileno(), view[at : at + _WRITE], at)
    os.fsync(file.fileno())


def _write_direct(path: Path, view: memoryview) -> int:
  """Writes from the start of a file; how far it came before it was refused."""
  flag, at = getattr(os, 'O_DIRECT', 0), 0  # 0: macOS
  if not flag:
    return 0
  try:
    descriptor = os.open(path, os.O_WRONLY | flag)
    try:
      while at < len(view):
        at += os.pwrite(descriptor, view[at : at + _WRITE], at)
    finally:
      os.close(descriptor)
  except OSError as error:
    if error.errno != errno.EINVAL:  # no such writes here, or larger pages
      raise
  return at


def rows_in(
  memory: mmap.mmap, at: int, shape: tuple[int, int], dtype: np.dtype
) -> np.ndarray:
  """Rows that lie in memory from byte `at` on."""
  size = shape[0] * shape[1] * dtype.itemsize
  return np.frombuffer(memory, np.uint8, size, at).view(dtype).reshape(shape)


def pages(size: int) -> int:
  """A size rounded up to whole pages."""
  return -(-size // PAGE) * PAGE


def place_rows(rows: np.ndarray, place: np.ndarray, values: np.ndarray) -> None:
  """rows[place] = values, each row moved as one item: up to twice as fast."""
  values = np.ascontiguousarray(values, rows.dtype)
  item = np.dtype((np.void, rows.shape[1] * rows.itemsize))
  rows.view(item)[place, 0] = values.view(item)[:, 0]
