"""Writes a store: rows go straight to their permuted place in their shard.

Shards are filled one after the other, each in memory and written once, beside
other processes that fill other shards. A killed harvest goes on at the first
missing shard and ends with the same bytes. docs/store.md has the format.
"""

import contextlib
import mmap
import time
from collections.abc import Collection, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import numpy as np

from sae_jax import locks
from sae_jax.memory import host_bytes
from sae_jax.store import quantise
from sae_jax.store.budget import await_room, delete_rows
from sae_jax.store.files import column_codes
from sae_jax.store.finish import (
  finalize,
  missing_shards,
  removed_shards,
  reopen,
)
from sae_jax.store.folder import (
  allocate,
  check_space,
  claim,
  disk_errors_are_users,
  locked,
)
from sae_jax.store.manifest import (
  TOKENS,
  Manifest,
  bin_path,
  layout,
  read_manifest,
  row_parts,
  scale_part,
  site_part,
)
from sae_jax.store.memory import anonymous
from sae_jax.store.order import shard_order
from sae_jax.store.sequences import Sequences, shard_tokens
from sae_jax.store.shard import (
  FullShard,
  finish_shard,
  pages,
  place_rows,
  rows_in,
  temporary,
)

# Bytes of rows that a writer holds at most: an eighth of the machine's memory,
# so that a host of 256 GB takes two shards of Gemma Scope's size (14 GB).
IN_MEMORY = max(2 << 30, host_bytes() // 8)


class StoreWriter:
  """Places rows that come in global order into shards; skips finished ones.

  with open_writer(root) as writer:
    while writer.missing:
      first = writer.next_row()
      writer.write(first, {site: rows [n, width], ...})
    manifest = writer.finish()

  Attributes: manifest, sequences, missing (the shards still to be filled,
  ascending, of those in `shards`: all if None). Rows are of the type in which
  they are stored, float32 for int8. Raises UserError when another process
  writes one of the shards, and when the disk is full.

  A full shard is checked and written in the background while the next one
  fills; what goes wrong there comes out of the next call, `finish` or `close`.
  Memory: twice a shard with all its sites, once where two would be more than
  IN_MEMORY. Larger shards are filled in mapped files: the page cache holds
  what it can, and rows may reach the disk more than once.

  budget: whether to wait for room in a store with `keep_bytes`; a shard that
  is written again had its room before.
  """

  def __init__(
    self,
    root: Path,
    shards: Collection[int] | None = None,
    *,
    budget: bool = True,
  ):
    self.root, self._budget = root, budget
    self.manifest = m = read_manifest(root, complete=False)
    self.sequences = Sequences(root, m)
    self._shard, self._placed, self._claim = -1, 0, -1
    self._place = np.empty(0, np.int64)
    self._open: dict[str, np.ndarray] = {}
    # Memory: of the open shard, of the one that is being finished, free.
    self._memory: mmap.mmap | None = None
    self._lent: mmap.mmap | None = None
    self._spare: mmap.mmap | None = None
    self._threads = ThreadPoolExecutor(2, 'store')  # one checks, one writes
    self._finishing: Future[None] | None = None
    with locked(root):  # no shard is removed between the two looks
      m = read_manifest(root, complete=False)
      every = missing_shards(root, m)
      self.missing = [s for s in every if shards is None or s in shards]
      check_space(root, m, every if self.missing else [])
      delete_rows(root, m, removed_shards(m))  # what a kill has left of them
      if self.missing:
        self.manifest = reopen(root, m)

  def next_row(self) -> int:
    """Global number of the first row still to be written."""
    shard = self.missing[0] if self.missing else len(self.manifest.shards)
    placed = self._placed if shard == self._shard else 0
    return shard * self.manifest.rows_per_shard + placed

  def write(self, first_row: int, rows: Mapping[str, np.ndarray]) -> int:
    """Writes rows first_row, first_row + 1, ...: {site: [n, width]}.

    Rows of finished shards are dropped. Returns the number written. Within a
    shard rows must come in order, each once (ValueError).
    """
    n = len(next(iter(rows.values())))
    if first_row + n > self.manifest.rows:
      raise ValueError(f'rows beyond the last, {self.manifest.rows}')
    at = written = 0
    while at < n:
      shard, offset = divmod(first_row + at, self.manifest.rows_per_shard)
      count = min(n - at, self.manifest.shards[shard].rows - offset)
      if shard in self.missing:
        part = {site: values[at : at + count] for site, values in rows.items()}
        written += self._put(shard, offset, part)
      at += count
    return written

  def _put(
    self, shard: int, offset: int, rows: Mapping[str, np.ndarray]
  ) -> int:
    """Places rows of one shard; returns how many."""
    if self._finishing and self._finishing.done():
      self._settle()  # a mistake is told at the next batch
    if shard != self._shard and not self._open_shard(shard):
      return 0
    if offset != self._placed:
      raise ValueError(f'shard {shard}: row {offset}, expected {self._placed}')
    count = len(next(iter(rows.values())))
    place = self._place[offset : offset + count]
    for site in self.manifest.sites:
      values = rows[site.name]
      if site.dtype == 'int8':
        values, scales = quantise.encode(values, *column_codes(site))
        place_rows(self._open[scale_part(site.name)], place, scales)
      place_rows(self._open[site_part(site.name)], place, values)
    self._placed += count
    if self._placed == self.manifest.shards[shard].rows:
      self._finish_shard()
    return count

  def _open_shard(self, shard: int) -> bool:
    """Claims a shard; False: another process has finished it meanwhile."""
    if self._open:
      raise ValueError(f'shard {shard} begun before {self._shard} was full')
    if self._budget:
      await_room(self.root, self.manifest, shard, self._pause)
    path = temporary(self._path(TOKENS, shard))
    claimed, self._shard = claim(path), shard
    if shard not in missing_shards(
      self.root, read_manifest(self.root, complete=False), [shard]
    ):
      path.unlink()
      locks.release(claimed)
      self.missing.remove(shard)
      return False
    self._claim, self._placed = claimed, 0
    rows = self.manifest.shards[shard].rows
    self._place = np.empty(rows, np.int64)
    self._place[shard_order(rows, self.manifest.seed, shard)] = np.arange(rows)
    self._memory, at = self._take_memory(shard), 0
    for part in row_parts(self.manifest):
      dtype, width = layout(self.manifest, part)
      path, size = self._path(part, shard), rows * width * dtype.itemsize
      path = temporary(path)
      path.parent.mkdir(parents=True, exist_ok=True)
      allocate(path, size)
      if self._memory is None:
        self._open[part] = np.memmap(path, dtype, 'r+', 0, (rows, width))
      else:
        self._open[part] = rows_in(self._memory, at, (rows, width), dtype)
        at += pages(size)
    self._open[TOKENS][:] = shard_tokens(self.sequences, self.manifest, shard)
    return True

  def _take_memory(self, shard: int) -> mmap.mmap | None:
    """Memory for the rows of a shard; None: more than a writer may hold."""
    count = len(self.manifest.shards)
    files = self.manifest.shards[shard].files
    size = sum(
      pages(files[bin_path(part, shard, count)].bytes)
      for part in row_parts(self.manifest)
    )
    if size > IN_MEMORY:
      return None
    if 2 * size > IN_MEMORY:
      self._settle()  # one at a time
    memory, self._spare = self._spare, None
    if memory is None or len(memory) < size:
      memory = anonymous(size)
    return memory

  def _finish_shard(self) -> None:
    """Has the shard finished in the background; waits for the one before."""
    self._settle()
    full = FullShard(self._shard, self._open, self._claim)
    self._finishing = self._threads.submit(
      finish_shard, self.root, self.manifest, full, self._threads
    )
    self._lent, self._memory = self._memory, None
    self._open, self._claim = {}, -1
    self.missing.remove(self._shard)

  def _settle(self) -> None:
    """Waits until no shard is being finished; raises what went wrong there."""
    finishing, self._finishing = self._finishing, None
    if finishing:
      finishing.result()
    self._spare, self._lent = self._lent or self._spare, None

  def _pause(self, seconds: float) -> None:
    """Sleeps; trainers who wait for a shard that failed would never end it."""
    if self._finishing and self._finishing.done():
      self._settle()
    time.sleep(seconds)

  def _path(self, part: str, shard: int) -> Path:
    return self.root / bin_path(part, shard, len(self.manifest.shards))

  def finish(self) -> Manifest:
    """Writes the manifest that says `complete`, and returns it.

    Waits for the last shard. UserError while shards are missing.
    """
    self._settle()
    return finalize(self.root)

  def close(self) -> None:
    """Waits for the shard that is being finished; gives back the open one."""
    self._open = {}
    if self._claim >= 0:
      for part in row_parts(self.manifest):
        path = temporary(self._path(part, self._shard))
        path.unlink(missing_ok=True)
      locks.release(self._claim)
    self._claim = -1
    try:
      self._settle()
    finally:
      self._threads.shutdown()
      self._memory = self._spare = None


@contextlib.contextmanager
def open_writer(
  root: Path, shards: Collection[int] | None = None, *, budget: bool = True
) -> Iterator[StoreWriter]:
  """A StoreWriter that is closed at the end; disk errors are UserErrors."""
  with disk_errors_are_users(root):
    writer = StoreWriter(root, shards, budget=budget)
    try:
      yield writer
    finally:
      writer.close()


def is_claimed(root: Path, manifest: Manifest, shard: int) -> bool:
  """Whether some process is writing the shard now."""
  path = temporary(root / bin_path(TOKENS, shard, len(manifest.shards)))
  return locks.taken(path)
