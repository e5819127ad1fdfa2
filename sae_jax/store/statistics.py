"""Mean and spread of rows in float64, in centred form.

Sums of squares of raw values lose the spread of a site whose mean is large
against it, as residual streams' are; centred moments merge without that loss.
"""

import functools
from collections.abc import Iterable
from typing import NamedTuple

import numpy as np


class Moments(NamedTuple):
  """n rows, their mean [width] and sum of squared deviations m2 [width]."""

  n: int
  mean: np.ndarray
  m2: np.ndarray


def moments(rows: np.ndarray) -> Moments:
  """Moments of rows [n, width], in float64."""
  x = rows.astype(np.float64)
  mean = x.mean(0)
  return Moments(len(x), mean, np.square(x - mean).sum(0))


def merge(a: Moments, b: Moments) -> Moments:
  """Moments of both sets of rows (Chan, Golub, LeVeque 1979, eq. 2.1)."""
  n = a.n + b.n
  delta = b.mean - a.mean
  return Moments(
    n,
    a.mean + delta * (b.n / n),
    a.m2 + b.m2 + np.square(delta) * (a.n * b.n / n),
  )


def merge_all(parts: Iterable[Moments]) -> Moments:
  """Merges in the order given, which fixes the last bit of the result."""
  return functools.reduce(merge, parts)
