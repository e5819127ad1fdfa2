"""The manifest: what an activation store holds, and where; see docs/store.md.

Jobs meet only here. `complete` is written last; while it says `writing` the
records of finished shards (records.py) say what can be read already.
"""

import dataclasses
import hashlib
import json
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from sae_jax.errors import UserError
from sae_jax.paths import write_atomic

FORMAT, VERSION = 'sae_jax.store', 2
WRITING, COMPLETE = 'writing', 'complete'
FILE = 'manifest.json'
DTYPES: dict[str, np.dtype] = {
  'float32': np.dtype(np.float32),
  'bfloat16': np.dtype(ml_dtypes.bfloat16),
  'int8': np.dtype(np.int8),  # with offsets and scales: quantise.py
}
INT32 = np.dtype(np.int32)
TOKENS, SEQUENCES, KEEP = 'tokens', 'sequences', 'keep'
DOCUMENTS = 'sequences/documents.bin'  # int64 [documents, 2]


class Normalizer(NamedTuple):
  """First and second moments of rows.

  mean [width] float32; `mean_squared_norm_centred` is E|x - mean|^2 and
  `mean_squared_norm_raw` is E|x|^2, in the subject model's units.
  """

  mean: np.ndarray
  mean_squared_norm_centred: float
  mean_squared_norm_raw: float


@dataclasses.dataclass(frozen=True)
class Site:
  """One place in the subject model: vectors of `width` numbers.

  offset and scale [width] belong to int8 rows and are fixed before the first
  row; so is max_norm, beyond which (0: no bound) readers and statistics leave
  rows out. The statistics (in float64, of the rows as stored) are None while
  writing: of the normaliser shards, and of all rows of the store. all_max_abs,
  their largest |number|, is also None in stores older than it; all_rows, how
  many they are, is there with a bound.
  """

  name: str
  width: int
  dtype: str
  offset: list[float] | None = None
  scale: list[float] | None = None
  max_norm: float = 0.0
  mean: list[float] | None = None
  mean_squared_norm_centred: float | None = None
  mean_squared_norm_raw: float | None = None
  all_mean: list[float] | None = None
  all_mean_squared_norm_centred: float | None = None
  all_mean_squared_norm_raw: float | None = None
  all_max_abs: float | None = None
  all_rows: int | None = None

  @property
  def read_dtype(self) -> np.dtype:
    """The type rows have when read: int8 is decoded to float32."""
    return DTYPES['float32' if self.dtype == 'int8' else self.dtype]


@dataclasses.dataclass(frozen=True)
class FileEntry:
  """Size of a .bin file and xxh3_64 (hex) of its .blocks, None while writing.

  .blocks holds the xxh3_64 of every block, so that the pair checks the file.
  """

  bytes: int
  checksum: str | None = None


@dataclasses.dataclass(frozen=True)
class ShardEntry:
  """The rows, and the sequences whose first row lies here, of one shard.

  files: path below the root -> FileEntry, for every .bin of the shard.
  removed: its rows have been read by every trainer and deleted since.
  """

  rows: int
  first_sequence: int
  sequences: int
  files: dict[str, FileEntry]
  removed: bool = False


@dataclasses.dataclass(frozen=True)
class Manifest:
  """Everything known about a store.

  model, text, policy, config and made_by are plain JSON objects that say where
  the rows come from. keep_bytes: what the store may take on the disk, 0 for no
  bound; trainers: how many must have registered before a shard is removed.
  """

  state: str
  sites: tuple[Site, ...]
  rows: int
  rows_per_shard: int
  rows_per_block: int
  sequences: int
  sequence_length: int
  held_out_shards: int
  norm_shards: int
  seed: int
  shards: tuple[ShardEntry, ...]
  model: dict[str, Any]
  text: dict[str, Any]
  policy: dict[str, Any]
  config: dict[str, Any]
  made_by: dict[str, Any]
  keep_bytes: int = 0
  trainers: int = 1

  def site(self, name: str) -> Site:
    """The site of that name; UserError naming those there are."""
    for site in self.sites:
      if site.name == name:
        return site
    there = ', '.join(site.name for site in self.sites)
    raise UserError(f'store.site: no {name!r} in this store; it has: {there}')

  @property
  def training_shards(self) -> range:
    """Indices of the shards that are not held out."""
    return range(self.held_out_shards, len(self.shards))

  @property
  def pinned_shards(self) -> int:
    """Number of first shards that are never removed: held-out, normaliser."""
    return min(self.held_out_shards + self.norm_shards, len(self.shards))


def bin_path(part: str, shard: int, shards: int) -> str:
  """Path below the root of a shard's file; part: 'tokens', 'sites/<name>'."""
  return f'{part}/shard-{shard:05d}-of-{shards:05d}.bin'


def blocks_path(path: str) -> str:
  """Path of the block checksums of a .bin file."""
  return path.removesuffix('.bin') + '.blocks'


def site_part(site: str) -> str:
  """The folder of a site's shards, below the root."""
  return f'sites/{site}'


def scale_part(site: str) -> str:
  """The folder of an int8 site's row scales, below the root."""
  return f'scales/{site}'


def layout(manifest: Manifest, part: str) -> tuple[np.dtype, int]:
  """(dtype, numbers per row) of the .bin files of 'tokens', 'sites/x', ..."""
  if part == TOKENS:
    return INT32, 3
  if part == SEQUENCES:
    return INT32, manifest.sequence_length
  if part == KEEP:
    return np.dtype(np.uint8), -(-manifest.sequence_length // 8)
  kind, _, name = part.partition('/')
  if kind == 'scales':
    return DTYPES['float32'], 1
  site = manifest.site(name)
  return DTYPES[site.dtype], site.width


def part_rows(manifest: Manifest, part: str, shard: int) -> int:
  """Rows of the .bin file of one part of a shard."""
  entry = manifest.shards[shard]
  return entry.sequences if part in (SEQUENCES, KEEP) else entry.rows


def planned_parts() -> list[str]:
  """The kinds of files that are written before the first row."""
  return [SEQUENCES, KEEP]


def row_parts(manifest: Manifest) -> list[str]:
  """The kinds of files that hold a shard's rows, and go when it is removed."""
  scales = [scale_part(s.name) for s in manifest.sites if s.dtype == 'int8']
  return [TOKENS, *(site_part(s.name) for s in manifest.sites), *scales]


def parts(manifest: Manifest) -> list[str]:
  """Every kind of file of a shard."""
  return [*planned_parts(), *row_parts(manifest)]


def shard_bytes(manifest: Manifest, shard: int) -> int:
  """What the rows of a shard take on the disk, all sites and tokens."""
  entry, count = manifest.shards[shard], len(manifest.shards)
  return sum(
    entry.files[bin_path(part, shard, count)].bytes
    for part in row_parts(manifest)
  )


def store_fingerprint(manifest: Manifest, site: str) -> str:
  """What tells one store from another: which rows of a site are where.

  Of all that is decided before the first row, so that it is the same while a
  store grows and after shards were removed.
  """
  m, entry = manifest, manifest.site(site)
  cut = (m.rows_per_shard, m.rows_per_block, m.held_out_shards, m.norm_shards)
  coded = (entry.width, entry.dtype, entry.offset, entry.scale)
  origin = [m.model, m.text, m.policy, without_paths(m.config)]
  sequences = [
    shard.files[bin_path(SEQUENCES, i, len(m.shards))].checksum
    for i, shard in enumerate(m.shards)
  ]
  said = [site, m.rows, m.seed, cut, coded, origin, sequences]
  return hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()


def without_paths(config: dict[str, Any]) -> dict[str, Any]:
  """A nested dict less its keys `path`, and less what other sites there are."""
  return {
    key: without_paths(value) if isinstance(value, dict) else value
    for key, value in config.items()
    if key not in ('path', 'sites')
  }


def local_root(root: str | Path) -> Path:
  """The store's folder; UserError for none, or a bucket URL."""
  if not str(root):
    raise UserError('config.store.path is empty: give the folder of a store')
  if '://' in str(root):
    raise UserError(
      f'store.path: {str(root)!r} is a URL: stores are read and written in '
      'place, mount the bucket and give the folder'
    )
  return Path(root).expanduser()


def write_manifest(root: str | Path, manifest: Manifest) -> None:
  """Writes <root>/manifest.json, whole or not at all."""
  header = {'format': FORMAT, 'version': VERSION}
  data = header | dataclasses.asdict(manifest)
  text = json.dumps(data, indent=1, ensure_ascii=False) + '\n'
  write_atomic(local_root(root) / FILE, text)


def read_manifest(root: str | Path, *, complete: bool = True) -> Manifest:
  """Reads <root>/manifest.json.

  Raises UserError when there is none, when it is of another format or version,
  and, if `complete`, when the harvest has not finished.
  """
  path = local_root(root) / FILE
  try:
    data = json.loads(path.read_text(encoding='utf-8'))
  except (FileNotFoundError, NotADirectoryError):
    raise UserError(
      f'store.path: no activation store at {root} (no {FILE}): '
      'make one with launch/harvest.py, or give its folder'
    ) from None
  except OSError as error:
    raise UserError(f'{path}: cannot be read ({error.strerror})') from error
  except ValueError as error:
    raise UserError(f'{path}: not a JSON file ({error})') from error
  manifest = _from_json(data, path)
  if complete and manifest.state != COMPLETE:
    raise UserError(
      f'store.path: the store at {root} is not complete (state '
      f'{manifest.state!r}): run the same harvest again, it goes on, or '
      'launch/harvest.py --finalize if every shard is there'
    )
  return manifest


def _from_json(data: Any, path: Path) -> Manifest:
  if not isinstance(data, dict) or data.get('format') != FORMAT:
    raise UserError(f'{path}: not the manifest of an activation store')
  version = data.get('version')
  if version != VERSION:
    newer = isinstance(version, int) and version > VERSION
    raise UserError(
      f'{path}: store version {version}, this program reads version {VERSION}: '
      + ('update sae_jax' if newer else 'harvest again into another folder')
    )
  names = [field.name for field in dataclasses.fields(Manifest)]
  try:
    values = {name: data[name] for name in names}
    values['sites'] = tuple(Site(**site) for site in data['sites'])
    values['shards'] = tuple(_shard_from_json(s) for s in data['shards'])
  except (KeyError, TypeError, AttributeError) as error:
    raise UserError(f'{path}: damaged manifest ({error})') from error
  return Manifest(**values)


def _shard_from_json(data: dict[str, Any]) -> ShardEntry:
  files = {path: FileEntry(**file) for path, file in data['files'].items()}
  return ShardEntry(
    rows=data['rows'],
    first_sequence=data['first_sequence'],
    sequences=data['sequences'],
    files=files,
    removed=data['removed'],
  )
