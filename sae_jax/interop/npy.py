"""Activations in .npy files: rows [n, width], read through memory maps.

Beside them a .npy of tokens: ids [n], or [n, 3] of sequence, position, id in
any order. Without sequences every row stands alone.
"""

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

import ml_dtypes
import numpy as np

from sae_jax.errors import UserError
from sae_jax.interop.source import Piece, Source, choose_hooks, cut

TOKENS = 'tokens.npy'
_BF16 = np.dtype(ml_dtypes.bfloat16)
_FLOATS = (np.dtype(np.float16), np.dtype(np.float32), np.dtype(np.float64))


def open_source(
  root: Path,
  sites: Mapping[str, str],
  *,
  tokens: str = '',
  sequence_length: int = 0,
  bfloat16: bool = False,
) -> Source:
  """The folder as a Source.

  Args:
    sites: {'': site} for files in the folder itself, {subfolder: site}.
    tokens: the file of tokens, <root>/tokens.npy if '', 'none' for unknown
      ones (0).
    sequence_length: every so many rows are a sequence, for ids [n].
    bfloat16: two-byte numbers that numpy has no name for are bfloat16.

  Raises UserError for files of another kind, cut off, of different widths,
  tokens that do not fit the rows.
  """
  if not root.is_dir():
    raise UserError(f'source: no folder {root}')
  path = Path(tokens) if tokens else root / TOKENS
  path = path.expanduser()
  if '' in sites:
    chosen = choose_hooks(root, sites, ['.'])
  else:
    folders = [p.name for p in root.iterdir() if p.is_dir() and _files(p, path)]
    chosen = choose_hooks(root, sites, folders)
  names = {site: _files(root / hook, path) for site, hook in chosen.items()}
  maps = {s: [_rows(f, bfloat16) for f in names[s]] for s in chosen}
  for site in chosen:
    check_rows(root / chosen[site], names[site], maps[site])
  totals = {site: sum(map(len, maps[site])) for site in chosen}
  total = next(iter(totals.values()))
  if len(set(totals.values())) > 1:
    raise UserError(f'source: different numbers of rows in {root}: {totals}')
  values = None if tokens == 'none' else read_tokens(path, total)
  layout = make_layout(path, values, total, sequence_length)
  starts = {s: np.cumsum([0, *map(len, maps[s])]) for s in chosen}

  def ids(piece: Piece) -> tuple[np.ndarray, np.ndarray]:
    sequence, position, token, _ = layout.places(piece)
    out = np.zeros((piece.end - piece.begin, layout.length), np.int64)
    keep = np.zeros(out.shape, bool)
    out[sequence - piece.begin, position] = token
    keep[sequence - piece.begin, position] = True
    return out, keep

  def rows(site: str, piece: Piece, keep: np.ndarray) -> np.ndarray:
    sequence, position, _, index = layout.places(piece)
    index = index[keep[sequence - piece.begin, position]]
    return gather(maps[site], starts[site], index)

  def where(site: str, piece: Piece, i: int, p: int) -> str:
    sequence, position, _, index = layout.places(piece)
    here = (sequence == piece.begin + i) & (position == p)
    row = int(index[here][0])
    file = int(np.searchsorted(starts[site], row, side='right')) - 1
    return f'{names[site][file]}: row {row - starts[site][file]}'

  widest = max(m[0].shape[1] * m[0].itemsize for m in maps.values())
  each = -(-total // layout.sequences) * widest
  beside = [] if values is None else [path]
  return Source(
    root=root,
    files=[f for site in chosen for f in names[site]] + beside,
    hooks=chosen,
    widths={site: maps[site][0].shape[1] for site in chosen},
    dtypes={site: maps[site][0].dtype for site in chosen},
    length=layout.length,
    context=layout.context,
    pieces=cut([layout.sequences], each),
    tokens=ids,
    rows=rows,
    where=where,
    model={},
    notes={'masked_by_source': 'nothing'}
    | ({'token_ids': 'unknown, all 0'} if values is None else {}),
  )


class Layout(NamedTuple):
  """Which row is which token.

  sequences of `length` tokens; context: whether neighbours are known.
  places(piece) gives sequence, position, id and number of the row in the
  source, int64 [n] each, ordered by sequence and position.
  """

  sequences: int
  length: int
  context: bool
  places: Callable[[Piece], tuple[np.ndarray, ...]]


def make_layout(
  path: Path, tokens: np.ndarray | None, rows: int, sequence_length: int
) -> Layout:
  """The layout of so many rows with tokens [rows], [rows, 3] or None."""
  if sequence_length < 0 or sequence_length == 1:
    raise UserError(
      f'sequence_length: {sequence_length}; use 2 or more, or 0 for rows that '
      'stand alone'
    )
  if tokens is not None and tokens.ndim == 2:
    if sequence_length:
      raise UserError(
        f'sequence_length: {path} says which sequence every row belongs to: '
        'leave it 0'
      )
    return _listed(path, tokens)
  length = sequence_length

  def places(piece: Piece) -> tuple[np.ndarray, ...]:
    begin, end = (min(rows, at * (length or 1)) for at in piece[1:])
    index = np.arange(begin, end)
    ids = index * 0 if tokens is None else tokens[begin:end].astype(np.int64)
    if length:
      return index // length, index % length, ids, index
    # As write_arrays does: position 1 of 2, position 0 is token 0.
    return index, np.ones_like(index), ids, index

  if length:
    return Layout(-(-rows // length), length, True, places)
  return Layout(rows, 2, False, places)


def _listed(path: Path, tokens: np.ndarray) -> Layout:
  """The layout of tokens [n, 3]; holds 8 to 16 bytes a row in memory."""
  sequence, position = (np.array(tokens[:, i], np.int64) for i in (0, 1))
  if (low := np.minimum(sequence, position)).min() < 0:
    raise UserError(
      f'source: {path}: row {low.argmin()}: a negative sequence or position'
    )
  length, count = int(position.max()) + 1, int(sequence.max()) + 1
  if count > 16 * len(tokens):
    raise UserError(
      f'source: {path}: sequence {count - 1:,} for {len(tokens):,} rows: '
      'number the sequences from 0'
    )
  key = sequence * length + position
  del sequence, position
  order = None
  if (key[1:] <= key[:-1]).any():  # not in order: rows are read one by one
    order = np.argsort(key, kind='stable')
    key = key[order]
    if len(same := np.flatnonzero(key[1:] == key[:-1])):
      a, b = divmod(int(key[same[0]]), length)
      raise UserError(
        f'source: {path}: rows {order[same[0]]} and {order[same[0] + 1]} are '
        f'both of sequence {a}, position {b}: give one'
      )

  def places(piece: Piece) -> tuple[np.ndarray, ...]:
    begin, end = np.searchsorted(
      key, [piece.begin * length, piece.end * length]
    )
    mine, index = key[begin:end], np.arange(begin, end)
    index = index if order is None else order[index]
    ids = tokens[index, 2].astype(np.int64)
    return mine // length, mine % length, ids, index

  return Layout(count, max(length, 2), True, places)


def gather(
  maps: list[np.ndarray], starts: np.ndarray, index: np.ndarray
) -> np.ndarray:
  """Rows `index` of files laid end to end; file i begins at starts[i]."""
  out = np.empty((len(index), maps[0].shape[1]), maps[0].dtype)
  files = np.searchsorted(starts, index, side='right') - 1
  for i in np.unique(files):
    mine = files == i
    out[mine] = maps[i][index[mine] - starts[i]]
  return out


def read_tokens(path: Path, rows: int) -> np.ndarray:
  """Token ids [rows] or [rows, 3], mapped; UserError when they do not fit."""
  if not path.exists():
    raise UserError(
      f'source: no file of tokens {path}: give --tokens=FILE, or --tokens=none '
      'for rows of unknown tokens'
    )
  values = _mapped(path)
  whole = np.issubdtype(values.dtype, np.integer)
  if not whole or not (values.ndim == 1 or values.shape[1:] == (3,)):
    raise UserError(
      f'source: {path}: {values.dtype} of shape {values.shape}; token ids are '
      'integers [n], or [n, 3]: sequence, position, id'
    )
  if len(values) != rows:
    raise UserError(f'source: {path}: {len(values):,} tokens for {rows:,} rows')
  return values


def check_rows(folder: Path, names: list[Path], maps: list[np.ndarray]) -> None:
  """UserError for a folder without rows, or of rows that differ in kind."""
  if not sum(map(len, maps)):
    raise UserError(
      f'source: no rows in {folder}: no .npy files, or empty ones'
    )
  for path, rows in zip(names, maps, strict=True):
    for what, mine, first in (
      ('width', rows.shape[1], maps[0].shape[1]),
      ('dtype', rows.dtype, maps[0].dtype),
    ):
      if mine != first:
        raise UserError(
          f'source: {path}: {what} {mine}, in {names[0].name} {first}: rows of '
          'one site are all alike'
        )


def _files(folder: Path, tokens: Path) -> list[Path]:
  """The .npy files of rows; 'part-2' comes before 'part-10'."""
  if not folder.is_dir():
    return []
  # re.split gives text and digits in turn, so that like is compared with like.
  number = lambda p: [
    int(part) if part.isdigit() else part for part in re.split(r'(\d+)', p.name)
  ]
  found = [
    p for p in folder.glob('*.npy') if p not in (tokens, folder / TOKENS)
  ]
  return sorted(found, key=number)


def _rows(path: Path, bfloat16: bool) -> np.ndarray:
  """Rows [n, width] of a file, mapped."""
  rows = _mapped(path)
  if rows.ndim != 2 or not rows.shape[1]:
    raise UserError(f'source: {path}: shape {rows.shape}; rows are [n, width]')
  # What numpy makes of bfloat16: nameless bytes, or a view as integers.
  if rows.dtype in (np.dtype('V2'), np.dtype(np.uint16)):
    if not bfloat16:
      raise UserError(
        f'source: {path}: {rows.dtype} numbers, which may be bfloat16: say so '
        'with --source_dtype=bfloat16'
      )
    return rows.view(_BF16)
  if rows.dtype not in _FLOATS:
    raise UserError(
      f'source: {path}: {rows.dtype} numbers; rows are float16, float32 or '
      'float64'
    )
  return rows


def _mapped(path: Path) -> np.ndarray:
  try:
    return np.load(path, mmap_mode='r', allow_pickle=False)
  except (ValueError, OSError, EOFError) as error:
    raise UserError(
      f'source: {path}: no .npy file of numbers, or cut off ({error}): write '
      'it again'
    ) from error
