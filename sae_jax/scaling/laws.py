"""Scaling laws: robust fits of them, with intervals that cover.

Everything is done in logs: of the data, of E and of A. docs/math.md, "Scaling
laws", has the formulas and why the estimators are what they are.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from sae_jax.errors import UserError
from sae_jax.scaling.huber import Value, descend

# A 90% interval of an exponent whose ends differ by more is no measurement.
WIDEST = 3.0
# E is unknown if its interval is wider than this part of the smallest loss.
WIDEST_E = 0.5
# Residuals up to this are squared at first, as in arXiv 2203.15556 ...
_FIRST_DELTA = 1e-3
# ... and then up to this many standard deviations: 98% efficient if Gaussian.
_DELTAS = 1.75
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


class Fit(NamedTuple):
  """A law fitted to points; the draws are of what its parameters may be."""

  law: Law
  x: np.ndarray  # [n, d]
  log_y: np.ndarray  # [n]
  centre: np.ndarray  # [d], mean of log x
  theta: np.ndarray  # [p]
  draws: np.ndarray  # [R, p]
  scale: float  # standard deviation of log y around the law
  scales: np.ndarray  # [R], what it may be
  level: float

  @property
  def rms(self) -> float:
    """Of the log residuals."""
    at = (np.log(self.x) - self.centre)[None][0]
    error = self.law.value(self.theta[None], at)[0][0] - self.log_y
    return float(np.sqrt(np.mean(error**2)))


class Estimate(NamedTuple):
  """A number, and the ends of its interval."""

  value: float
  low: float
  high: float


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


def fit(
  law: Law,
  x: np.ndarray,
  y: np.ndarray,
  *,
  level: float = 0.9,
  resamples: int = 400,
  seed: int = 0,
  noise: float = 0.0,
) -> Fit:
  """Fits a law to y [n] at x [n] or [n, d], all above 0.

  noise: what is known of the standard deviation of log y (from seeds); the
  intervals never assume less. Raises UserError for too few points.
  """
  x = np.asarray(x, float).reshape(len(y), -1)
  log_y = np.log(np.asarray(y, float))
  if why := missing(law, x):
    raise UserError(f'{law.formula}: {why}: give more points')
  centre = np.log(x).mean(0)
  z = np.log(x) - centre
  bounds = _bounds(law, log_y)
  delta = _FIRST_DELTA
  starts = law.starts(z, log_y)
  for _ in range(3):  # from robust to efficient
    found, costs = descend(law.value, starts, z, log_y, delta, bounds)
    theta = found[np.argmin(costs)]
    error = law.value(theta[None], z)[0][0] - log_y
    starts = np.concatenate([starts, theta[None]])
    delta = max(_DELTAS * _robust_scale(error, len(theta)), 1e-6)
  scale = max(_scale(error, delta, len(theta)), noise)
  draws, scales = _resample(
    law, theta, starts, z, delta, scale, bounds, resamples, seed
  )
  return Fit(law, x, log_y, centre, theta, draws, scale, scales, level)


def missing(law: Law, x: np.ndarray) -> str:
  """What a fit to points x [n, d] lacks, '' if nothing."""
  parameters = len(law.names)
  if len(x) <= parameters:
    return (
      f'too few points: {len(x)} of {parameters + 1} needed ({parameters} '
      'parameters and one to judge by)'
    )
  needed = (3, 2) if law.kind == 'joint' else (parameters,)
  for column, least in enumerate(needed):
    different = len(np.unique(x[:, column]))
    if different < least:
      what = ('n', 'k')[column] if law.kind == 'joint' else 'x'
      return f'too few points: {different} different {what}, {least} needed'
  return ''


def _bounds(law: Law, log_y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  """Exponents of -5 to 5, and E no smaller than 1e-4 of the least loss."""
  slopes = np.array(law.slopes)
  low = np.where(slopes, -5.0, log_y.min() - 50)
  if law.floor is not None:
    low[law.floor] = log_y.min() - np.log(1e4)
  return low, np.where(slopes, 5.0, log_y.max() + 5.0)


def _robust_scale(error: np.ndarray, parameters: int) -> float:
  """From the median; `parameters` residuals may be zero by construction."""
  return float(np.median(np.sort(abs(error))[parameters:]) / 0.6745)


def _scale(error: np.ndarray, delta: float, parameters: int) -> float:
  """The Gaussian noise that would scatter Huber's estimate as much.

  Huber (1981), 7.6: sum psi^2 / (n - p) / (mean psi')^2.
  """
  inside = np.mean(abs(error) <= delta)
  psi = np.clip(error, -delta, delta)
  free = len(error) - parameters
  return float(np.sqrt(np.sum(psi**2) / free) / max(inside, 0.3))


def _resample(law, theta, starts, z, delta, scale, bounds, resamples, seed):
  """Draws [R, p] of theta: fits to the law plus noise; and the noise [R].

  The noise has Student's tails: its variance is not known better than n - p
  residuals tell. For a law linear in theta that is the exact interval.
  """
  rng = np.random.default_rng(seed)
  free = len(z) - len(theta)
  scales = scale * np.sqrt(free / rng.chisquare(free, resamples))
  noise = rng.standard_normal((resamples, len(z))) * scales[:, None]
  log_y = law.value(theta[None], z)[0] + noise
  best, least = theta, np.full(resamples, np.inf)
  # The point fitted and, where a law has several valleys, the ends of the grid.
  picks = [theta] if law.floor is None else [theta, *starts[[1, 4, 7]]]
  deltas = delta * scales / scale if scale else np.full(resamples, delta)
  best = np.tile(theta, (resamples, 1))
  for start in picks:
    found, costs = descend(
      law.value,
      np.tile(start, (resamples, 1)),
      z,
      log_y,
      deltas[:, None],
      bounds,
    )
    better = costs < least
    best[better], least[better] = found[better], costs[better]
  return best, scales


def parameters(found: Fit) -> dict[str, Estimate]:
  """The parameters as published, by name."""
  natural = lambda theta: found.law.natural(theta, found.centre)
  values, draws = natural(found.theta[None])[0], natural(found.draws)
  return {
    name: _estimate(values[i], draws[:, i], found.level)
    for i, name in enumerate(found.law.names)
  }


def exponent(found: Fit) -> Estimate:
  """The exponent; of the joint law that of n at the grid's mean log k."""
  place, sign = found.law.exponent, found.law.sign
  return _estimate(
    sign * found.theta[place], sign * found.draws[:, place], found.level
  )


def predict(
  found: Fit, x: np.ndarray, measured: bool = False
) -> list[Estimate]:
  """y at x [m] or [m, d]; measured: the interval of one noisy measurement."""
  z = np.log(np.asarray(x, float).reshape(-1, found.x.shape[1])) - found.centre
  values = found.law.value(found.theta[None], z)[0][0]
  draws = found.law.value(found.draws, z)[0]  # [R, m]
  if measured:
    rng = np.random.default_rng(1)
    draws = draws + rng.standard_normal(draws.shape) * found.scales[:, None]
  return [
    Estimate(*np.exp(_estimate(values[i], draws[:, i], found.level)))
    for i in range(len(z))
  ]


def _estimate(value: float, draws: np.ndarray, level: float) -> Estimate:
  low, high = np.quantile(draws, [(1 - level) / 2, (1 + level) / 2])
  return Estimate(float(value), float(min(low, value)), float(max(high, value)))


def undetermined(found: Fit, range_of: str) -> str:
  """Why the points do not determine the law, '' if they do.

  range_of: what to widen, such as 'the range of latents'.
  """
  is_, percent = exponent(found), f'{100 * found.level:g}%'
  low, high = sorted((abs(is_.low), abs(is_.high)))
  ends = [number(found.x[:, 0].min()), number(found.x[:, 0].max())]
  advice = (
    f'widen {range_of} (now {ends[0]} to {ends[1]}) or lower the noise '
    f'(now {100 * found.scale:.2g}% around the law)'
  )
  if is_.low * is_.high <= 0 or high > WIDEST * low:
    return (
      f'the grid does not determine the exponent ({percent} interval '
      f'{is_.low:.2g} to {is_.high:.2g}): {advice}'
    )
  if found.law.floor is None:
    return ''
  place, least = found.law.floor, np.exp(found.log_y.min())
  floor = _estimate(found.theta[place], found.draws[:, place], found.level)
  low, high = np.exp([floor.low, floor.high])
  if high - low > WIDEST_E * least:
    return (
      f'the grid does not determine the irreducible loss ({percent} interval '
      f'{low:.2g} to {high:.2g}): {advice}'
    )
  return ''


def number(value: float) -> str:
  """A width, FLOPs or a loss for a line of text."""
  return f'{value:,.0f}' if 1000 <= abs(value) < 1e9 else f'{value:.4g}'
