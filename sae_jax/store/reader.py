"""Reads a store: the held-out rows in file order, sequences, the normaliser.

Works on a store that is still being written, for what is there of it. Needs
numpy, not jax. Training batches are in batches.py.
"""

import math
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
from absl import logging

from sae_jax.errors import UserError
from sae_jax.store.files import ShardFile, site_file
from sae_jax.store.manifest import (
  SEQUENCES,
  TOKENS,
  Manifest,
  Normalizer,
  local_root,
  read_manifest,
)
from sae_jax.store.records import (
  finished_files,
  mean_squared_norms,
  norm_moments,
  read_record,
)
from sae_jax.store.statistics import Moments


def await_shards(
  root: str | Path,
  shards: Iterable[int],
  *,
  sleep: Callable[[float], object] = time.sleep,
) -> None:
  """Returns when shards are written; says whom it waits for meanwhile."""
  root = local_root(root)
  manifest = read_manifest(root, complete=False)
  spoken = -60.0
  for shard in shards:
    while finished_files(root, manifest, shard) is None:
      if time.monotonic() - spoken > 30:
        spoken = time.monotonic()
        logging.info(waiting_for(root, shard, len(manifest.shards)))
      sleep(0.2)
      manifest = read_manifest(root, complete=False)


def waiting_for(root: Path, shard: int, shards: int) -> str:
  """What a trainer that is ahead of the harvest says."""
  return (
    f'waiting for the harvest: shard {shard} of {shards} of {root} is not '
    'written yet (start the harvest again if it does not run)'
  )


def held_out(
  root: str | Path, site: str
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
  """Blocks of the held-out shards in file order.

  Yields (rows [n, width] in the stored dtype, tokens [n, 3] int32: sequence,
  position, token id), n = rows_per_block or less at the end of a shard. Files
  are checked before this returns, blocks as they are read (UserError).
  """
  manifest = read_manifest(root, complete=False)
  return shard_blocks(root, site, range(manifest.held_out_shards))


def shard_blocks(
  root: str | Path, site: str, shards: range
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
  """As `held_out`, for any range of shards."""
  root = local_root(root)
  manifest = read_manifest(root, complete=False)
  manifest.site(site)
  pairs = [
    (
      site_file(root, manifest, site, shard),
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
  manifest = read_manifest(root, complete=False)
  if not 0 <= shard < len(manifest.shards):
    raise UserError(f'shard: {shard} of {len(manifest.shards)} at {root}')
  return ShardFile(root, manifest, SEQUENCES, shard).read_all()


def sequence(root: str | Path, i: int) -> np.ndarray:
  """Token ids [T] int32 of sequence number i, as in the tokens of a row."""
  root = local_root(root)
  manifest = read_manifest(root, complete=False)
  for shard, entry in enumerate(manifest.shards):
    at = i - entry.first_sequence
    if 0 <= at < entry.sequences:
      file = ShardFile(root, manifest, SEQUENCES, shard)
      block, row = divmod(at, file.block_rows)
      return file.read(block)[row]
  raise UserError(f'sequence: {i} of {manifest.sequences} at {root}')


def normalizer(root: str | Path, site: str) -> Normalizer:
  """Mean and mean squared norms of the normaliser shards.

  The same numbers while a store grows and when it is complete. UserError when
  those shards are not written yet.
  """
  root = local_root(root)
  manifest = read_manifest(root, complete=False)
  entry = manifest.site(site)
  centred, raw = entry.mean_squared_norm_centred, entry.mean_squared_norm_raw
  if entry.mean is not None and centred is not None and raw is not None:
    return Normalizer(np.array(entry.mean, np.float32), centred, raw)

  m = _norm_moments(root, manifest, site)
  return Normalizer(m.mean.astype(np.float32), *mean_squared_norms(m))


def _norm_moments(root: Path, manifest: Manifest, site: str) -> Moments:
  """From the records, while the manifest does not have them."""

  def record(shard: int):
    if found := read_record(root, manifest, shard):
      return found
    raise UserError(
      f'store.path: shard {shard} of {root} is not written yet and the '
      'normaliser needs it: run the harvest again, it goes on'
    )

  return norm_moments(manifest, site, record)


class Sizes(NamedTuple):
  """How large the numbers of a site are, in the subject model's units."""

  largest: float  # |number|
  exact: bool  # False: there are at least such; older stores say no more
  mean: float  # |largest mean of a column|
  rms: float  # of all numbers


def sizes(root: str | Path, site: str) -> Sizes:
  """From the statistics of all rows; of a store that is still being written,
  of the normaliser shards, which must be there (UserError)."""
  root = local_root(root)
  manifest = read_manifest(root, complete=False)
  entry = manifest.site(site)
  mean, raw = entry.all_mean, entry.all_mean_squared_norm_raw
  largest = entry.all_max_abs
  if mean is None or raw is None:
    m = _norm_moments(root, manifest, site)
    mean, raw, largest = m.mean, mean_squared_norms(m)[1], m.max_abs
  means, rms = float(np.abs(mean).max()), math.sqrt(raw / entry.width)
  if largest is None:
    return Sizes(max(means, rms), False, means, rms)
  return Sizes(largest, True, means, rms)
