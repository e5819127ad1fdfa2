"""Activations that llamascopium (Language-Model-SAEs) generated: a folder per
hook point with safetensors files, the chunks.

A chunk holds `activation` [n, T, width], `tokens` and `mask` [n, T], or, where
its rows were shuffled already, the same without T. A second leading axis is a
batch of batches.
"""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open

from sae_jax.errors import UserError
from sae_jax.interop.source import Piece, Source, alone, choose_hooks, cut

_NAME = re.compile(r'(?:shard-(\d+)-)?chunk-(\d+)\.(safetensors|pt)')
_FLOATS = {
  'F16': np.dtype(np.float16),
  'BF16': np.dtype(ml_dtypes.bfloat16),
  'F32': np.dtype(np.float32),
  'F64': np.dtype(np.float64),
}


class Chunk(NamedTuple):
  """One file: its tokens' shape, its rows' width and type."""

  path: Path
  shape: tuple[int, ...]  # [n, T] or [n], without the second leading axis
  width: int
  dtype: np.dtype
  masked: bool


def open_source(root: Path, sites: Mapping[str, str]) -> Source:
  """The folder as a Source; sites: {hook: site}, see `choose_hooks`.

  Raises UserError for other folders, chunks without their tensors or cut off,
  shapes that do not fit together, hook points whose chunks differ.
  """
  if not root.is_dir():
    raise UserError(f'source: no folder {root}')
  hooks = [p.name for p in root.iterdir() if p.is_dir() and _files(p)]
  if not hooks:
    raise UserError(
      f'source: {root} holds no folder of chunks (HOOK/chunk-00000000.'
      'safetensors): give the one that has a folder for every hook point'
    )
  chosen = choose_hooks(root, sites, hooks)
  chunks = {s: [_read_header(f) for f in _files(root / h)]
            for s, h in chosen.items()}  # fmt: skip
  for site in chosen:
    check_chunks(root, chosen[site], chunks[site])
  first = next(iter(chunks))
  for site in chosen:
    check_aligned(chunks[first], chunks[site], chosen[site])
  context = len(chunks[first][0].shape) == 2
  length = max(c.shape[1] for c in chunks[first]) if context else 2

  def tokens(piece: Piece) -> tuple[np.ndarray, np.ndarray]:
    found = [_tokens(chunks[site][piece.file], piece) for site in chosen]
    ids, keep = found[0]
    for site, (others, masked) in zip(chosen, found, strict=True):
      if not (np.array_equal(ids, others) and np.array_equal(keep, masked)):
        raise UserError(
          f'source: {chunks[site][piece.file].path}: other tokens or mask than '
          f'in {chunks[first][piece.file].path}: these hook points were not '
          'generated together'
        )
    if not context:
      return alone(ids, keep)
    padding = (0, 0), (0, length - ids.shape[1])
    return np.pad(ids, padding), np.pad(keep, padding)

  def rows(site: str, piece: Piece, keep: np.ndarray) -> np.ndarray:
    chunk = chunks[site][piece.file]
    values = _slice(chunk, 'activation', piece)
    if not context:
      return values[keep[:, 1]]
    return values[keep[:, : chunk.shape[1]]]

  def where(site: str, piece: Piece, i: int, p: int) -> str:
    row = f'row {piece.begin + i}' + f', token {p}' * context
    return f'{chunks[site][piece.file].path}: {row}'

  widest = max(c.width * c.dtype.itemsize for (c, *_) in chunks.values())
  counts = [chunk.shape[0] for chunk in chunks[first]]
  return Source(
    root=root,
    files=[c.path for site in chosen for c in chunks[site]],
    hooks=chosen,
    widths={site: chunks[site][0].width for site in chosen},
    dtypes={site: chunks[site][0].dtype for site in chosen},
    length=length,
    context=context,
    pieces=cut(counts, widest * (length if context else 1)),
    tokens=tokens,
    rows=rows,
    where=where,
    model=said(chunks[first][0].path),
    notes={
      'masked_by_source': 'by `mask`' if chunks[first][0].masked else 'nothing'
    },
  )


def _files(folder: Path) -> list[Path]:
  """The chunks of a hook point, by their numbers; UserError for .pt files."""
  found = []
  for path in folder.iterdir():
    if match := _NAME.fullmatch(path.name):
      if match[3] == 'pt':
        raise UserError(
          f'source: {path} is a pickle, which only torch reads: generate the '
          "activations with format='safetensors'"
        )
      found.append((int(match[1] or 0), int(match[2]), path))
  return [path for *_, path in sorted(found)]


def _read_header(path: Path) -> Chunk:
  """Shapes and type of a chunk; reads no rows."""
  try:
    with safe_open(path, 'np') as file:
      names = file.keys()
      if missing := [n for n in ('activation', 'tokens') if n not in names]:
        raise UserError(
          f'source: {path}: no tensor {missing[0]!r}; it has: '
          f'{", ".join(sorted(names))}'
        )
      values = file.get_slice('activation')
      shape, kind = tuple(values.get_shape()), values.get_dtype()
      beside = {
        name: tuple(file.get_slice(name).get_shape())
        for name in ('tokens', 'mask')
        if name in names
      }
  except (SafetensorError, OSError) as error:
    raise UserError(
      f'source: {path}: no safetensors file, or cut off ({error}): copy or '
      'generate it again'
    ) from error
  for name, other in beside.items():
    if other != shape[:-1]:
      raise UserError(
        f'source: {path}: {name} of shape {other} for an activation of shape '
        f'{shape}: generate it again'
      )
  if kind not in _FLOATS or not 2 <= len(shape) <= 4:
    raise UserError(
      f'source: {path}: activation is {kind} of shape {shape}; floats of shape '
      '[n, T, width] or [n, width] are needed'
    )
  if len(shape) == 4:
    shape = (shape[0] * shape[1], *shape[2:])
  return Chunk(path, shape[:-1], shape[-1], _FLOATS[kind], 'mask' in beside)


def check_chunks(root: Path, hook: str, chunks: list[Chunk]) -> None:
  """UserError when the chunks of a hook point are not of one kind."""
  if not chunks:
    raise UserError(f'source: no chunks in {root / hook}')
  first = chunks[0]
  for chunk in chunks:
    for what in ('width', 'dtype', 'masked'):
      mine, expected = getattr(chunk, what), getattr(first, what)
      if mine != expected:
        raise UserError(
          f'source: {chunk.path}: {what} {mine}, in {first.path.name} '
          f'{expected}: chunks of different runs in one folder?'
        )
    if len(chunk.shape) != len(first.shape):
      raise UserError(
        f'source: {chunk.path}: rows of shape {chunk.shape}, in '
        f'{first.path.name} {first.shape}: chunks of different runs?'
      )


def check_aligned(first: list[Chunk], chunks: list[Chunk], hook: str) -> None:
  """UserError when two hook points do not have the same chunks."""
  a, b = ([(c.path.name, c.shape) for c in x] for x in (first, chunks))
  if a != b:
    differ = sorted(set(a) ^ set(b))[0]
    raise UserError(
      f'source: hook points {first[0].path.parent.name!r} and {hook!r} differ '
      f'in their chunks ({differ[0]} with tokens {differ[1]} is in one alone): '
      'import them into different stores'
    )


def _slice(chunk: Chunk, name: str, piece: Piece) -> np.ndarray:
  """Sequences, or rows, [begin, end) of a tensor of a chunk."""
  ndim = len(chunk.shape) + (name == 'activation')
  try:
    with safe_open(chunk.path, 'np') as file:
      values = file.get_slice(name)
      shape = values.get_shape()
      if len(shape) == ndim:
        return values[piece.begin : piece.end]
      # Batches of batches: those that hold the piece.
      inner = shape[1]
      first = piece.begin // inner
      part = values[first : -(-piece.end // inner)]
      begin = piece.begin - first * inner
      flat = part.reshape(-1, *part.shape[2:])
      return flat[begin : begin + piece.end - piece.begin]
  except (SafetensorError, OSError) as error:
    raise UserError(f'source: {chunk.path}: damaged ({error})') from error


def _tokens(chunk: Chunk, piece: Piece) -> tuple[np.ndarray, np.ndarray]:
  """(ids int64, mask bool) of a piece, in the chunk's own shape."""
  ids = _slice(chunk, 'tokens', piece).astype(np.int64)
  if not chunk.masked:
    return ids, np.ones(ids.shape, bool)
  return ids, _slice(chunk, 'mask', piece) > 0


def said(path: Path) -> dict[str, Any]:
  """What the first chunk's .meta.json says of the model and the data."""
  meta = path.with_suffix('.meta.json')
  try:
    entries = json.loads(meta.read_text(encoding='utf-8'))
    first = entries[0]
    return {k: first[k] for k in ('model_name', 'dataset_name') if k in first}
  except FileNotFoundError:
    return {}
  except (ValueError, TypeError, LookupError) as error:
    raise UserError(f'{meta}: not a list of objects ({error})') from error
