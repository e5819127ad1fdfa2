"""Reads a store: training batches as a function of (seed, position), the
held-out rows in file order, sequences, the normaliser.

Every block is checked on read. Needs numpy; Grain for prefetching; not jax.
"""

import io
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from sae_jax.errors import UserError
from sae_jax.store.manifest import (
  SEQUENCES,
  TOKENS,
  Manifest,
  Normalizer,
  bin_path,
  blocks_path,
  layout,
  local_root,
  read_manifest,
  site_part,
)
from sae_jax.store.order import block_order

MEND = 'delete it and run the same harvest again: it rewrites that shard'


class ShardFile:
  """One .bin file of a store with the checksums of its blocks.

  Opening raises UserError when a size or the checksums' own checksum differ
  from the manifest; the file is not kept open, so threads need no lock.
  """

  def __init__(self, root: Path, manifest: Manifest, part: str, shard: int):
    name = bin_path(part, shard, len(manifest.shards))
    entry = manifest.shards[shard]
    self.path = root / name
    self.dtype, self.width = layout(manifest, part)
    self.rows = entry.sequences if part == SEQUENCES else entry.rows
    self.block_rows = manifest.rows_per_block
    self.blocks = -(-self.rows // self.block_rows)
    expected = entry.files[name]
    check_size(self.path, expected.bytes)
    sums = root / blocks_path(name)
    check_size(sums, 8 * self.blocks)
    raw = sums.read_bytes()
    if xxhash.xxh3_64_hexdigest(raw) != expected.checksum:
      raise UserError(f'{sums}: checksum differs from the manifest: {MEND}')
    self.checksums = np.frombuffer(raw, '<u8')

  def block_shape(self, block: int) -> tuple[int, int]:
    """(rows, width) of a block; the last one of a file may be shorter."""
    rows = min(self.block_rows, self.rows - block * self.block_rows)
    return rows, self.width

  def read_into(self, block: int, out: np.ndarray) -> None:
    """Fills `out`, C-contiguous of `block_shape(block)`, checking the sum."""
    view = out.view(np.uint8).reshape(-1).data
    offset = block * self.block_rows * self.width * self.dtype.itemsize
    got = 0
    with self._opened() as file:
      file.seek(offset)
      while got < len(view):
        n = file.readinto(view[got:])
        if not n:
          raise UserError(
            f'{self.path}: cut off at {offset + got:,} bytes, block {block} '
            f'needs {offset + len(view):,}: {MEND}'
          )
        got += n
    if xxhash.xxh3_64_intdigest(view) != self.checksums[block]:
      raise UserError(
        f'{self.path}: block {block} (bytes {offset:,} to '
        f'{offset + len(view):,}) does not match its checksum: {MEND}'
      )

  def _opened(self) -> io.FileIO:
    try:
      return open(self.path, 'rb', buffering=0)
    except OSError as error:
      raise UserError(
        f'{self.path}: cannot be opened ({error.strerror}): was the store '
        'moved or deleted meanwhile?'
      ) from error

  def read(self, block: int) -> np.ndarray:
    """One block [rows, width]."""
    out = np.empty(self.block_shape(block), self.dtype)
    self.read_into(block, out)
    return out


def check_size(path: Path, expected: int) -> None:
  """UserError unless the file is there and has `expected` bytes."""
  try:
    actual = path.stat().st_size
  except (FileNotFoundError, NotADirectoryError):
    raise UserError(
      f'{path}: missing: run the same harvest again, it rewrites that shard'
    ) from None
  if actual != expected:
    raise UserError(f'{path}: {actual:,} bytes, expected {expected:,}: {MEND}')


class BatchSource:
  """Training batches of one site: `source[i]` is a pure function of (seed, i).

  The full blocks of the training shards (a shorter last block is left out)
  form an endless stream, epoch after epoch: windows of `window` consecutive
  shards in order, the blocks of a window permuted anew in every epoch. Batch i
  is blocks [i n, (i+1) n) of the stream, n = batch_rows / rows_per_block; it
  may begin in one epoch and end in the next. Process p of P reads the p-th
  part of every batch. There is no last batch: `len` is sys.maxsize.

  Attributes: site (the manifest's Site), batch_rows, rows_per_epoch.
  Raises UserError: no complete store, no such site, batch_rows that is not a
  multiple of rows_per_block x processes, files missing or of a wrong size.
  """

  def __init__(
    self,
    root: str | Path,
    site: str,
    batch_rows: int,
    *,
    seed: int,
    window: int,
    process: int = 0,
    processes: int = 1,
  ):
    root = local_root(root)
    manifest = read_manifest(root)
    self.manifest, self.site = manifest, manifest.site(site)
    self.batch_rows, self.seed = batch_rows, seed
    self.process, self.processes = process, processes
    self._check(window)
    shards = manifest.training_shards
    self._files = [
      ShardFile(root, manifest, site_part(site), shard) for shard in shards
    ]
    # Full blocks are numbered in file order: where each file's begin, and
    # where each window's begin; the last entry of both is their number.
    counts = [file.rows // manifest.rows_per_block for file in self._files]
    self._file_starts = np.concatenate([[0], np.cumsum(counts)])
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

  def _check(self, window: int) -> None:
    unit = self.manifest.rows_per_block * self.processes
    if self.batch_rows < 1 or self.batch_rows % unit:
      below = self.batch_rows // unit * unit
      values = [f'{v:,}' for v in (below, below + unit) if v > 0]
      raise UserError(
        f"batch_rows: {self.batch_rows:,} is not a multiple of the store's "
        f'block ({self.manifest.rows_per_block} rows) x {self.processes} '
        f'data processes: use {" or ".join(values)}'
      )
    if window < 1:
      raise UserError(f'window: {window} shards; use 1 or more')
    if not 0 <= self.seed < 2**64:
      raise UserError(f'seed: {self.seed}; use 0 to 2^64 - 1')
    if not 0 <= self.process < self.processes:
      raise UserError(
        f'process: {self.process} of {self.processes}; use 0 to '
        f'{self.processes - 1}'
      )

  def __len__(self) -> int:
    return sys.maxsize

  def __getitem__(self, i: int) -> np.ndarray:
    """Rows [batch_rows / processes, width] of batch i, in the stored dtype.

    Raises UserError naming the file and block that cannot be trusted.
    """
    block_rows = self.manifest.rows_per_block
    blocks = self.batch_rows // block_rows
    mine = blocks // self.processes
    first = i * blocks + self.process * mine
    out = np.empty((mine * block_rows, self.site.width), self._files[0].dtype)
    for j in range(mine):
      file, block = self._locate(first + j)
      file.read_into(block, out[j * block_rows : (j + 1) * block_rows])
    return out

  def _locate(self, at: int) -> tuple[ShardFile, int]:
    """The file and block at place `at` of the endless stream of blocks."""
    epoch, place = divmod(at, self._blocks)
    window = _last_at_most(self._window_starts, place)
    start, end = (int(v) for v in self._window_starts[window : window + 2])
    order = block_order(end - start, self.seed, epoch, window)
    block = start + int(order[place - start])
    file = _last_at_most(self._file_starts, block)
    return self._files[file], block - int(self._file_starts[file])


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


def held_out(
  root: str | Path, site: str
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
  """Blocks of the held-out shards in file order.

  Yields (rows [n, width] in the stored dtype, tokens [n, 3] int32: sequence,
  position, token id), n = rows_per_block or less at the end of a shard. Files
  are checked before this returns, blocks as they are read (UserError).
  """
  return shard_blocks(root, site, range(read_manifest(root).held_out_shards))


def shard_blocks(
  root: str | Path, site: str, shards: range
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
  """As `held_out`, for any range of shards."""
  root = local_root(root)
  manifest = read_manifest(root)
  manifest.site(site)
  pairs = [
    (
      ShardFile(root, manifest, site_part(site), shard),
      ShardFile(root, manifest, TOKENS, shard),
    )
    for shard in shards
  ]
  return (
    (rows.read(block), tokens.read(block))
    for rows, tokens in pairs
    for block in range(rows.blocks)
  )


def load_sequences(root: str | Path, shard: int) -> np.ndarray:
  """Token ids [n, T] int32 of the sequences whose first row lies in `shard`.

  The first is sequence number `manifest.shards[shard].first_sequence`. A
  shard's first rows may belong to the last sequence of the shard before.
  """
  root = local_root(root)
  manifest = read_manifest(root)
  if not 0 <= shard < len(manifest.shards):
    raise UserError(f'shard: {shard} of {len(manifest.shards)} at {root}')
  file = ShardFile(root, manifest, SEQUENCES, shard)
  blocks = [file.read(block) for block in range(file.blocks)]
  empty = np.empty((0, manifest.sequence_length), file.dtype)
  return np.concatenate([empty, *blocks])


def sequence(root: str | Path, i: int) -> np.ndarray:
  """Token ids [T] int32 of sequence number i, as in the tokens of a row."""
  root = local_root(root)
  manifest = read_manifest(root)
  for shard, entry in enumerate(manifest.shards):
    at = i - entry.first_sequence
    if 0 <= at < entry.sequences:
      file = ShardFile(root, manifest, SEQUENCES, shard)
      block, row = divmod(at, file.block_rows)
      return file.read(block)[row]
  raise UserError(f'sequence: {i} of {manifest.sequences} at {root}')


def normalizer(manifest: Manifest, site: str) -> Normalizer:
  """Mean and mean squared norms of a site (see Normalizer)."""
  entry = manifest.site(site)
  centred, raw = entry.mean_squared_norm_centred, entry.mean_squared_norm_raw
  if entry.mean is None or centred is None or raw is None:
    raise UserError(f'store: {site} has no statistics: harvest not complete')
  return Normalizer(np.array(entry.mean, np.float32), centred, raw)
