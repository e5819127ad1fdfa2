"""Stored rows in chunks of one shape, so that one compiled program sees all.

A chunk is as many rows as keep the latents of one chunk within 128 MiB.
"""

from collections.abc import Iterable, Iterator
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

_MOST_LATENTS = 2**25  # float32 numbers in one [chunk, F] array: 128 MiB
_MOST_ROWS = 2048  # beyond this a chunk is not faster per row on 2 cores

# (rows [n, D], tokens [n, 3] int32: sequence, position, token id), as the
# store's reader gives them.
Blocks = Iterable[tuple[np.ndarray, np.ndarray]]


class Chunk(NamedTuple):
  """x [size, D] and tokens [size, 3]; the first `rows` are real, others 0."""

  x: np.ndarray
  tokens: np.ndarray
  rows: int


def chunk_rows(latents: int) -> int:
  """Rows in a chunk for a dictionary of that many latents."""
  return max(1, min(_MOST_ROWS, _MOST_LATENTS // latents))


def chunks(
  blocks: Blocks, *, size: int, limit: int, label: str
) -> Iterator[Chunk]:
  """The first `limit` rows of the blocks, `size` at a time.

  Shows a progress bar called `label` on a terminal.
  """
  waiting, count = [], 0
  with tqdm(
    total=limit, desc=label, unit=' rows', unit_scale=True, disable=None
  ) as bar:
    for block in first(blocks, limit):
      waiting.append(block)
      count += len(block[0])
      if count < size:
        continue
      x, tokens = (
        np.concatenate(parts) for parts in zip(*waiting, strict=True)
      )
      whole = count // size * size
      for start in range(0, whole, size):
        part = slice(start, start + size)
        yield Chunk(x[part], tokens[part], size)
        bar.update(size)
      waiting, count = [(x[whole:], tokens[whole:])], count - whole
    if count:
      fill = [(0, size - count), (0, 0)]
      x, tokens = (
        np.concatenate(parts) for parts in zip(*waiting, strict=True)
      )
      yield Chunk(np.pad(x, fill), np.pad(tokens, fill), count)
      bar.update(count)


def first(blocks: Blocks, limit: int) -> Iterator:
  """The blocks, cut off after `limit` rows."""
  for rows, tokens in blocks:
    if limit <= 0:
      return
    yield rows[:limit], tokens[:limit]
    limit -= len(rows)
