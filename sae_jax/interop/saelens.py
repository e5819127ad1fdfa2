"""Activations that SAELens cached: an Arrow folder of the package `datasets`.

Its CacheActivationsRunner writes a column [T, width] per hook and `token_ids`
[T]; older versions left folders shard_0, shard_1, ... without token ids.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from sae_jax.errors import UserError
from sae_jax.interop.source import (
  Piece,
  Source,
  choose_hooks,
  cut,
  nearest,
)

TOKENS = 'token_ids'
_CONFIG = 'cache_activations_runner_cfg.json'  # beside the data on the hub


def open_source(
  root: Path, sites: Mapping[str, str], *, tokens: bool = True
) -> Source:
  """The folder as a Source; sites: {hook: site}, see `choose_hooks`.

  tokens: False takes a cache without token ids, they become 0. Raises
  UserError for other folders, missing columns, shapes that do not fit.
  """
  data = load(root)
  hooks = [n for n, f in data.features.items() if _matrix(f)]
  if not hooks:
    raise UserError(
      f'source: {root} holds no activations, only {_columns(data)}: a hook is '
      'a column of matrices [T, width]'
    )
  chosen = choose_hooks(root, sites, hooks)
  shapes = {site: data.features[hook].shape for site, hook in chosen.items()}
  lengths = {shape[0] for shape in shapes.values()}
  if len(lengths) > 1:
    raise UserError(
      f'sites: the hooks of {root} have sequences of {sorted(lengths)} tokens: '
      'import them into different stores'
    )
  length = lengths.pop()
  check_tokens(root, data, length, tokens)
  columns = {
    name: data.select_columns([name]).with_format('arrow')
    for name in [*chosen.values(), *([TOKENS] if tokens else [])]
  }
  dtypes = {s: np.dtype(data.features[h].dtype) for s, h in chosen.items()}
  widest = max(shapes[s][1] * dtypes[s].itemsize for s in chosen)

  def ids(piece: Piece) -> tuple[np.ndarray, np.ndarray]:
    shape = piece.end - piece.begin, length
    if not tokens:
      return np.zeros(shape, np.int64), np.ones(shape, bool)
    flat = _column(root, columns[TOKENS], TOKENS, piece).flatten()
    if len(flat) != shape[0] * length:
      raise UserError(
        f'source: {root}: {TOKENS} of sequences {piece.begin} to {piece.end} '
        f'are {len(flat):,} numbers, their rows {shape[0] * length:,}'
      )
    return flat.to_numpy().reshape(shape).astype(np.int64), np.ones(shape, bool)

  def rows(site: str, piece: Piece, keep: np.ndarray) -> np.ndarray:
    hook = chosen[site]
    column = _column(root, columns[hook], hook, piece)
    return column.to_numpy(zero_copy_only=True)[keep]

  return Source(
    root=root,
    files=sorted({Path(file['filename']) for file in data.cache_files}),
    hooks=chosen,
    widths={site: shape[1] for site, shape in shapes.items()},
    dtypes=dtypes,
    length=length,
    context=True,
    pieces=cut([len(data)], length * widest),
    tokens=ids,
    rows=rows,
    where=lambda site, piece, i, p: (
      f'{root}: {chosen[site]!r} of sequence {piece.begin + i}, token {p}'
    ),
    model=said(root),
    notes={'masked_by_source': 'nothing'}
    | ({} if tokens else {'token_ids': 'unknown, all 0'}),
  )


def load(root: Path) -> Any:
  """The `datasets.Dataset` in a folder, mapped into memory."""
  try:
    import datasets
  except ModuleNotFoundError:
    raise UserError(
      "source: SAELens' caches are read with the package datasets, which is "
      "not installed: pip install 'sae-jax[data]'"
    ) from None
  shards = sorted(root.glob('shard_*'), key=lambda p: (len(p.name), p.name))
  folders = [root] if (root / 'state.json').exists() or not shards else shards
  if not (folders[0] / 'state.json').exists():
    splits = sorted(p.parent.name for p in root.glob('*/state.json'))
    hint = f'; give one of its splits: {", ".join(splits)}' if splits else ''
    raise UserError(
      f'source: {root} is not what SAELens saves (no state.json){hint}'
    )
  try:
    parts: list[Any] = [datasets.load_from_disk(str(f)) for f in folders]
  except (OSError, ValueError, KeyError, TypeError) as error:
    raise UserError(f'source: {root}: damaged: {_line(error)}') from error
  for folder, part in zip(folders, parts, strict=True):
    if part.features != parts[0].features:
      raise UserError(
        f'source: {folder} holds {_columns(part)}, {folders[0].name} '
        f'{_columns(parts[0])}: import them into different stores'
      )
  return parts[0] if len(parts) == 1 else datasets.concatenate_datasets(parts)


def check_tokens(root: Path, data: Any, length: int, tokens: bool) -> None:
  """UserError for a missing or misshapen column of token ids."""
  if not tokens:
    return
  if TOKENS not in data.features:
    raise UserError(
      f'source: no column {TOKENS!r} in {root}'
      f'{nearest(TOKENS, data.column_names)}; it has: '
      f'{", ".join(data.column_names)}: --tokens=none imports the rows with '
      'unknown tokens'
    )
  said = getattr(data.features[TOKENS], 'length', -1)
  if said not in (-1, length):
    raise UserError(
      f'source: {root}: {said} token ids a sequence, rows for {length}'
    )


def said(root: Path) -> dict[str, Any]:
  """What the cache says of its model, where it lies beside its settings."""
  try:
    config = json.loads((root / _CONFIG).read_text(encoding='utf-8'))
    return {k: config[k] for k in ('model_name', 'dataset_path') if k in config}
  except FileNotFoundError:
    return {}
  except (ValueError, TypeError) as error:
    raise UserError(f'{root / _CONFIG}: not JSON ({error})') from error


def _columns(data: Any) -> str:
  """The columns with their shapes and types, for a message."""
  shapes = {n: getattr(f, 'shape', '') for n, f in data.features.items()}
  kinds = {n: getattr(f, 'dtype', '') for n, f in data.features.items()}
  return ', '.join(f'{n} {shapes[n]} {kinds[n]}'.strip() for n in shapes)


def _matrix(feature: Any) -> bool:
  shape = getattr(feature, 'shape', None)
  return isinstance(shape, tuple) and len(shape) == 2


def _column(root: Path, data: Any, name: str, piece: Piece) -> Any:
  """A column of sequences [begin, end) as one Arrow array without nulls."""
  try:
    column = data[piece.begin : piece.end].column(name).combine_chunks()
  except (OSError, ValueError) as error:  # pyarrow's errors are both
    raise UserError(f'source: {root}: damaged: {_line(error)}') from error
  if column.null_count:
    raise UserError(
      f'source: {root}: {name!r} is empty in sequence '
      f'{piece.begin + column.is_null().index(True).as_py()}'
    )
  return column


def _line(error: BaseException) -> str:
  return ' '.join(str(error).split()) or type(error).__name__
