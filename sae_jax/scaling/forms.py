"""Scaling laws as functions: values, derivatives and where to start a fit."""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from sae_jax.scaling.huber import Value

_SHARES = (0.003, 0.1, 0.3, 0.5, 0.7, 0.8, 0.9, 0.95, 0.98)  # of E, to start


class Law(NamedTuple):
  """A law in centred logs: z = log x - centre, parameters theta [S, p]."""

  kind: str  # 'irreducible', 'power' or 'joint'
  formula: str
  names: tuple[str, ...]  # of the parameters as published
  # (theta [S, p], z [n, d]) -> log y [S, n] and its derivative [S, n, p]
  value: Value
  # (z [n, d], log y [n]) -> theta [S, p] to start from
  starts: Callable[[np.ndarray, np.ndarray], np.ndarray]
  # (theta [S, p], centre [d]) -> parameters as published [S, p]
  natural: Callable[[np.ndarray, np.ndarray], np.ndarray]
  slopes: tuple[bool, ...]  # which of theta are exponents; the others are logs
  exponent: int  # its place in theta, at the centre
  sign: float  # of the exponent as quoted
  floor: int | None  # place of log E at the centre


def _power_value(theta, z):
  slope = np.broadcast_to(z[:, 0], (len(theta), len(z)))
  return theta[:, :1] + theta[:, 1:] * z[:, 0], np.stack(
    [np.ones_like(slope), slope], -1
  )


def _power_natural(theta, centre):
  return np.stack(
    [np.exp(theta[:, 0] - theta[:, 1] * centre[0]), theta[:, 1]], -1
  )


def _linear(columns: list[np.ndarray], y: np.ndarray) -> np.ndarray:
  return np.linalg.lstsq(np.stack(columns, -1), y, rcond=None)[0]


def _power_starts(z, log_y):
  return _linear([np.ones(len(z)), z[:, 0]], log_y)[None]


POWER = Law(
  'power', 'a x^p', ('a', 'p'), _power_value, _power_starts, _power_natural,
  (False, True), exponent=1, sign=1.0, floor=None,
)  # fmt: skip


def _irreducible_value(theta, z):
  floor, slope = theta[:, :1], z[:, 0]
  part = theta[:, 1:2] - theta[:, 2:] * slope
  log_y = np.logaddexp(floor, part)
  share = np.exp(part - log_y)
  return log_y, np.stack([1 - share, share, -share * slope], -1)


def _irreducible_starts(z, log_y):
  """For each E the line through log(y - E)."""
  found, least = [], np.exp(log_y.min())
  for share in _SHARES:
    rest = np.log(np.exp(log_y) - share * least)
    a, slope = _linear([np.ones(len(z)), z[:, 0]], rest)
    found.append([np.log(share * least), a, -slope])
  return np.array(found)


def _irreducible_natural(theta, centre):
  floor, a, alpha = theta.T
  return np.stack([np.exp(floor), np.exp(a + alpha * centre[0]), alpha], -1)


IRREDUCIBLE = Law(
  'irreducible', 'E + A x^-alpha', ('E', 'A', 'alpha'), _irreducible_value,
  _irreducible_starts, _irreducible_natural, (False, False, True), exponent=2,
  sign=1.0, floor=0,
)  # fmt: skip


def _joint_value(theta, z):
  log_n, log_k = z.T
  shape = (len(theta), len(z))
  columns = np.stack([np.ones(len(z)), log_k, log_n, log_k * log_n], -1)
  part = theta[:, :4] @ columns.T
  floor = theta[:, 4:5] + theta[:, 5:] * log_k
  log_y = np.logaddexp(part, floor)
  share = np.exp(part - log_y)
  rest = 1 - share
  slopes = rest * np.broadcast_to(log_k, shape)
  return log_y, np.concatenate(
    [share[..., None] * columns, rest[..., None], slopes[..., None]], -1
  )


def _joint_starts(z, log_y):
  """For each irreducible part, at each k a share of the least loss, a plane."""
  log_n, log_k = z.T
  ones, found = np.ones(len(z)), []
  least = np.array([log_y[log_k == k].min() for k in log_k])
  for share in _SHARES:
    floor = least + np.log(share)
    rest = np.log(np.exp(log_y) - np.exp(floor))
    plane = _linear([ones, log_k, log_n, log_k * log_n], rest)
    found.append([*plane, *_linear([ones, log_k], floor)])
  return np.array(found)


def _joint_natural(theta, centre):
  a, k, n, both, zeta, eta = theta.T
  cn, ck = centre
  alpha = a - k * ck - n * cn + both * ck * cn
  return np.stack(
    [alpha, k - both * cn, n - both * ck, both, zeta - eta * ck, eta], -1
  )


# x is (n, k). The exponent is that of n at the mean log k.
JOINT = Law(
  'joint',
  'exp(alpha + beta_k log k + beta_n log n + gamma log k log n)'
  ' + exp(zeta + eta log k)',
  ('alpha', 'beta_k', 'beta_n', 'gamma', 'zeta', 'eta'),
  _joint_value, _joint_starts, _joint_natural,
  (False, True, True, True, False, True), exponent=2, sign=-1.0, floor=4,
)  # fmt: skip
