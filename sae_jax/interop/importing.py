"""Stores of activations that other programs have computed already.

An importer (saelens.py, llamascopium.py, npy.py) opens a folder as a `Source`.
Its tokens are read first and make the plan, then its rows, piece by piece;
killed, the same import goes on like a harvest.
"""

import bisect
import dataclasses
import importlib.metadata
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from absl import logging

from sae_jax.errors import UserError
from sae_jax.interop.source import (
  Piece,
  Source,
  bar,
  identity,
  named,
  numbered,
  progress,
  shuffled,
)
from sae_jax.store import quantise
from sae_jax.store.create import create, new_folder
from sae_jax.store.folder import another_harvest
from sae_jax.store.manifest import (
  DTYPES,
  FILE,
  Manifest,
  Site,
  local_root,
  read_manifest,
)
from sae_jax.store.plan import (
  check_dtype,
  check_sizes,
  differing_keys,
  least_rows,
  plan,
)
from sae_jax.store.sequences import Spool, spool
from sae_jax.store.shard import NotFinite
from sae_jax.store.statistics import Moments, merge_all, moments
from sae_jax.store.writer import StoreWriter, open_writer

# Rows that int8 columns are measured on: the standard deviation is then known
# to a percent. From so many pieces at least, all over the source.
_SAMPLE, _SAMPLE_PIECES = 16_384, 16


@dataclasses.dataclass(frozen=True)
class Options:
  """How the store is cut, and which tokens get no row: the first `skip_first`
  of every sequence and the ids in `skip_tokens` (padding, BOS). shuffle: also
  the order of the sequences. model_name: for sources that do not say it."""

  dtype: str = 'float32'
  rows_per_shard: int = 1 << 20
  rows_per_block: int = 256
  held_out_shards: int = 1
  norm_shards: int = 1
  seed: int = 0
  skip_first: int = 0
  skip_tokens: tuple[int, ...] = ()
  shuffle: bool = False
  model_name: str = ''


def import_rows(
  root: str | Path, importer: str, source: Source, options: Options
) -> Manifest:
  """Makes the store at `root`, or what is missing of it.

  importer: its name, for the manifest. Returns the complete manifest. Raises
  UserError for what the user can mend; the same call goes on after that.
  """
  check_options(options, source)
  root, text = local_root(root), identity(source)
  config, numbers = recorded(importer, source, options), None
  if options.shuffle:
    source, numbers = shuffled(source, options.seed)
  with new_folder(root) as folder:
    if not existing(folder, config, text, model(source, options)):
      make_plan(folder, source, options, numbers, config, text)
  try:
    with open_writer(root) as writer:
      fill(writer, source)
      return writer.finish()
  except NotFinite as error:
    raise named(source, error) from None


def check_options(options: Options, source: Source) -> None:
  """UserError for a bad dtype, sizes that do not fit, impossible skipping."""
  check_dtype('dtype', options.dtype)
  check_sizes(**_sizes(options))
  said = source.model.get('model_name')
  if options.model_name and said and said != options.model_name:
    raise UserError(
      f'model_name: {options.model_name!r}, but {source.root} says {said!r}: '
      'leave it out'
    )
  if options.skip_first and not source.context:
    raise UserError(
      f'skip_first: the rows of {source.root} stand alone, without positions: '
      'leave it 0'
    )
  if not 0 <= options.skip_first < source.length:
    raise UserError(
      f'skip_first: {options.skip_first}; sequences have {source.length} '
      f'tokens: use 0 to {source.length - 1}'
    )


def recorded(importer: str, source: Source, options: Options) -> dict[str, Any]:
  """The manifest's config: the same for the same import."""
  chosen = dataclasses.asdict(options)
  chosen['skip_tokens'] = sorted(options.skip_tokens)
  # `path` is not compared: contents are, by their hash.
  return {'import': {'from': importer, 'path': str(source.root)} | chosen}


def existing(
  root: Path,
  config: dict[str, Any],
  text: dict[str, Any],
  model: dict[str, Any],
) -> Manifest | None:
  """The manifest in the folder; UserError when it is of another import."""
  if not (root / FILE).exists():
    return None
  old = read_manifest(root, complete=False)
  keys = differing_keys(old.config, config)
  keys += [f'source ({key})' for key in text if old.text.get(key) != text[key]]
  # The names of the sites are in `hooks`.
  keys += [f'model ({key})' for key in differing_keys(old.model, model)]
  if keys:
    raise another_harvest(root, keys)
  return old


def make_plan(
  root: Path,
  source: Source,
  options: Options,
  numbers: np.ndarray | None,
  config: dict[str, Any],
  text: dict[str, Any],
) -> Manifest:
  """Reads all tokens and writes the manifest of the rows they will have.

  numbers: of every piece's first sequence in the source, for a shuffled one.
  """
  with spool(root, source.length) as pieces:
    read = read_tokens(source, options, pieces)
    check_rows(source, options, read.rows)
    tokens, bits = (whole[: read.sequences] for whole in pieces.arrays())
    manifest = plan(
      tokens,
      bits,
      sites(source, options, read),
      rows=read.rows,
      seed=options.seed,
      model=model(source, options),
      text=text,
      policy=policy(source, options),
      config=config,
      made_by=made_by(),
      **_sizes(options),
    )
    logging.info(
      'source: %s sequences of %d tokens, %s rows of them in %d shards',
      f'{read.sequences:,}', source.length, f'{read.rows:,}',
      len(manifest.shards),
    )  # fmt: skip
    documents = None
    if numbers is not None:  # where a row of a shuffled source came from
      documents = np.stack([numbers, read.begins * source.length], axis=1)
      documents = documents[read.begins < read.sequences]
    return create(root, manifest, tokens, bits, documents)


class Read(NamedTuple):
  """What the tokens say.

  rows they give; sequences up to the last one that has a row, the others would
  belong to no shard; full: pieces with a row; begins: number of the first
  sequence of every piece, int64 [pieces].
  """

  rows: int
  sequences: int
  full: list[Piece]
  begins: np.ndarray


def read_tokens(source: Source, options: Options, pieces: Spool) -> Read:
  """Reads the tokens of all pieces into the spool."""
  rows = sequences = used = 0
  full, begins = [], []
  for piece in progress(source.pieces, 'tokens'):
    ids, keep = kept_tokens(source, options, piece)
    pieces.add(ids, keep)
    begins.append(sequences)
    with_rows = np.flatnonzero(keep.any(axis=1))
    if len(with_rows):
      full.append(piece)
      used = sequences + int(with_rows[-1]) + 1
    rows, sequences = rows + int(keep.sum()), sequences + len(ids)
  return Read(rows, used, full, np.array(begins, np.int64))


def check_rows(source: Source, options: Options, rows: int) -> None:
  """UserError when nothing is left, or too little for the split."""
  if not rows:
    raise UserError(
      f'source: no row of {source.root} is left: every token is masked out by '
      'the source, skip_first or skip_tokens'
    )
  needed = least_rows(**_sizes(options))
  if rows < needed:
    raise UserError(
      f'source: {source.root} gives {rows:,} rows, {options.held_out_shards} '
      f'held-out and {options.norm_shards} normaliser shards of '
      f'{options.rows_per_shard:,} need at least {needed:,}: give a smaller '
      'rows_per_shard'
    )


def kept_tokens(
  source: Source, options: Options, piece: Piece
) -> tuple[np.ndarray, np.ndarray]:
  """(ids int32 [q, T], which have a row, bool [q, T]) of a piece."""
  ids, keep = source.tokens(piece)
  keep = keep & ~np.isin(ids, options.skip_tokens)
  keep[:, : options.skip_first] = False
  bad = keep & ((ids < 0) | (ids > np.iinfo(np.int32).max))
  if bad.any():
    i, p = map(int, np.argwhere(bad)[0])
    place = source.where(next(iter(source.hooks)), piece, i, p)
    raise UserError(
      f'source: {place}: token id {ids[i, p]}, which is none: if it is padding '
      'give it in skip_tokens'
    )
  return np.where(keep, ids, ids.clip(0)).astype(np.int32), keep


def sites(source: Source, options: Options, read: Read) -> list[Site]:
  """The store's sites; for int8 with the offset and scale of every column."""
  made = []
  for name, width in source.widths.items():
    site = Site(name, width, options.dtype)
    if site.dtype == 'int8':
      sample = sample_moments(source, options, read, name)
      offset, scale = quantise.columns(sample)
      site = dataclasses.replace(site, offset=offset, scale=scale)
    made.append(site)
  return made


def sample_moments(
  source: Source, options: Options, read: Read, site: str
) -> Moments:
  """Moments of rows from all over the source, without position 0 where there
  are positions: its norm is up to 100 times the others'."""
  pieces = read.full
  enough = -(-_SAMPLE * len(pieces) // read.rows)
  count = min(max(_SAMPLE_PIECES, enough), len(pieces))
  found = []
  for i in np.linspace(0, len(pieces) - 1, count).round().astype(int):
    _, keep = kept_tokens(source, options, pieces[i])
    inner = keep.copy()
    inner[:, : int(source.context)] = False
    where = np.flatnonzero(inner if inner.any() else keep)
    few = np.zeros(keep.size, bool)
    few[where[:: max(1, len(where) * count // _SAMPLE)]] = True
    values = source.rows(site, pieces[i], few.reshape(keep.shape))
    # What is not finite is named when its shard is full.
    found.append(moments(np.nan_to_num(values.astype(np.float32))))
  return merge_all(found)


def model(source: Source, options: Options) -> dict[str, Any]:
  """What the source, or the user, says of the model; no hashes of it."""
  name = source.model.get('model_name') or options.model_name or 'unknown'
  return {'name': name, 'hooks': source.hooks} | source.model


def policy(source: Source, options: Options) -> dict[str, Any]:
  """Which tokens have rows, and what the sequences are."""
  alone = 'none: a row is a sequence, its token at position 1 of 2'
  return {
    'positions_without_rows': list(range(options.skip_first)),
    'tokens_without_rows': sorted(options.skip_tokens),
    'order': 'shuffled' if options.shuffle else 'that of the source',
    'context': 'sequences of the source' if source.context else alone,
    'source_dtypes': {site: d.name for site, d in source.dtypes.items()},
  } | source.notes


def fill(writer: StoreWriter, source: Source) -> None:
  """Reads and writes what is missing, piece by piece, in global order."""
  starts, m = writer.sequences.starts, writer.manifest
  total = sum(m.shards[s].rows for s in writer.missing)
  with bar(total, 'rows') as shown:
    for piece, begin in numbered(source.pieces):
      count = piece.end - piece.begin
      last = min(begin + count, m.sequences)
      begin = min(begin, last)
      rows = range(starts[begin], starts[last])
      if not _overlaps(writer, rows):
        continue
      keep = np.zeros((count, m.sequence_length), bool)
      keep[: last - begin] = writer.sequences.keep(begin, last)
      picked = {
        site.name: source.rows(site.name, piece, keep).astype(
          DTYPES['float32'] if site.dtype == 'int8' else DTYPES[site.dtype],
          copy=False,
        )
        for site in m.sites
      }
      shown.update(writer.write(rows.start, picked))


def _overlaps(writer: StoreWriter, rows: range) -> bool:
  size = writer.manifest.rows_per_shard
  first, end = rows.start // size, -(-rows.stop // size)
  missing = writer.missing[bisect.bisect_left(writer.missing, first) :][:1]
  return len(rows) > 0 and any(s < end for s in missing)


def made_by() -> dict[str, str]:
  """The programs that read the rows."""
  names = ('sae-jax', 'numpy')
  return {name: importlib.metadata.version(name) for name in names}


def _sizes(options: Options) -> dict[str, int]:
  names = ('rows_per_shard', 'rows_per_block', 'held_out_shards', 'norm_shards')
  return {name: getattr(options, name) for name in names}
