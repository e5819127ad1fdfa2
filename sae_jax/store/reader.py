"""Reads a store: the held-out rows in file order, sequences, the normaliser.

Works on a store that is still being written, for what is there of it. Needs
numpy, not jax. Training batches are in batches.py.
"""

import itertools
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
from sae_jax.store.statistics import Moments, Parted, beyond, norms, part

# Rows that the median norm is measured on: its error is a percent of the
# norms' spread.
_SAMPLE = 16_384
# Times the median norm that a row is called an outlier from. Attention sinks
# have a hundred; the rows of ordinary tokens lie within a factor of three.
OUTLIER = 10.0


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
  root: str | Path, site: str, bound: float | None = None
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
  """Blocks of the held-out shards in file order.

  Yields (rows [n, width] in the stored dtype, tokens [n, 3] int32: sequence,
  position, token id), n = rows_per_block or less: at the end of a shard, and
  where rows have a norm above `bound` (None: the store's own) and are left
  out. Files are checked before this returns, blocks as they are read
  (UserError).
  """
  manifest = read_manifest(root, complete=False)
  return shard_blocks(root, site, range(manifest.held_out_shards), bound)


def shard_blocks(
  root: str | Path, site: str, shards: range, bound: float | None = None
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
  """As `held_out`, for any range of shards."""
  root = local_root(root)
  manifest = read_manifest(root, complete=False)
  bound = manifest.site(site).bound if bound is None else bound
  pairs = [
    (
      site_file(root, manifest, site, shard),
      ShardFile(root, manifest, TOKENS, shard),
    )
    for shard in shards
  ]
  blocks = (
    (rows.read(block), tokens.read(block))
    for rows, tokens in pairs
    for block in range(rows.blocks)
  )
  if bound == math.inf:
    return blocks
  kept = ((x, tokens, ~beyond(x, bound)) for x, tokens in blocks)
  return ((x[k], tokens[k]) for x, tokens, k in kept)


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


def norm_sample(
  root: str | Path, site: str, bound: float = math.inf
) -> Iterator[np.ndarray]:
  """Blocks of the first 16,384 rows of the normaliser shards, which lie there
  in random order, less those beyond the bound. UserError when those shards are
  not written yet."""
  m = read_manifest(root, complete=False)
  shards = range(m.held_out_shards, m.pinned_shards)
  blocks = -(-_SAMPLE // m.rows_per_block)
  found = shard_blocks(root, site, shards, bound)
  return (rows for rows, _ in itertools.islice(found, blocks))


def median_norm(root: str | Path, site: str) -> float:
  """The median of |x| of `norm_sample`: what is far above it is an outlier."""
  found = [norms(rows) for rows in norm_sample(root, site)]
  return float(np.median(np.concatenate(found)))


def outlier_words(site: str, found: Parted) -> str:
  """A line about rows beyond OUTLIER times the median norm; '' where they carry
  next to nothing."""
  if found.variance_beyond < 0.01:
    return ''
  return (
    f'{site}: {found.beyond.n:,} of {found.all.n:,} rows looked at have more '
    f'than {OUTLIER:g} times the median norm and carry '
    f'{found.variance_beyond:.0%} of the variance; train with '
    f'--config.store.max_norm={OUTLIER:g} to leave them out (docs/store.md)'
  )


def bound_of(root: str | Path, site: str, max_norm: float = 0.0) -> float:
  """The norm above which a row is left out, inf for none: the store's own, or
  `max_norm` times the median norm where that is less."""
  own = read_manifest(root, complete=False).site(site).bound
  return min(own, max_norm * median_norm(root, site)) if max_norm else own


def normalizer(
  root: str | Path, site: str, bound: float = math.inf
) -> Normalizer:
  """Mean and mean squared norms of the normaliser shards; with a bound below
  the store's own those of `norm_sample`.

  The same numbers while a store grows and when it is complete. UserError when
  those shards are not written yet.
  """
  root = local_root(root)
  manifest = read_manifest(root, complete=False)
  entry = manifest.site(site)
  if bound < entry.bound:
    m = part(norm_sample(root, site), bound).within
    return Normalizer(m.mean.astype(np.float32), *mean_squared_norms(m))
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
