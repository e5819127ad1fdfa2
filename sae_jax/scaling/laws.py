"""Scaling laws: robust fits of them, with intervals that cover.

Everything is done in logs: of the data, of E and of A. docs/math.md, "Scaling
laws", has the formulas and why the estimators are what they are.
"""

from typing import NamedTuple

import numpy as np

from sae_jax.errors import UserError
from sae_jax.scaling.forms import Law
from sae_jax.scaling.huber import descend

# A 90% interval of an exponent whose ends differ by more is no measurement.
WIDEST = 3.0
# E is unknown if its interval is wider than this part of the smallest loss.
WIDEST_E = 0.5
# Optima that noise moves by more have intervals that are too narrow: it is half
# of the way between widths that double.
NOISIEST = 0.3
# Residuals up to this are squared at first, as in arXiv 2203.15556 ...
_FIRST_DELTA = 1e-3
# ... and then up to this many standard deviations: 98% efficient if Gaussian.
_DELTAS = 1.75


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
  shared: bool  # points share their noise, as those of an envelope

  @property
  def rms(self) -> float:
    """Of the log residuals."""
    z = np.log(self.x) - self.centre
    error = self.law.value(self.theta[None], z)[0][0] - self.log_y
    return float(np.sqrt(np.mean(error**2)))


class Estimate(NamedTuple):
  """A number, and the ends of its interval."""

  value: float
  low: float
  high: float


def fit(
  law: Law,
  x: np.ndarray,
  y: np.ndarray,
  *,
  level: float = 0.9,
  resamples: int = 400,
  seed: int = 0,
  noise: float = 0.0,
  errors: np.ndarray | None = None,
) -> Fit:
  """Fits a law to y [n] at x [n] or [n, d], all above 0.

  noise: what is known of the standard deviation of log y (from seeds); the
  intervals never assume less. errors [R, n]: resamples of noise of log y that
  points share, besides each one's own. Raises UserError for too few points.
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
    law, theta, starts, z, delta, scale, bounds, resamples, seed, errors
  )
  return Fit(
    law,
    x,
    log_y,
    centre,
    theta,
    draws,
    scale,
    scales,
    level,
    errors is not None,
  )


def missing(law: Law, x: np.ndarray) -> str:
  """What a fit to points x [n, d] lacks, '' if nothing."""
  parameters = len(law.names)
  if len(x) <= parameters:
    return (
      f'too few points: {len(x)} of {parameters + 1} needed ({parameters} '
      'parameters and one to judge by)'
    )
  if law.kind == 'joint':
    slices = [len(np.unique(x[x[:, 1] == k, 0])) for k in np.unique(x[:, 1])]
    enough = sum(count >= 3 for count in slices)
    if enough < 2:
      return f'too few points: {enough} k with 3 different n, 2 needed'
    return ''
  different = len(np.unique(x))
  if different < parameters:
    return f'too few points: {different} different x, {parameters} needed'
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

  Huber (1981), 7.6: K^2 sum psi^2 / (n - p) / m^2 with m = mean psi' and
  K = 1 + (p / n) (1 - m) / m.
  """
  inside = max(np.mean(abs(error) <= delta), 0.3)
  psi = np.clip(error, -delta, delta)
  free = len(error) - parameters
  factor = 1 + parameters / len(error) * (1 - inside) / inside
  return float(factor * np.sqrt(np.sum(psi**2) / free) / inside)


def _resample(
  law, theta, starts, z, delta, scale, bounds, resamples, seed, errors
):
  """Draws [R, p] of theta: fits to the law plus noise; and the noise [R].

  The noise has Student's tails: its variance is not known better than n - p
  residuals tell. For a law linear in theta that is the exact interval.
  """
  rng = np.random.default_rng(seed)
  if errors is not None:
    resamples = len(errors)
  free = len(z) - len(theta)
  scales = scale * np.sqrt(free / rng.chisquare(free, resamples))
  noise = rng.standard_normal((resamples, len(z))) * scales[:, None]
  deltas = delta * scales / scale if scale else np.full(resamples, delta)
  if errors is not None:
    noise = noise + errors
    scales = np.hypot(scales, errors.std())
    deltas = np.maximum(deltas, _DELTAS * errors.std())
  log_y = law.value(theta[None], z)[0] + noise
  least = np.full(resamples, np.inf)
  # The point fitted and, where a law has several valleys, the ends of the grid.
  picks = [theta] if law.floor is None else [theta, *starts[[1, 4, 7]]]
  best = np.tile(theta, (resamples, 1))
  for start in picks:
    found, costs = descend(
      law.value,
      np.tile(start, (resamples, 1)),
      z,
      log_y,
      deltas[:, None],
      bounds,
      tolerance=1e-5,  # of costs, far below what the noise makes of them
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
  ends = [_number(found.x[:, 0].min()), _number(found.x[:, 0].max())]
  advice = (
    f'widen {range_of} (now {ends[0]} to {ends[1]}) or lower the noise '
    f'(now {100 * found.scale:.2g}% around the law)'
  )
  if is_.low * is_.high <= 0 or high > WIDEST * low:
    return (
      f'the grid does not determine the exponent ({percent} interval '
      f'{is_.low:.2g} to {is_.high:.2g}): {advice}'
    )
  moved = float(np.median(found.scales))
  if found.shared and moved > NOISIEST:
    return (
      f'the noise of runs moves points by {moved:.0%}, and above '
      f'{NOISIEST:.0%} intervals are too narrow: add seeds or widths'
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


def _number(value: float) -> str:
  """A width, FLOPs or a loss for a line of text."""
  return f'{value:,.0f}' if 1000 <= abs(value) < 1e9 else f'{value:.4g}'
