"""Writes a store: rows go straight to their permuted place in their shard.

Shards are filled one after the other, beside other processes that fill other
shards. A killed harvest goes on at the first missing shard and ends with the
same bytes. docs/store.md has the format.
"""

import contextlib
import os
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path

import numpy as np
import xxhash

from sae_jax.errors import UserError
from sae_jax.paths import write_atomic
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
)
from sae_jax.store.manifest import (
  TOKENS,
  FileEntry,
  Manifest,
  Site,
  bin_path,
  blocks_path,
  layout,
  planned_parts,
  read_manifest,
  row_parts,
  scale_part,
  site_part,
)
from sae_jax.store.order import shard_order
from sae_jax.store.plan import block_checksums
from sae_jax.store.records import Record, write_record
from sae_jax.store.sequences import Sequences, shard_tokens
from sae_jax.store.statistics import Moments, merge_all, moments


class StoreWriter:
  """Places rows that come in global order into shards; skips finished ones.

  with open_writer(root) as writer:
    while writer.missing:
      first = writer.next_row()
      writer.write(first, {site: rows [n, width], ...})
    manifest = writer.finish()

  Attributes: manifest, sequences, missing (the shards still to be written,
  ascending, of those in `shards`: all if None). Rows are of the type in which
  they are stored, float32 for int8. Raises UserError when another process
  writes one of the shards, and when the disk is full.

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
    self._open: dict[str, np.memmap] = {}
    every = missing_shards(root, m)
    self.missing = [s for s in every if shards is None or s in shards]
    check_space(root, m, self.missing)
    delete_rows(root, m, removed_shards(m))  # what a kill has left of them
    if self.missing:
      self.manifest = reopen(root)

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
        self._put(shard, offset, part)
        written += count
      at += count
    return written

  def _put(
    self, shard: int, offset: int, rows: Mapping[str, np.ndarray]
  ) -> None:
    if shard != self._shard:
      self._open_shard(shard)
    if offset != self._placed:
      raise ValueError(f'shard {shard}: row {offset}, expected {self._placed}')
    count = len(next(iter(rows.values())))
    place = self._place[offset : offset + count]
    for site in self.manifest.sites:
      values = rows[site.name]
      if site.dtype == 'int8':
        values, scales = quantise.encode(values, *column_codes(site))
        self._open[scale_part(site.name)][place] = scales
      self._open[site_part(site.name)][place] = values
    self._placed += count
    if self._placed == self.manifest.shards[shard].rows:
      self._finish_shard()

  def _open_shard(self, shard: int) -> None:
    if self._open:
      raise ValueError(f'shard {shard} begun before {self._shard} was full')
    if self._budget:
      await_room(self.root, self.manifest, shard)
    rows = self.manifest.shards[shard].rows
    self._place = np.argsort(shard_order(rows, self.manifest.seed, shard))
    self._shard, self._placed = shard, 0
    for part in row_parts(self.manifest):
      dtype, width = layout(self.manifest, part)
      path = _temporary(self._path(part, shard))
      path.parent.mkdir(parents=True, exist_ok=True)
      if part == TOKENS:  # the first one: the claim on the shard
        self._claim = claim(path)
      allocate(path, rows * width * dtype.itemsize)
      self._open[part] = np.memmap(path, dtype, 'r+', 0, (rows, width))
    self._open[TOKENS][:] = shard_tokens(self.sequences, self.manifest, shard)

  def _finish_shard(self) -> None:
    """Checksums, statistics, fsync, rename; the record comes last."""
    shard, record = self._shard, Record({}, {})
    for site in self.manifest.sites:
      record.moments[site.name] = self._moments(site)
    for part, rows in self._open.items():
      path = self._path(part, shard)
      rows.flush()  # msync: on the disk before the name says so
      os.replace(_temporary(path), path)
      self._write_blocks(record, path, rows)
    self._open = {}
    for part in planned_parts():
      name = bin_path(part, shard, len(self.manifest.shards))
      record.files[name] = self.manifest.shards[shard].files[name]
    write_record(self.root, self.manifest, shard, record)
    os.close(self._claim)
    self._claim = -1
    self.missing.remove(shard)

  def _moments(self, site: Site) -> Moments:
    """Moments of a shard's rows as stored, block by block in file order."""
    merged = merge_all(moments(block) for block in self._blocks(site))
    if not np.isfinite(merged.m2).all():
      raise UserError(
        f'{site.name}: a row of shard {self._shard} holds NaN or infinity: '
        'check the model file, and compute in float32'
      )
    return merged

  def _blocks(self, site: Site) -> Iterator[np.ndarray]:
    """The open shard's rows as a reader will see them."""
    rows, step = self._open[site_part(site.name)], self.manifest.rows_per_block
    for at in range(0, len(rows), step):
      block = rows[at : at + step]
      if site.dtype == 'int8':
        scales = self._open[scale_part(site.name)][at : at + step]
        out = np.empty(block.shape, np.float32)
        quantise.decode(block, scales, *column_codes(site), out)
        block = out
      yield block

  def _write_blocks(self, record: Record, path: Path, rows: np.ndarray) -> None:
    """Writes the .blocks of a .bin, and enters the pair in the record."""
    name = path.relative_to(self.root).as_posix()
    sums = block_checksums(rows, self.manifest.rows_per_block)
    write_atomic(self.root / blocks_path(name), sums)
    checksum = xxhash.xxh3_64_hexdigest(sums)
    record.files[name] = FileEntry(rows.nbytes, checksum)

  def _path(self, part: str, shard: int) -> Path:
    return self.root / bin_path(part, shard, len(self.manifest.shards))

  def finish(self) -> Manifest:
    """Writes the manifest that says `complete`, and returns it.

    ValueError while shards are missing.
    """
    return finalize(self.root)

  def close(self) -> None:
    """Gives the shard back that was begun but not finished."""
    self._open = {}
    if self._claim >= 0:
      for part in row_parts(self.manifest):
        path = _temporary(self._path(part, self._shard))
        path.unlink(missing_ok=True)
      os.close(self._claim)
    self._claim = -1


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


def _temporary(path: Path) -> Path:
  return path.with_suffix('.bin.tmp')


def is_claimed(root: Path, manifest: Manifest, shard: int) -> bool:
  """Whether some process is writing the shard now."""
  path = _temporary(root / bin_path(TOKENS, shard, len(manifest.shards)))
  if not path.exists():
    return False
  try:
    os.close(claim(path))
  except UserError:
    return True
  return False
