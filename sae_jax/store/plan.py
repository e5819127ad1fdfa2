"""Decides, before any row is computed, which row goes where.

Rows are numbered in the order of their sequences; shard s gets the rows
[s * rows_per_shard, (s + 1) * rows_per_shard).
"""

import dataclasses
import difflib
from collections.abc import Collection, Sequence
from typing import Any

import numpy as np
import xxhash

from sae_jax.errors import UserError
from sae_jax.store.manifest import (
  DTYPES,
  KEEP,
  SEQUENCES,
  WRITING,
  FileEntry,
  Manifest,
  ShardEntry,
  Site,
  bin_path,
  layout,
  part_rows,
  parts,
)


def plan(
  sequences: np.ndarray,
  keep: np.ndarray,
  sites: Sequence[Site],
  *,
  rows: int,
  rows_per_shard: int,
  rows_per_block: int,
  held_out_shards: int,
  norm_shards: int,
  seed: int,
  model: dict[str, Any],
  text: dict[str, Any],
  policy: dict[str, Any],
  config: dict[str, Any],
  made_by: dict[str, Any],
  keep_bytes: int = 0,
  trainers: int = 1,
) -> Manifest:
  """The manifest, in state `writing`, of a store that is to be made.

  Args:
    sequences: token ids [Q, T] int32; may lie on the disk.
    keep: which tokens get a row, as `pack_keep` packs it, uint8 [Q, T / 8];
      at least `rows` bits are set, and the last sequence has one of the first
      `rows`.
    sites: without statistics; those of int8 rows with offset and scale.
    rows: rows to write; the other arguments are the manifest's fields.

  Raises UserError for sizes that do not fit together; see `check_sizes`.
  """
  check_sizes(rows_per_shard, rows_per_block, held_out_shards, norm_shards)
  check_rows(rows, rows_per_shard, rows_per_block, held_out_shards, norm_shards)
  for site in sites:
    check_dtype('store.dtype', site.dtype)
  starts = row_starts(keep, rows)
  count = -(-rows // rows_per_shard)
  firsts = [*range(0, rows, rows_per_shard), rows]
  sequence_firsts = [int(np.searchsorted(starts[:-1], at)) for at in firsts]
  shards = tuple(
    ShardEntry(
      rows=firsts[s + 1] - firsts[s],
      first_sequence=sequence_firsts[s],
      sequences=sequence_firsts[s + 1] - sequence_firsts[s],
      files={},
    )
    for s in range(count)
  )
  manifest = Manifest(
    state=WRITING,
    sites=tuple(sites),
    rows=rows,
    rows_per_shard=rows_per_shard,
    rows_per_block=rows_per_block,
    sequences=len(sequences),
    sequence_length=sequences.shape[1],
    held_out_shards=held_out_shards,
    norm_shards=norm_shards,
    seed=seed,
    shards=shards,
    model=model,
    text=text,
    policy=policy,
    config=config,
    made_by=made_by,
    keep_bytes=keep_bytes,
    trainers=trainers,
  )
  return _with_files(manifest, {SEQUENCES: sequences, KEEP: keep})


def _with_files(manifest: Manifest, planned: dict[str, np.ndarray]) -> Manifest:
  """Adds the sizes of all files, and the checksums of the planned ones."""
  shards = []
  for s, entry in enumerate(manifest.shards):
    files = {}
    for part in parts(manifest):
      dtype, width = layout(manifest, part)
      size = part_rows(manifest, part, s) * width * dtype.itemsize
      checksum = None
      if part in planned:
        mine = planned[part][sequence_range(entry)]
        sums = block_checksums(mine, manifest.rows_per_block)
        checksum = xxhash.xxh3_64_hexdigest(sums)
      name = bin_path(part, s, len(manifest.shards))
      files[name] = FileEntry(size, checksum)
    shards.append(dataclasses.replace(entry, files=files))
  return dataclasses.replace(manifest, shards=tuple(shards))


def sequence_range(entry: ShardEntry) -> slice:
  """The sequences whose first row lies in a shard."""
  return slice(entry.first_sequence, entry.first_sequence + entry.sequences)


def block_checksums(rows: np.ndarray, rows_per_block: int) -> bytes:
  """The .blocks file: xxh3_64 of every block, little-endian uint64."""
  sums = [
    xxhash.xxh3_64_intdigest(
      np.ascontiguousarray(rows[at : at + rows_per_block]).view(np.uint8).data
    )
    for at in range(0, len(rows), rows_per_block)
  ]
  return np.array(sums, '<u8').tobytes()


def pack_keep(keep: np.ndarray) -> np.ndarray:
  """bool [n, T] as bits, uint8 [n, ceil(T / 8)], the lowest bit first."""
  return np.packbits(keep, axis=1, bitorder='little')


def unpack_keep(bits: np.ndarray, length: int) -> np.ndarray:
  """bool [n, T] of what `pack_keep` made."""
  return np.unpackbits(bits, axis=1, count=length, bitorder='little') > 0


def row_starts(keep: np.ndarray, rows: int) -> np.ndarray:
  """Number of the first row of every sequence, and the end: [Q + 1] int64.

  keep: packed, uint8 [Q, T / 8]; read in pieces, since it may lie on the disk.
  """
  ends, step = np.zeros(len(keep) + 1, np.int64), 1 << 16
  for at in range(0, len(keep), step):
    counts = np.bitwise_count(keep[at : at + step]).sum(1, dtype=np.int64)
    ends[at + 1 : at + step + 1] = counts
  return np.minimum(np.cumsum(ends), rows)


def check_sizes(
  rows_per_shard: int,
  rows_per_block: int,
  held_out_shards: int,
  norm_shards: int,
) -> None:
  """UserError unless blocks fill shards and the counts make sense."""
  if rows_per_block < 1:
    raise UserError(f'store.rows_per_block: {rows_per_block}; use 1 or more')
  if rows_per_shard < 1 or rows_per_shard % rows_per_block:
    right = max(round(rows_per_shard / rows_per_block), 1) * rows_per_block
    raise UserError(
      f'store.rows_per_shard: {rows_per_shard:,} is not a multiple of '
      f'store.rows_per_block {rows_per_block:,}: use {right}'
    )
  if held_out_shards < 0:
    raise UserError(f'store.held_out_shards: {held_out_shards}; use 0 or more')
  if norm_shards < 1:
    raise UserError(f'store.norm_shards: {norm_shards}; use 1 or more')


def least_rows(
  rows_per_shard: int,
  rows_per_block: int,
  held_out_shards: int,
  norm_shards: int,
) -> int:
  """Rows for the held-out shards, all normaliser shards begun, one block."""
  shards = held_out_shards + norm_shards - 1
  return shards * rows_per_shard + rows_per_block


def check_rows(
  rows: int,
  rows_per_shard: int,
  rows_per_block: int,
  held_out_shards: int,
  norm_shards: int,
) -> None:
  """UserError when there are too few rows to fill the split."""
  least = least_rows(
    rows_per_shard, rows_per_block, held_out_shards, norm_shards
  )
  if rows < least:
    raise UserError(
      f'harvest.rows: {rows:,} rows; {held_out_shards} held-out and '
      f'{norm_shards} normaliser shards of {rows_per_shard:,} rows need at '
      f'least {least:,}: more rows, or a smaller store.rows_per_shard'
    )


def check_dtype(
  key: str, dtype: str, dtypes: Collection[str] = tuple(DTYPES)
) -> None:
  """UserError naming the nearest right name."""
  if dtype not in dtypes:
    near = difflib.get_close_matches(dtype, dtypes, 1, 0.0)[0]
    raise UserError(
      f'{key}: {dtype!r}; did you mean {near!r}? ({", ".join(dtypes)})'
    )


# Contents are compared by hash.
_NOT_COMPARED = ('path',)


def differences(old: Manifest, new: Manifest) -> list[str]:
  """Names of what would make another store, for two manifests of one folder.

  Config keys, without those that say where something lies (`*.path`: contents
  are compared by hash), then anything else that was decided beforehand.
  """
  keys = differing_keys(old.config, new.config)
  for name in ('model', 'text', 'policy'):
    pair = getattr(old, name), getattr(new, name)
    keys += [f'{name} ({key})' for key in differing_keys(*pair)]
  return keys or differing_keys(_planned(old), _planned(new))


def differing_keys(
  old: dict[str, Any], new: dict[str, Any], prefix: str = ''
) -> list[str]:
  """Dotted keys that differ between two nested dicts of JSON.

  Less those that do not alter a row: where things lie, new keys that are off.
  """
  keys = []
  for key in sorted(old.keys() | new.keys()):
    a, b = old.get(key), new.get(key)
    if isinstance(a, dict) and isinstance(b, dict):
      keys += differing_keys(a, b, f'{prefix}{key}.')
    elif a != b and key not in _NOT_COMPARED and (key in old or b):
      keys.append(prefix + key)
  return keys


def _planned(manifest: Manifest) -> dict[str, Any]:
  """What `plan` decides, in a form that two manifests share."""
  count = len(manifest.shards)
  data = {
    name: getattr(manifest, name)
    for name in ('rows', 'seed', 'rows_per_shard', 'rows_per_block')
    + ('sequence_length', 'held_out_shards', 'norm_shards')
  }
  return data | {
    'sites': [(site.name, site.width, site.dtype) for site in manifest.sites],
    'tokens': [
      entry.files[bin_path(SEQUENCES, s, count)]
      for s, entry in enumerate(manifest.shards)
    ],
  }
