"""Reads a store: the held-out rows in file order, sequences, the normaliser.

Works on a store that is still being written, for what is there of it. Needs
numpy, not jax. Training batches are in batches.py.
"""

import itertools
import math
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

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
from sae_jax.store.statistics import Moments, beyond, moments_of, norms, within

_SAMPLE = 16_384  # rows for the median norm: within a percent of their spread
OUTLIER = (
  10.0  # median norms: sinks have a hundred, ordinary tokens up to three
)
ADVICE = 'train without them by --config.store.max_norm=10 (docs/store.md)'


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
  less the rows of a norm above `bound` (0: none; None: the store's). Files are
  checked before this returns, blocks as they are read (UserError).
  """
  manifest = read_manifest(root, complete=False)
  blocks = shard_blocks(root, site, range(manifest.held_out_shards))
  bound = manifest.site(site).max_norm if bound is None else bound
  kept = ((x, tokens, ~beyond(x, bound)) for x, tokens in blocks)
  return ((x[k], tokens[k]) for x, tokens, k in kept)


def shard_blocks(
  root: str | Path, site: str, shards: Iterable[int]
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
  """As `held_out`, all rows of any shards."""
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


def norm_sample(root: str | Path, site: str) -> Iterator[np.ndarray]:
  """Blocks of the first rows of the normaliser shards, which lie there in
  random order. UserError before they are written."""
  m = read_manifest(root, complete=False)
  found = shard_blocks(root, site, range(m.held_out_shards, m.pinned_shards))
  count = -(-_SAMPLE // m.rows_per_block)
  return (rows for rows, _ in itertools.islice(found, count))


def bound_of(root: str | Path, site: str, max_norm: float) -> float:
  """The norm above which rows are left out, 0 for none: the store's own, or
  `max_norm` times the median of `norm_sample` where that is less."""
  own = read_manifest(root, complete=False).site(site).max_norm
  if not max_norm:
    return own
  found = np.concatenate([norms(x) for x in norm_sample(root, site)])
  return min(own or math.inf, max_norm * float(np.median(found)))


def outliers(
  root: str | Path, site: str, blocks: Iterable | None = None
) -> dict[str, Any]:
  """count of the rows of blocks (None: `norm_sample`) are beyond OUTLIER times
  the median norm and have a share of sum |x - mean|^2; said: the same."""
  limit, mean = bound_of(root, site, OUTLIER), normalizer(root, site).mean
  sums = np.zeros((2, 2))  # of all and of the outliers: rows, |x - mean|^2
  for x in norm_sample(root, site) if blocks is None else blocks:
    far = np.stack([np.ones(len(x)), norms(x - mean) ** 2])
    sums += far.sum(1), far[:, beyond(x, limit)].sum(1)
  (rows, squares), (count, theirs) = sums.tolist()
  share = theirs / (squares or 1)
  said = (
    f'{count:,.0f} of {rows:,.0f} rows, those of a norm above {limit:.4g}, '
  )
  said += f'have {share:.1%} of the variance'
  return dict(count=int(count), share=share, limit=limit, said=said)


def normalizer(root: str | Path, site: str, bound: float = 0) -> Normalizer:
  """Mean and mean squared norms of the normaliser shards; of `norm_sample` with
  a bound that is not the store's own.

  The same numbers while a store grows and when it is complete. UserError when
  those shards are not written yet.
  """
  root = local_root(root)
  manifest = read_manifest(root, complete=False)
  entry = manifest.site(site)
  if bound not in (0, entry.max_norm):
    m = moments_of(within(x, bound) for x in norm_sample(root, site))
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
