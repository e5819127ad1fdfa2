"""Activations in somebody's folder, as the importers open them."""

import difflib
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import xxhash
from tqdm import tqdm

from sae_jax.errors import UserError
from sae_jax.store.order import DOCUMENTS, permutation
from sae_jax.store.shard import NotFinite

PIECE_BYTES = 32 << 20  # of one site's rows that are in memory at a time
# Of one site's rows that stay together in a shuffled source: large enough to be
# read at a disk's speed, small enough to be a sequence or a few.
SHUFFLE_BYTES = 1 << 20
# Of every so many bytes of a file the first `_HASHED` go into its hash.
_HASH_STEP, _HASHED = 64 << 20, 1 << 20


class Piece(NamedTuple):
  """Sequences [begin, end) of one file of a source."""

  file: int
  begin: int
  end: int


class Source(NamedTuple):
  """Activations in somebody's folder.

  root, files: where they are, all files that count; hooks: {site: the source's
  name of it}; widths and dtypes by site. length: T, tokens of a sequence;
  context: whether rows have neighbours, or are shuffled and stand alone.
  tokens(piece) gives ids [q, T] and which of them may have a row, bool [q, T];
  rows(site, piece, keep) the rows [n, width] of the n tokens of `keep`, in
  order; where(site, piece, i, p), for messages, the place of token p of its
  i-th sequence. model, notes: what the source says of the model and of itself.
  """

  root: Path
  files: list[Path]
  hooks: dict[str, str]
  widths: dict[str, int]
  dtypes: dict[str, np.dtype]
  length: int
  context: bool
  pieces: list[Piece]
  tokens: Callable[[Piece], tuple[np.ndarray, np.ndarray]]
  rows: Callable[[str, Piece, np.ndarray], np.ndarray]
  where: Callable[[str, Piece, int, int], str]
  model: dict[str, Any]
  notes: dict[str, Any]


def cut(counts: Iterable[int], bytes_of_one: int) -> list[Piece]:
  """Pieces of files with so many sequences each, of bounded size."""
  step = max(1, PIECE_BYTES // max(1, bytes_of_one))
  return [
    Piece(file, at, min(at + step, count))
    for file, count in enumerate(counts)
    for at in range(0, count, step)
  ]


def shuffled(source: Source, seed: int) -> tuple[Source, np.ndarray]:
  """The source with smaller pieces in an order of their own.

  The second is the number in the source of every piece's first sequence,
  int64 [pieces].
  """
  row = max(w * source.dtypes[s].itemsize for s, w in source.widths.items())
  step = max(
    1, SHUFFLE_BYTES // (row * (source.length if source.context else 1))
  )
  pieces, numbers, first = [], [], 0
  for file, begin, end in source.pieces:
    for at in range(begin, end, step):
      pieces.append(Piece(file, at, min(at + step, end)))
      numbers.append(first + at - begin)
    first += end - begin
  order = permutation(len(pieces), seed, DOCUMENTS)
  mixed = source._replace(pieces=[pieces[i] for i in order])
  return mixed, np.array(numbers, np.int64)[order]


def numbered(pieces: Iterable[Piece]) -> Iterator[tuple[Piece, int]]:
  """Pieces with the number of their first sequence in the store."""
  first = 0
  for piece in pieces:
    yield piece, first
    first += piece.end - piece.begin


def named(source: Source, error: NotFinite) -> UserError:
  """The same mistake, with the row's place in the source."""
  site, sequence, position = error.place
  pairs = reversed([*numbered(source.pieces)])
  piece, first = next((p, n) for p, n in pairs if n <= sequence)
  where = source.where(site, piece, sequence - first, position)
  return UserError(
    f'source: {where} holds NaN or infinity (shard {error.shard} of the store)'
    ': leave that row out, or compute it again'
  )


def alone(ids: np.ndarray, keep: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  """Tokens [n] of rows without a context -> ids and keep [n, 2]: position 1
  of a sequence of two, as in `write_arrays`; position 0 is token 0."""
  pair = np.stack([np.zeros_like(ids), ids], axis=1)
  return pair, np.stack([np.zeros(len(ids), bool), keep], axis=1)


def choose_hooks(
  where: Path, wanted: Mapping[str, str], hooks: Iterable[str]
) -> dict[str, str]:
  """{site: hook} of what the user wants, {hook: site}; '' is the only hook.

  Raises UserError naming the nearest hook, and those there are.
  """
  hooks = sorted(hooks)
  listed = ', '.join(hooks[:20]) or 'none'
  for hook in wanted:
    if hook and hook not in hooks:
      raise UserError(
        f'sites: no {hook!r} in {where}{nearest(hook, hooks)}; it has: {listed}'
      )
    if not hook and len(hooks) != 1:
      raise UserError(
        f'site: {where} has {len(hooks)} hooks ({listed}): say which with '
        '--sites=HOOK=NAME,HOOK=NAME'
      )
  return {site: hook or hooks[0] for hook, site in wanted.items()}


def nearest(name: str, names: Iterable[str]) -> str:
  """', did you mean ...' when one of the names is near, else ''."""
  near = difflib.get_close_matches(name, list(names), 1)
  return f', did you mean {near[0]!r}?' if near else ''


def identity(source: Source) -> dict[str, Any]:
  """What tells one source from another: a hash of its files' names and sizes
  and of the first MiB of every 64 MiB of their contents."""
  digest, total = xxhash.xxh3_128(), 0
  for path in progress(source.files, 'hash'):
    size = path.stat().st_size
    inside = path.is_relative_to(source.root)
    name = path.relative_to(source.root).as_posix() if inside else path.name
    digest.update(f'{name}\0{size}\0'.encode())
    with open(path, 'rb') as file:
      for at in range(0, size, _HASH_STEP):
        file.seek(at)
        digest.update(file.read(_HASHED))
    total += size
  return {
    'source_xxh3': digest.hexdigest(),
    'files': len(source.files),
    'bytes': total,
  }


def bar(total: int, what: str) -> tqdm:
  """A progress bar for what takes more than two seconds; where there is no
  terminal, a line now and then."""
  interval = 0.5 if sys.stderr.isatty() else 15
  return tqdm(
    total=total, desc=what, unit_scale=True, mininterval=interval,
    delay=2,
  )  # fmt: skip


def progress(items: list, what: str) -> Iterator:
  """The items, under a progress bar."""
  with bar(len(items), what) as shown:
    for item in items:
      yield item
      shown.update()
