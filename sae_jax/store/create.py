"""Begins a store: its plan, and what its rows are computed from."""

import contextlib
import dataclasses
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
import xxhash

from sae_jax.locks import HELD
from sae_jax.store import quantise
from sae_jax.store.folder import (
  LOCK,
  check_folder,
  check_same,
  disk_errors_are_users,
  locked,
)
from sae_jax.store.manifest import Manifest, Site, local_root, write_manifest
from sae_jax.store.plan import pack_keep, plan
from sae_jax.store.sequences import documents_checksum, write_planned
from sae_jax.store.statistics import moments
from sae_jax.store.writer import open_writer


@contextlib.contextmanager
def new_folder(root: str | Path) -> Iterator[Path]:
  """The folder of a store that is to be planned, locked, made if need be.

  Tasks of one harvest come here one after the other. Nothing is left behind
  when there is no store in it at the end.
  """
  root = local_root(root)
  check_folder(root)
  made = not root.exists()
  with disk_errors_are_users(root), locked(root, 'plans the store'):
    try:
      for path in root.glob('*.tmp'):  # of a plan that was killed
        path.unlink()
      yield root
    finally:
      left = list(root.iterdir())
      if made and {p.name.partition(HELD)[0] for p in left} == {LOCK}:
        for path in left:
          path.unlink()
        root.rmdir()


def create(
  root: Path,
  manifest: Manifest,
  sequences: np.ndarray,
  keep: np.ndarray,
  documents: np.ndarray | None = None,
) -> Manifest:
  """Begins a store, or takes the one there is when it is the same.

  Args:
    root: its folder, which exists and is locked (`folder.locked`).
    manifest: as `plan` makes it from sequences and keep (packed).
    documents: where they begin, int64 [m, 2], see Spool.add.

  Raises UserError when the folder holds another store.
  """
  if documents is None:
    documents = np.empty((0, 2), np.int64)
  manifest = dataclasses.replace(
    manifest,
    text=manifest.text | {'documents_xxh3': documents_checksum(documents)},
  )
  if old := check_same(root, manifest):
    return old
  write_planned(root, manifest, sequences, keep, documents)
  write_manifest(root, manifest)
  return manifest


def write_arrays(
  root: str | Path,
  rows: Mapping[str, np.ndarray],
  *,
  rows_per_shard: int,
  rows_per_block: int,
  held_out_shards: int = 1,
  norm_shards: int = 1,
  seed: int = 0,
  dtype: str | None = None,
) -> Manifest:
  """Makes a store of rows that lie in memory: {site: [N, width]}.

  For planted data; dtype: 'float32', 'bfloat16' or 'int8' on the disk, that of
  the arrays if None. Row i gets the context-free place: sequence i, position 1
  of 2, token 0. Raises UserError as StoreWriter does.
  """
  count = len(next(iter(rows.values())))
  digest = xxhash.xxh3_64()
  for values in rows.values():
    digest.update(np.ascontiguousarray(values).view(np.uint8).data)
  sequences = np.zeros((count, 2), np.int32)
  keep = pack_keep(np.tile([False, True], (count, 1)))
  manifest = plan(
    sequences,
    keep,
    [array_site(name, values, dtype) for name, values in rows.items()],
    rows=count,
    rows_per_shard=rows_per_shard,
    rows_per_block=rows_per_block,
    held_out_shards=held_out_shards,
    norm_shards=norm_shards,
    seed=seed,
    model={'name': 'arrays'},
    text={'rows_xxh3': digest.hexdigest()},
    policy={},
    config={},
    made_by={},
  )
  with new_folder(root) as folder:
    create(folder, manifest, sequences, keep)
  with open_writer(folder) as writer:
    writer.write(0, rows)
    return writer.finish()


def array_site(name: str, rows: np.ndarray, dtype: str | None) -> Site:
  """A site for rows in memory, with the columns' codes for int8."""
  site = Site(name, rows.shape[1], dtype or rows.dtype.name)
  if site.dtype != 'int8':
    return site
  offset, scale = quantise.columns(moments(rows))
  return dataclasses.replace(site, offset=offset, scale=scale)
