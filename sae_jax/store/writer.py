"""Writes a store: rows go straight to their permuted place in their shard.

Shards are finished one after the other; a killed harvest goes on at the first
missing one and ends with the same bytes. docs/store.md has the format.
"""

import contextlib
import dataclasses
import os
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
import xxhash
from absl import logging

from sae_jax.errors import UserError
from sae_jax.paths import write_atomic
from sae_jax.store.folder import (
  allocate,
  check_folder,
  check_space,
  disk_errors_are_users,
  lock,
)
from sae_jax.store.manifest import (
  COMPLETE,
  FILE,
  SEQUENCES,
  TOKENS,
  FileEntry,
  Manifest,
  Site,
  bin_path,
  blocks_path,
  layout,
  local_root,
  read_manifest,
  site_part,
  write_manifest,
)
from sae_jax.store.order import shard_order
from sae_jax.store.plan import block_checksums, plan, row_starts
from sae_jax.store.records import (
  Record,
  merge_records,
  read_record,
  write_record,
)
from sae_jax.store.statistics import Moments, merge_all, moments


class StoreWriter:
  """Places rows that come in global order into shards; skips finished ones.

  manifest = plan(sequences, keep, ...)
  with open_writer(root, manifest, sequences, keep) as writer:
    while writer.missing:
      first = writer.next_row()
      writer.write(first, {site: rows [n, width], ...})
    manifest = writer.finish()

  Attributes: manifest, missing (the shards still to be written, ascending).
  Holds a lock on the folder. Raises UserError when the folder is in use or
  holds another harvest's store or something else, and when the disk is full.
  """

  def __init__(
    self,
    root: str | Path,
    manifest: Manifest,
    sequences: np.ndarray,
    keep: np.ndarray,
  ):
    self.root = local_root(root)
    self._sequences, self._keep = sequences, keep
    self._starts = row_starts(keep, manifest.rows)
    self._shard, self._placed = -1, 0
    self._place = np.empty(0, np.int64)
    self._open: dict[str, np.memmap] = {}
    check_folder(self.root, manifest)  # before anything in it is touched
    self.root.mkdir(parents=True, exist_ok=True)
    self._lock = lock(self.root)
    try:
      self.manifest = self._begin(manifest)
      self.missing = missing_shards(self.root, self.manifest)
      check_space(self.root, self.manifest, self.missing)
    except BaseException:
      self.close()
      raise

  def _begin(self, manifest: Manifest) -> Manifest:
    """Writes sequences, then the manifest that says `writing`.

    A store begun before keeps its account of where it comes from.
    """
    if (self.root / FILE).exists():
      old = read_manifest(self.root, complete=False)
      if old.made_by != manifest.made_by:
        logging.warning(
          'store begun by %s, now %s: new rows may differ in the last bits',
          old.made_by,
          manifest.made_by,
        )
      manifest = dataclasses.replace(
        manifest, made_by=old.made_by, config=old.config
      )
      if old.state == COMPLETE and not missing_shards(self.root, manifest):
        return old
    for path in self.root.rglob('*.tmp'):  # of a killed run: we have the lock
      path.unlink()
    for shard, entry in enumerate(manifest.shards):
      first = entry.first_sequence
      mine = self._sequences[first : first + entry.sequences]
      name = bin_path(SEQUENCES, shard, len(manifest.shards))
      write_atomic(self.root / name, mine.tobytes())
      sums = block_checksums(mine, manifest.rows_per_block)
      write_atomic(self.root / blocks_path(name), sums)
    write_manifest(self.root, manifest)
    return manifest

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
      self._open[site.name][place] = rows[site.name]
    self._placed += count
    if self._placed == self.manifest.shards[shard].rows:
      self._finish_shard()

  def _open_shard(self, shard: int) -> None:
    if self._open:
      raise ValueError(f'shard {shard} begun before {self._shard} was full')
    rows = self.manifest.shards[shard].rows
    self._place = np.argsort(shard_order(rows, self.manifest.seed, shard))
    self._shard, self._placed = shard, 0
    for site in self.manifest.sites:
      part = site_part(site.name)
      dtype, width = layout(self.manifest, part)
      path = _temporary(self._path(part, shard))
      path.parent.mkdir(parents=True, exist_ok=True)
      allocate(path, rows * width * dtype.itemsize)
      self._open[site.name] = np.memmap(path, dtype, 'r+', 0, (rows, width))

  def _finish_shard(self) -> None:
    """Checksums, statistics, fsync, rename; the record comes last."""
    shard, record = self._shard, Record({}, {})
    for site in self.manifest.sites:
      rows, path = (
        self._open[site.name],
        self._path(site_part(site.name), shard),
      )
      record.moments[site.name] = self._moments(site.name, rows)
      rows.flush()  # msync: on the disk before the name says so
      os.replace(_temporary(path), path)
      self._write_blocks(record, path, rows)
    self._open = {}
    path, tokens = self._path(TOKENS, shard), self._tokens(shard)
    write_atomic(path, tokens.tobytes())
    self._write_blocks(record, path, tokens)
    name = bin_path(SEQUENCES, shard, len(self.manifest.shards))
    record.files[name] = self.manifest.shards[shard].files[name]
    write_record(self.root, self.manifest, shard, record)
    self.missing.remove(shard)

  def _moments(self, site: str, rows: np.ndarray) -> Moments:
    """Moments of a shard's rows as stored, block by block in file order."""
    step = self.manifest.rows_per_block
    starts = range(0, len(rows), step)
    merged = merge_all(moments(rows[at : at + step]) for at in starts)
    if not np.isfinite(merged.m2).all():
      raise UserError(
        f'{site}: a row of shard {self._shard} holds NaN or infinity: check '
        'the model file, and compute in float32'
      )
    return merged

  def _write_blocks(self, record: Record, path: Path, rows: np.ndarray) -> None:
    """Writes the .blocks of a .bin, and enters the pair in the record."""
    name = path.relative_to(self.root).as_posix()
    sums = block_checksums(rows, self.manifest.rows_per_block)
    write_atomic(self.root / blocks_path(name), sums)
    checksum = xxhash.xxh3_64_hexdigest(sums)
    record.files[name] = FileEntry(rows.nbytes, checksum)

  def _tokens(self, shard: int) -> np.ndarray:
    """(sequence, position, token id) int32 [rows, 3] in the shard's order."""
    first = shard * self.manifest.rows_per_shard
    rows = self.manifest.shards[shard].rows
    begin = int(np.searchsorted(self._starts, first, side='right')) - 1
    end = int(np.searchsorted(self._starts, first + rows, side='left'))
    i, position = np.nonzero(self._keep[begin:end])
    mine = slice(skip := first - self._starts[begin], skip + rows)
    i, position = i[mine] + begin, position[mine]
    tokens = np.stack([i, position, self._sequences[i, position]], axis=1)
    order = shard_order(rows, self.manifest.seed, shard)
    return tokens.astype(np.int32)[order]

  def _path(self, part: str, shard: int) -> Path:
    return self.root / bin_path(part, shard, len(self.manifest.shards))

  def finish(self) -> Manifest:
    """Writes the manifest that says `complete`, and returns it."""
    shards = range(len(self.manifest.shards))
    records = [read_record(self.root, self.manifest, s) for s in shards]
    found = [record for record in records if record]
    if len(found) < len(records):
      raise ValueError(f'shards {self.missing} are not written')
    self.manifest = merge_records(self.manifest, found)
    write_manifest(self.root, self.manifest)
    return self.manifest

  def close(self) -> None:
    """Gives the lock back; a shard begun but not finished is removed."""
    for name in self._open:
      path = _temporary(self._path(site_part(name), self._shard))
      path.unlink(missing_ok=True)
    self._open = {}
    os.close(self._lock)


@contextlib.contextmanager
def open_writer(
  root: str | Path,
  manifest: Manifest,
  sequences: np.ndarray,
  keep: np.ndarray,
) -> Iterator[StoreWriter]:
  """A StoreWriter that is closed at the end; disk errors are UserErrors."""
  with disk_errors_are_users(local_root(root)):
    writer = StoreWriter(root, manifest, sequences, keep)
    try:
      yield writer
    finally:
      writer.close()


def write_arrays(
  root: str | Path,
  rows: Mapping[str, np.ndarray],
  *,
  rows_per_shard: int,
  rows_per_block: int,
  held_out_shards: int = 1,
  norm_shards: int = 1,
  seed: int = 0,
) -> Manifest:
  """Makes a store of rows that lie in memory: {site: [N, width]}.

  For planted data and activations from elsewhere; the dtype is float32 or
  bfloat16. Row i gets the context-free place: sequence i, position 1 of 2,
  token 0. Raises UserError as StoreWriter does.
  """
  count = len(next(iter(rows.values())))
  sequences = np.zeros((count, 2), np.int32)
  keep = np.tile([False, True], (count, 1))
  manifest = plan(
    sequences,
    keep,
    [Site(k, v.shape[1], v.dtype.name) for k, v in rows.items()],
    rows=count,
    rows_per_shard=rows_per_shard,
    rows_per_block=rows_per_block,
    held_out_shards=held_out_shards,
    norm_shards=norm_shards,
    seed=seed,
    model={'name': 'arrays'},
    text={},
    policy={},
    config={},
    made_by={},
  )
  with open_writer(root, manifest, sequences, keep) as writer:
    writer.write(0, rows)
    return writer.finish()


def missing_shards(root: Path, manifest: Manifest) -> list[int]:
  """Shards that are not on the disk, or not of their right size."""
  shards = range(len(manifest.shards))
  return [s for s in shards if read_record(root, manifest, s) is None]


def _temporary(path: Path) -> Path:
  return path.with_suffix('.bin.tmp')
