"""Mean and spread of rows in float64, in centred form.

Sums of squares of raw values lose the spread of a site whose mean is large
against it, as residual streams' are; centred moments merge without that loss.
"""

import functools
import math
from collections.abc import Iterable
from typing import NamedTuple

import numpy as np

from sae_jax.errors import UserError

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


def norms(rows: np.ndarray) -> np.ndarray:
  """|x| of rows [n, width], float64 [n]."""
  squares, step = np.empty(len(rows)), max(_PIECE // rows.shape[1], 1)
  for at in range(0, len(rows), step):
    x = rows[at : at + step].astype(np.float64)
    squares[at : at + step] = np.einsum('ij,ij->i', x, x)
  return np.sqrt(squares)


def beyond(rows: np.ndarray, bound: float) -> np.ndarray:
  """Which of rows [n, width] have a norm above the bound, bool [n].

  Rows that are not finite have not: whoever looks for them must see them.
  """
  if bound == math.inf:
    return np.zeros(len(rows), bool)
  found = norms(rows)
  return (found > bound) & (found < math.inf)


def within(rows: np.ndarray, bound: float) -> np.ndarray:
  """The rows that are not beyond the bound."""
  above = beyond(rows, bound)
  return rows[~above] if above.any() else rows


def stand_in(rows: np.ndarray, bound: float) -> None:
  """Puts others of rows [n, width] in the place of those beyond the bound.

  The first of them gets the first that is within, and so on. Where there is
  none all are scaled to the bound.
  """
  above = beyond(rows, bound)
  if above.all():
    rows *= (bound / norms(rows))[:, None].astype(rows.dtype)
  elif above.any():
    others = np.flatnonzero(~above)
    rows[above] = rows[np.resize(others, above.sum())]


class Parted(NamedTuple):
  """Moments of the rows within a bound, and of those beyond it."""

  within: Moments
  beyond: Moments

  @property
  def all(self) -> Moments:
    return merge(self.within, self.beyond)

  @property
  def variance_beyond(self) -> float:
    """Share of sum |x - mean|^2, of all rows, that those beyond have."""
    (n, mean, m2, _), every = self.beyond, self.all
    squares = m2.sum() + n * np.square(mean - every.mean).sum()
    return float(squares / (every.m2.sum() or 1))


def part(blocks: Iterable[np.ndarray], bound: float) -> Parted:
  """The rows of all blocks on either side of the bound; UserError for none."""
  inside = outside = None
  for rows in blocks:
    inside = merge_next(inside, within(rows, bound))
    outside = merge_next(outside, rows[beyond(rows, bound)])
  if inside is None or outside is None:
    raise UserError('there are no rows to look at')
  return Parted(inside, outside)
