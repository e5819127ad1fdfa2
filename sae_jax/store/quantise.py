"""int8 rows: a column's offset and scale, then one scale a row.

Outlier columns are 100 times the others, so columns are brought to one size
first; what is left of a row goes on 255 even steps from -max to max.
"""

from collections.abc import Iterator

import numpy as np

from sae_jax.store.statistics import Moments

_STEPS = 127
_PIECE = 1 << 15  # numbers


def columns(m: Moments) -> tuple[list[float], list[float]]:
  """(offset, scale) [width] of int8 rows from moments of a sample of them:
  mean and standard deviation, 1 where a column does not vary."""
  deviation = np.sqrt(m.m2 / m.n)
  deviation[deviation == 0] = 1
  # What a float32 can hold, so that readers and writers use the same numbers.
  return tuple(v.astype(np.float32).tolist() for v in (m.mean, deviation))


def encode(
  rows: np.ndarray, offset: np.ndarray, scale: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
  """rows [n, width] -> (int8 [n, width], row scales float32 [n, 1])."""
  n, width = rows.shape
  steps = np.empty((n, width), np.int8)
  row_scale = np.empty((n, 1), np.float32)
  for piece in _pieces(n, width):
    y = rows[piece].astype(np.float32)
    y -= offset
    y /= scale
    top = np.abs(y).max(1, keepdims=True) / np.float32(_STEPS)
    row_scale[piece] = top
    y /= np.where(top > 0, top, 1)
    np.rint(y, out=y)
    with np.errstate(invalid='ignore'):  # NaN rows are found by their scale
      np.copyto(steps[piece], y, casting='unsafe')
  return steps, row_scale


def decode(
  steps: np.ndarray,
  row_scale: np.ndarray,
  offset: np.ndarray,
  scale: np.ndarray,
  out: np.ndarray,
) -> None:
  """out [n, width] float32 = steps * row scale * scale + offset."""
  for piece in _pieces(*steps.shape):
    x = out[piece]
    np.copyto(x, steps[piece])
    x *= row_scale[piece]
    x *= scale
    x += offset


def _pieces(n: int, width: int) -> Iterator[slice]:
  """Rows to take at a time: they stay in cache from one pass to the next."""
  step = max(_PIECE // width, 1)
  return (slice(at, at + step) for at in range(0, n, step))
