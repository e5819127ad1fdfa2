"""Ways to damage a store on purpose."""

import json
import shutil
from pathlib import Path

import numpy as np
import xxhash

from sae_jax.store.manifest import (
  bin_path,
  blocks_path,
  layout,
  read_manifest,
)
from sae_jax.store.plan import block_checksums
from sae_jax.store.records import record_path


def copied(store: Path, target: Path) -> Path:
  """A copy that a test may break."""
  shutil.copytree(store, target)
  return target


def contents(root: Path) -> dict[str, bytes]:
  return {
    path.relative_to(root).as_posix(): path.read_bytes()
    for path in root.rglob('*')
    if path.is_file()
  }


def path_of(root: Path, part: str, shard: int) -> Path:
  return root / bin_path(part, shard, len(read_manifest_(root).shards))


def read_manifest_(root: Path):
  return read_manifest(root, complete=False)


def flip(path: Path, at: int = -1) -> None:
  """Alters one byte."""
  raw = bytearray(path.read_bytes())
  raw[at] ^= 0x40
  path.write_bytes(bytes(raw))


def edit(path: Path, change) -> None:
  """Alters a JSON file in place, in the manner of who wrote it."""
  data = json.loads(path.read_text())
  change(data)
  indent = 1 if path.name == 'manifest.json' else None
  path.write_text(json.dumps(data, indent=indent, ensure_ascii=False) + '\n')


def alter_rows(root: Path, part: str, shard: int, change) -> None:
  """Alters rows [n, width] in place, and all checksums with them."""
  m = read_manifest_(root)
  path, (dtype, width) = path_of(root, part, shard), layout(m, part)
  rows = np.fromfile(path, dtype).reshape(-1, width)
  change(rows)
  path.write_bytes(rows.tobytes())
  name = path.relative_to(root).as_posix()
  sums = block_checksums(rows, m.rows_per_block)
  (root / blocks_path(name)).write_bytes(sums)
  checksum = xxhash.xxh3_64_hexdigest(sums)

  def in_record(data):
    data['files'][name]['checksum'] = checksum

  def in_manifest(data):
    if data['state'] == 'complete':
      data['shards'][shard]['files'][name]['checksum'] = checksum

  edit(record_path(root, m, shard), in_record)
  edit(root / 'manifest.json', in_manifest)
