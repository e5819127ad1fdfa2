"""What a store still lacks, and its end: the manifest says `complete`."""

import dataclasses
from collections.abc import Iterable
from pathlib import Path

from sae_jax.errors import UserError
from sae_jax.store.folder import locked
from sae_jax.store.manifest import (
  COMPLETE,
  WRITING,
  FileEntry,
  Manifest,
  Site,
  bin_path,
  planned_parts,
  read_manifest,
  write_manifest,
)
from sae_jax.store.records import merge_records, read_record


def missing_shards(
  root: Path, manifest: Manifest, among: Iterable[int] | None = None
) -> list[int]:
  """Shards that are not on the disk, or not of their right size."""
  shards = range(len(manifest.shards)) if among is None else among
  return [s for s in shards if read_record(root, manifest, s) is None]


def removed_shards(manifest: Manifest) -> list[int]:
  """Shards whose rows were deleted after all runs had read them."""
  return [s for s, entry in enumerate(manifest.shards) if entry.removed]


def finalize(root: Path) -> Manifest:
  """Completes the manifest of a store whose shards are all there.

  Raises UserError naming the shards that are not.
  """
  read_manifest(root, complete=False)  # there is a store
  with locked(root):
    manifest = read_manifest(root, complete=False)
    if manifest.state == COMPLETE:
      return manifest
    shards = range(len(manifest.shards))
    records = [read_record(root, manifest, s) for s in shards]
    found = [record for record in records if record]
    if len(found) < len(records):
      missing = [s for s, record in enumerate(records) if record is None]
      raise UserError(
        f'store.path: {len(missing)} of {len(shards)} shards of {root} are '
        f'not written yet (the first is {missing[0]}): run the tasks that '
        'write them, started again they go on'
      )
    manifest = merge_records(manifest, found)
    for path in root.rglob('*.tmp'):  # of killed tasks: nothing is missing
      path.unlink()
    write_manifest(root, manifest)
    return manifest


def reopen(root: Path, manifest: Manifest) -> Manifest:
  """Takes `complete` back from a store of which a shard must be written again:
  but for the planned files no checksum stands, and no statistics. The folder
  is locked."""
  if manifest.state == COMPLETE:
    manifest = _as_planned(manifest)
    write_manifest(root, manifest)
  return manifest


def _as_planned(manifest: Manifest) -> Manifest:
  """A complete manifest as it was before: its files have no checksums but
  the planned ones, and its sites no statistics."""
  count, shards = len(manifest.shards), []
  for s, entry in enumerate(manifest.shards):
    planned = {bin_path(part, s, count) for part in planned_parts()}
    files = {
      name: file if name in planned else FileEntry(file.bytes)
      for name, file in entry.files.items()
    }
    shards.append(dataclasses.replace(entry, files=files))
  sites = tuple(
    Site(s.name, s.width, s.dtype, s.offset, s.scale, s.max_norm)
    for s in manifest.sites
  )
  return dataclasses.replace(
    manifest, state=WRITING, shards=tuple(shards), sites=sites
  )
