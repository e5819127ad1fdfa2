"""Training batches of a store as a function of (seed, position).

Every block is checked on read. Needs numpy; Grain for prefetching; not jax.
"""

import functools
import math
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from sae_jax.errors import UserError
from sae_jax.store.files import ShardFile, check_size, site_file
from sae_jax.store.manifest import (
  FileEntry,
  bin_path,
  blocks_path,
  local_root,
  read_manifest,
  site_part,
)
from sae_jax.store.memory import Pool
from sae_jax.store.order import block_order
from sae_jax.store.reader import bound_of
from sae_jax.store.records import finished_files
from sae_jax.store.statistics import stand_in


class BatchSource:
  """Training batches of one site: `source[i]` is a pure function of (seed, i).

  The full blocks of the training shards (a shorter last block is left out)
  form an endless stream, epoch after epoch: windows of `window` consecutive
  shards in order, the blocks of a window permuted anew in every epoch. Batch i
  is blocks [i n, (i+1) n) of the stream, n = batch_rows / rows_per_block; it
  may begin in one epoch and end in the next. Of every batch cut into `of`
  parts, `parts` are read. There is no last batch: `len` is sys.maxsize.
  For rows that are left out (`reader.bound_of`) others of their block stand in.

  A store that is still being written gives the same batches; `missing(i)`
  says what batch i waits for. Attributes: root, manifest, site (the
  manifest's Site), batch_rows, parts, of, rows (of a batch that are read),
  rows_per_epoch. Raises UserError: no store, no such site, batch_rows that is
  not a multiple of rows_per_block x of, files missing or of a wrong size (with
  `check_sizes`; else when they are read). Values of batch_rows that it proposes
  are multiples of `multiple_of`.
  """

  def __init__(
    self,
    root: str | Path,
    site: str,
    batch_rows: int,
    *,
    seed: int,
    window: int,
    parts: Sequence[int] = (0,),
    of: int = 1,
    max_norm: float = 0.0,
    check_sizes: bool = True,
    multiple_of: int = 1,
  ):
    self.root = root = local_root(root)
    self.manifest = manifest = read_manifest(root, complete=False)
    self.site = manifest.site(site)
    self.batch_rows, self.seed, self._max_norm = batch_rows, seed, max_norm
    self.parts, self.of = sorted(parts), of
    self._check(window, multiple_of)
    self.rows = batch_rows // of * len(self.parts)
    self._window, self._closed = window, threading.Event()
    # Full blocks are numbered in file order: where each shard's begin, and
    # where each window's begin; the last entry of both is their number.
    shards = [manifest.shards[s] for s in manifest.training_shards]
    counts = [entry.rows // manifest.rows_per_block for entry in shards]
    self._file_starts = np.concatenate([[0], np.cumsum(counts, dtype=int)])
    self._window_starts = np.append(
      self._file_starts[:-1:window], self._file_starts[-1]
    )
    self._blocks = int(self._file_starts[-1])
    self.rows_per_epoch = self._blocks * manifest.rows_per_block
    if not self.rows_per_epoch:
      raise UserError(
        f'store.path: the store at {root} has no full block of training rows: '
        'harvest more rows, or hold out fewer shards'
      )
    # A window's files are open at a time, and those of the next.
    self._file = functools.lru_cache(maxsize=2 * window + 2)(self._open_file)
    self._pool = Pool()
    self._finished: dict[int, dict[str, FileEntry]] = {}
    if check_sizes:
      self._check_files()

  def _check(self, window: int, multiple_of: int) -> None:
    block = self.manifest.rows_per_block
    if self.batch_rows < 1 or self.batch_rows % (block * self.of):
      unit = math.lcm(block * self.of, multiple_of)
      below = self.batch_rows // unit * unit
      values = [str(v) for v in (below, below + unit) if v > 0]
      raise UserError(
        f"batch_rows: {self.batch_rows:,} is not a multiple of the store's "
        f'block ({block} rows) x {self.of} '
        f'data processes: use {" or ".join(values)}'
      )
    if window < 1:
      raise UserError(f'window: {window} shards; use 1 or more')
    if not 0 <= self.seed < 2**64:
      raise UserError(f'seed: {self.seed}; use 0 to 2^64 - 1')
    if not self.parts or not set(self.parts) <= set(range(self.of)):
      raise UserError(
        f'parts: {self.parts} of {self.of}; use some of 0 to {self.of - 1}'
      )

  def _check_files(self) -> None:
    """Sizes of all that should be there: what is missing is said at once."""
    m, part = self.manifest, site_part(self.site.name)
    for shard in m.training_shards:
      if self._is_finished(shard) and not m.shards[shard].removed:
        name = bin_path(part, shard, len(m.shards))
        check_size(self.root / name, self._finished[shard][name].bytes)
        blocks = -(-m.shards[shard].rows // m.rows_per_block)
        check_size(self.root / blocks_path(name), 8 * blocks)

  def _is_finished(self, shard: int) -> bool:
    if shard not in self._finished:
      files = finished_files(self.root, self.manifest, shard)
      if files is None:
        return False
      self._finished[shard] = files
    return True

  @functools.cached_property
  def bound(self) -> float:
    """See `bound_of`; with max_norm the normaliser shards must be there."""
    return bound_of(self.root, self.site.name, self._max_norm)

  def missing(self, i: int) -> int | None:
    """The first shard of batch i that is not written yet, None if all are."""
    if len(self._finished) == len(self.manifest.training_shards):
      return None
    for shard in self._shards(i):
      if not self._is_finished(shard):
        return shard
    return None

  def removed(self, i: int) -> bool:
    """Whether a shard of batch i was removed after it had been read."""
    now = read_manifest(self.root, complete=False)
    return any(now.shards[shard].removed for shard in self._shards(i))

  def _shards(self, i: int) -> list[int]:
    """The shards that batch i has a block of, ascending."""
    blocks = self.batch_rows // self.manifest.rows_per_block
    places = range(i * blocks, (i + 1) * blocks)
    return sorted({self._locate(at)[0] for at in places})

  def first_shard(self, position_rows: int) -> int:
    """The first shard that a run at a position may ask for in the first epoch;
    the number of shards at its end."""
    place = position_rows // self.manifest.rows_per_block
    if place >= self._blocks:
      return len(self.manifest.shards)
    window = _last_at_most(self._window_starts, place)
    return self.manifest.held_out_shards + window * self._window

  def close(self) -> None:
    """Ends the waiting of reader threads for shards that do not come."""
    self._closed.set()

  def __len__(self) -> int:
    return sys.maxsize

  def __getitem__(self, i: int) -> np.ndarray:
    """The parts' rows [rows, width] of batch i, one part after the other, in
    the stored dtype (int8: float32). Waits for shards that are being written.
    The memory is used again once neither the array nor a view of it is
    referred to.

    Raises UserError naming the file and block that cannot be trusted.
    """
    block_rows = self.manifest.rows_per_block
    count = self.batch_rows // block_rows
    each = count // self.of
    firsts = [i * count + part * each for part in self.parts]
    places = [self._locate(at + j) for at in firsts for j in range(each)]
    out = self._pool.empty((self.rows, self.site.width), self.site.read_dtype)
    # What is in the page cache first; the disk is told all the rest at once.
    rest = []
    for j, (shard, block) in enumerate(places):
      rows = out[j * block_rows : (j + 1) * block_rows]
      file = self._file(shard)
      if not file.read_cached(block, rows):
        file.announce(block)
        rest.append((file, block, rows))
    for file, block, rows in rest:
      file.read_into(block, rows)
    if self.bound:
      for at in range(0, len(out), block_rows):
        stand_in(out[at : at + block_rows], self.bound)
    return out

  def _open_file(self, shard: int) -> ShardFile:
    """The site's file of a shard, once it is written."""
    while not self._is_finished(shard):
      if self._closed.wait(0.2):
        raise UserError(f'shard {shard} was not written before the reader end')
    files = self._finished[shard]
    m, site = self.manifest, self.site.name
    try:
      file = site_file(self.root, m, site, shard, files)
    except UserError:
      now = read_manifest(self.root, complete=False)
      if now.shards[shard].removed:
        raise UserError(
          f'store.path: shard {shard} of {self.root} was removed after its '
          'trainers had read it: only later rows can be read'
        ) from None
      raise
    if not m.keep_bytes:
      file.keep_open()
    return file

  def _locate(self, at: int) -> tuple[int, int]:
    """(shard, block in it) at place `at` of the endless stream of blocks."""
    epoch, place = divmod(at, self._blocks)
    window = _last_at_most(self._window_starts, place)
    start, end = (int(v) for v in self._window_starts[window : window + 2])
    order = block_order(end - start, self.seed, epoch, window)
    block = start + int(order[place - start])
    file = _last_at_most(self._file_starts, block)
    return file + self.manifest.held_out_shards, block - int(
      self._file_starts[file]
    )


def _last_at_most(starts: np.ndarray, place: int) -> int:
  """Index of the last of the ascending starts that is <= place."""
  return int(np.searchsorted(starts, place, side='right')) - 1


def train_batches(
  source: BatchSource,
  *,
  position_rows: int = 0,
  threads: int = 4,
  prefetch: int = 4,
) -> Any:
  """A Grain iterator over the batches from `position_rows` on; never ends.

  `threads` batches are read at a time, `prefetch` lie ready. `get_state()` is
  {'next_index': batches consumed since row 0}. A UserError of a reading thread
  comes out of `next`. Call `close()` when done, also after an error.
  """
  # Imported here: Grain pulls in jax where it is installed, and held_out,
  # load_sequences and normalizer must stay light.
  import grain

  if position_rows % source.batch_rows:
    raise UserError(
      f'position: {position_rows:,} rows is not a multiple of batch_rows '
      f'{source.batch_rows:,}: go on with the batch size of the run before'
    )
  options = grain.ReadOptions(
    num_threads=threads, prefetch_buffer_size=prefetch
  )
  dataset = grain.MapDataset.source(source)  # type: ignore[arg-type]
  iterator = iter(dataset.to_iter_dataset(options))
  iterator.set_state({'next_index': position_rows // source.batch_rows})
  return iterator
