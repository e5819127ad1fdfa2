"""The token ids of a store and which of them have rows, on the disk.

They are written before the first row and are all that a harvest has to know
to compute any shard; billions of tokens never lie in memory at once.
"""

import contextlib
import functools
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import xxhash

from sae_jax.paths import write_atomic
from sae_jax.store.files import ShardFile
from sae_jax.store.manifest import (
  DOCUMENTS,
  KEEP,
  SEQUENCES,
  Manifest,
  bin_path,
  blocks_path,
)
from sae_jax.store.order import shard_order
from sae_jax.store.plan import (
  block_checksums,
  pack_keep,
  row_starts,
  sequence_range,
  unpack_keep,
)


class Spool:
  """Sequences on their way to a store: appended to files, then mapped."""

  def __init__(self, root: Path, length: int):
    self._length = length
    self._paths = [root / f'{part}.tmp' for part in (SEQUENCES, KEEP)]
    self._documents: list[np.ndarray] = []
    self._files = [open(path, 'wb') for path in self._paths]

  def add(
    self,
    sequences: np.ndarray,
    keep: np.ndarray,
    documents: np.ndarray | None = None,
  ) -> None:
    """Appends token ids [n, T] int32, keep bool [n, T]; where documents begin
    [m, 2] int64 (its number in the source, sequence * T + position)."""
    self._files[0].write(np.ascontiguousarray(sequences, np.int32).data)
    self._files[1].write(pack_keep(keep).data)
    if documents is not None:
      self._documents.append(documents)

  def arrays(self) -> tuple[np.ndarray, np.ndarray]:
    """(sequences [Q, T] int32, keep packed [Q, T / 8]), mapped."""
    found = []
    widths = (self._length, -(-self._length // 8))
    dtypes = (np.int32, np.uint8)
    for file, path, width, dtype in zip(
      self._files, self._paths, widths, dtypes, strict=True
    ):
      file.flush()
      empty = path.stat().st_size == 0
      array = np.empty(0, dtype) if empty else np.memmap(path, dtype, 'r')
      found.append(array.reshape(-1, width))
    return found[0], found[1]

  def documents(self) -> np.ndarray:
    """[m, 2] int64, see `add`."""
    return np.concatenate([np.empty((0, 2), np.int64), *self._documents])

  def close(self) -> None:
    for file, path in zip(self._files, self._paths, strict=True):
      file.close()
      path.unlink(missing_ok=True)


@contextlib.contextmanager
def spool(root: Path, length: int) -> Iterator[Spool]:
  """A Spool in the store's folder, deleted at the end."""
  made = Spool(root, length)
  try:
    yield made
  finally:
    made.close()


def write_planned(
  root: Path,
  manifest: Manifest,
  sequences: np.ndarray,
  keep: np.ndarray,
  documents: np.ndarray,
) -> None:
  """Writes what a shard's rows are computed from, for all shards."""
  for shard, entry in enumerate(manifest.shards):
    for part, whole in ((SEQUENCES, sequences), (KEEP, keep)):
      mine = whole[sequence_range(entry)]
      name = bin_path(part, shard, len(manifest.shards))
      write_atomic(root / name, mine.tobytes())
      sums = block_checksums(mine, manifest.rows_per_block)
      write_atomic(root / blocks_path(name), sums)
  write_atomic(root / DOCUMENTS, documents.astype('<i8').tobytes())


def documents_checksum(documents: np.ndarray) -> str:
  """xxh3_64 of the file of documents, for the manifest."""
  return xxhash.xxh3_64_hexdigest(documents.astype('<i8').tobytes())


class Sequences:
  """Random access to the sequences of a store, checked as they are read.

  Attributes: starts, the number of the first row of every sequence and the
  end, [Q + 1] int64. Raises UserError for damaged files.
  """

  def __init__(self, root: Path, manifest: Manifest):
    self._root, self._manifest = root, manifest
    self._firsts = [entry.first_sequence for entry in manifest.shards]
    # Neighbouring batches lie in the same two shards.
    self._part = functools.lru_cache(maxsize=4)(self._read)
    shards = range(len(manifest.shards))
    counts = [row_starts(self._read(KEEP, s), manifest.rows) for s in shards]
    each = np.concatenate([[0], *(np.diff(c) for c in counts)])
    self.starts = np.minimum(np.cumsum(each), manifest.rows)

  def _read(self, part: str, shard: int) -> np.ndarray:
    return ShardFile(self._root, self._manifest, part, shard).read_all()

  def tokens(self, first: int, last: int) -> np.ndarray:
    """Token ids [last - first, T] int32."""
    return self._range(SEQUENCES, first, last)

  def keep(self, first: int, last: int) -> np.ndarray:
    """Which tokens have a row, bool [last - first, T]."""
    bits = self._range(KEEP, first, last)
    return unpack_keep(bits, self._manifest.sequence_length)

  def _range(self, part: str, first: int, last: int) -> np.ndarray:
    a = int(np.searchsorted(self._firsts, first, side='right')) - 1
    b = int(np.searchsorted(self._firsts, last, side='left'))
    shards, begin = range(a, max(b, a + 1)), self._firsts[a]
    whole = np.concatenate([self._part(part, s) for s in shards])
    return whole[first - begin : last - begin]


def shard_tokens(
  sequences: Sequences, manifest: Manifest, shard: int
) -> np.ndarray:
  """What a shard's file of tokens holds: (sequence, position, token id) int32
  [rows, 3], in the shard's order."""
  starts, rows = sequences.starts, manifest.shards[shard].rows
  first = shard * manifest.rows_per_shard
  begin = int(np.searchsorted(starts, first, side='right')) - 1
  end = int(np.searchsorted(starts, first + rows, side='left'))
  i, position = np.nonzero(sequences.keep(begin, end))
  mine = slice(skip := first - starts[begin], skip + rows)
  i, position = i[mine], position[mine]
  ids = sequences.tokens(begin, end)[i, position]
  tokens = np.stack([i + begin, position, ids], axis=1).astype(np.int32)
  return tokens[shard_order(rows, manifest.seed, shard)]
