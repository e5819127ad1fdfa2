"""The record of a finished shard: what makes a killed harvest go on.

<root>/records/shard-00000-of-00008.json is written after the files of its
shard; a shard is finished if it has one and the sizes on disk agree, or if it
was removed after all trainers had read it.
"""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import xxhash

from sae_jax.paths import write_atomic
from sae_jax.store.manifest import (
  COMPLETE,
  FileEntry,
  Manifest,
  Site,
  blocks_path,
)
from sae_jax.store.statistics import Moments, merge_all


class Record(NamedTuple):
  """Sizes and checksums of a shard's files, moments of its rows per site."""

  files: dict[str, FileEntry]
  moments: dict[str, Moments]


def record_path(root: Path, manifest: Manifest, shard: int) -> Path:
  """The file that says that a shard is finished."""
  count = len(manifest.shards)
  return root / f'records/shard-{shard:05d}-of-{count:05d}.json'


def write_record(
  root: Path, manifest: Manifest, shard: int, record: Record
) -> None:
  """Says that the shard is finished."""
  moments = {
    site: {
      'rows': m.n,
      'mean': m.mean.tolist(),
      'm2': m.m2.tolist(),
      'max_abs': m.max_abs,
    }
    for site, m in record.moments.items()
  }
  files = {k: dataclasses.asdict(v) for k, v in record.files.items()}
  # The files on a line of their own: a trainer that starts beside a harvest
  # reads those of every shard, and moments take 9 ms to parse.
  text = (
    f'{{"files": {json.dumps(files)},\n"moments": {json.dumps(moments)}}}\n'
  )
  write_atomic(record_path(root, manifest, shard), text)


def read_record(root: Path, manifest: Manifest, shard: int) -> Record | None:
  """The record of a finished shard; None when the shard must be written.

  Looks at sizes and at the checksums' own checksum, not at every row. Of a
  removed shard only the record is left.
  """
  record = load_record(root, manifest, shard)
  if record is None:
    return None
  sizes = {k: v.bytes for k, v in record.files.items()}
  entry = manifest.shards[shard]
  planned = {k: v.bytes for k, v in entry.files.items()}
  if sizes != planned:
    return None
  if not entry.removed:
    if not all(_sound(root, *it) for it in record.files.items()):
      return None
  return record


def load_record(root: Path, manifest: Manifest, shard: int) -> Record | None:
  """A shard's record as it was written; None: there is none, or it
  cannot be read."""
  try:
    text = record_path(root, manifest, shard).read_text(encoding='utf-8')
    data = json.loads(text)
    files = {name: FileEntry(**entry) for name, entry in data['files'].items()}
    moments = {
      site: Moments(
        m['rows'], np.array(m['mean']), np.array(m['m2']), m.get('max_abs')
      )
      for site, m in data['moments'].items()
    }
  except (FileNotFoundError, ValueError, KeyError, TypeError, AttributeError):
    return None
  return Record(files, moments)


def finished_files(
  root: Path, manifest: Manifest, shard: int
) -> dict[str, FileEntry] | None:
  """Sizes and checksums of a shard's files, None while it is being written.

  From the manifest when it is complete, else from the shard's record; the
  files themselves are not looked at.
  """
  if manifest.state == COMPLETE:
    return manifest.shards[shard].files
  try:
    with open(record_path(root, manifest, shard), encoding='utf-8') as file:
      head = json.loads(file.readline().rstrip('\n,') + '}')
    return {name: FileEntry(**entry) for name, entry in head['files'].items()}
  except FileNotFoundError:
    return None
  except (ValueError, KeyError, TypeError, AttributeError):  # laid out anew
    record = load_record(root, manifest, shard)
    return record.files if record else None


def delete_record(root: Path, manifest: Manifest, shard: int) -> None:
  """Says that the shard is not finished: the next harvest writes it again."""
  record_path(root, manifest, shard).unlink(missing_ok=True)


def _sound(root: Path, name: str, entry: FileEntry) -> bool:
  try:
    sums = (root / blocks_path(name)).read_bytes()
    size = (root / name).stat().st_size
  except FileNotFoundError:
    return False
  checksum = xxhash.xxh3_64_hexdigest(sums)
  return size == entry.bytes and checksum == entry.checksum


def merge_records(manifest: Manifest, records: list[Record]) -> Manifest:
  """The complete manifest: checksums, and statistics in shard order."""
  shards = tuple(
    dataclasses.replace(entry, files=record.files)
    for entry, record in zip(manifest.shards, records, strict=True)
  )
  sites = tuple(
    with_statistics(
      site,
      norm_moments(manifest, site.name, records.__getitem__),
      merge_all(record.moments[site.name] for record in records),
    )
    for site in manifest.sites
  )
  return dataclasses.replace(
    manifest, state=COMPLETE, shards=shards, sites=sites
  )


def norm_moments(
  manifest: Manifest, site: str, record: Callable[[int], Record]
) -> Moments:
  """Moments of the normaliser shards: the first `norm_shards` of training."""
  first, last = manifest.held_out_shards, manifest.pinned_shards
  return merge_all(record(s).moments[site] for s in range(first, last))


def mean_squared_norms(m: Moments) -> tuple[float, float]:
  """E|x - mean|^2 and E|x|^2."""
  centred = float(m.m2.sum() / m.n)
  return centred, centred + float(np.square(m.mean).sum())


def with_statistics(site: Site, norm: Moments, every: Moments) -> Site:
  """A site with the moments of the normaliser shards and of all rows."""
  centred, raw = mean_squared_norms(norm)
  all_centred, all_raw = mean_squared_norms(every)
  return dataclasses.replace(
    site,
    mean=norm.mean.tolist(),
    mean_squared_norm_centred=centred,
    mean_squared_norm_raw=raw,
    all_mean=every.mean.tolist(),
    all_mean_squared_norm_centred=all_centred,
    all_mean_squared_norm_raw=all_raw,
    all_max_abs=every.max_abs,
    all_rows=every.n if site.max_norm else None,
  )
