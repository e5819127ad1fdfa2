"""int8 rows: a column's offset and scale, then one scale a row.

Outlier columns are 100 times the others, so columns are brought to one size
first; what is left of a row goes on 255 even steps from -max to max.
"""

import numpy as np

from sae_jax.store.statistics import Moments

_STEPS = 127


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
  y = (rows.astype(np.float32) - offset) / scale
  row_scale = np.abs(y).max(axis=1, keepdims=True) / np.float32(_STEPS)
  with np.errstate(invalid='ignore'):  # NaN rows are found by their scale
    steps = np.rint(y / np.where(row_scale > 0, row_scale, 1))
    return steps.astype(np.int8), row_scale


def decode(
  steps: np.ndarray,
  row_scale: np.ndarray,
  offset: np.ndarray,
  scale: np.ndarray,
  out: np.ndarray,
) -> None:
  """out [n, width] float32 = steps * row scale * scale + offset."""
  np.multiply(steps, row_scale, out=out)
  out *= scale
  out += offset
