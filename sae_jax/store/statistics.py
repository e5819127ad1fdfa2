"""Mean and spread of rows in float64, in centred form.

Sums of squares of raw values lose the spread of a site whose mean is large
against it, as residual streams' are; centred moments merge without that loss.
"""

import functools
import math
from collections.abc import Iterable
from typing import NamedTuple

import numpy as np

_PIECE = 1 << 15  # numbers taken to float64 at a time: 256 KB, in L2


class Moments(NamedTuple):
  """n rows, their mean [width] and sum of squared deviations m2 [width].

  max_abs: the largest |number| of all; None in records older than it.
  """

  n: int
  mean: np.ndarray
  m2: np.ndarray
  max_abs: float | None = None


def moments(rows: np.ndarray, near: np.ndarray | None = None) -> Moments:
  """Moments of rows [n, width], n > 0, in float64.

  near [width]: a guess of the mean, by default that of the first few rows.
  Sums are taken of deviations from it, in one pass. The result has the
  accuracy of two passes as long as the mean is within a few deviations of the
  guess: m2 loses a factor 1 + (mean - near)^2 / variance.
  """
  n, width = rows.shape
  if not n:  # all of them are beyond a bound
    return Moments(0, np.zeros(width), np.zeros(width), 0.0)
  step = max(_PIECE // width, 1)
  guess = rows[:step].astype(np.float64).mean(0) if near is None else near
  total, squares, most = np.zeros(width), np.zeros(width), 0.0
  x = np.empty((min(step, n), width))
  for at in range(0, n, step):
    piece = rows[at : at + step]
    x = x[: len(piece)]
    np.copyto(x, piece)
    most = max(most, float(x.max()), -float(x.min()))
    x -= guess
    total += np.add.reduce(x, 0)
    squares += np.einsum('ij,ij->j', x, x)
  off = total / n
  return Moments(n, guess + off, np.maximum(squares - off * total, 0), most)


def merge(a: Moments, b: Moments) -> Moments:
  """Moments of both sets of rows (Chan, Golub, LeVeque 1979, eq. 2.1)."""
  if not b.n:
    return a
  n = a.n + b.n
  delta = b.mean - a.mean
  most = None
  if a.max_abs is not None and b.max_abs is not None:
    most = max(a.max_abs, b.max_abs)
  return Moments(
    n,
    a.mean + delta * (b.n / n),
    a.m2 + b.m2 + np.square(delta) * (a.n * b.n / n),
    most,
  )


def merge_all(parts: Iterable[Moments]) -> Moments:
  """Merges in the order given, which fixes the last bit of the result."""
  return functools.reduce(merge, parts)


def merge_next(before: Moments | None, rows: np.ndarray) -> Moments:
  """Moments of the rows before, if any, and of further ones [n, width]."""
  if before is None:
    return moments(rows)
  return merge(before, moments(rows, before.mean))


def moments_of(blocks: Iterable[np.ndarray]) -> Moments:
  """Moments of the rows of all blocks, at least one."""
  found = functools.reduce(merge_next, blocks, None)
  if found is None:
    raise ValueError('no block')
  return found


def norms(rows: np.ndarray) -> np.ndarray:
  """|x| of rows [n, width], float64 [n]."""
  return np.sqrt(np.einsum('ij,ij->i', rows, rows, dtype=np.float64))


def beyond(rows: np.ndarray, bound: float) -> np.ndarray:
  """Which rows have a norm above the bound (0: none), bool [n]. Rows that are
  not finite have not: whoever looks for them must see them."""
  found = norms(rows) if bound else np.zeros(len(rows))
  return (found > bound) & (found < math.inf)


def within(rows: np.ndarray, bound: float) -> np.ndarray:
  """The other rows."""
  return rows[~beyond(rows, bound)] if bound else rows


def stand_in(rows: np.ndarray, bound: float) -> None:
  """Puts the first rows within the bound in the place of those beyond it; all
  are scaled to the bound where none is within."""
  above = beyond(rows, bound)
  if above.all():
    rows *= (bound / norms(rows))[:, None].astype(rows.dtype)
  elif above.any():
    rows[above] = np.resize(rows[~above], (above.sum(), rows.shape[1]))
