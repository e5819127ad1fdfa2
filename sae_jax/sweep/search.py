"""Values that short trials find before a point is run: budget-aware search.

They stand in sweep() in place of a number,

    {'sae.latents': 4096, 'loss.l0_coef': TargetL0(32, low=1e-4, high=1e-2)}

Each is a pure function from what its trials gave so far to the next trials, so
a search that was killed goes on from the results on disk.
"""

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple, TypeAlias

from sae_jax.errors import UserError

# {(value, rows of the trial): a figure of it; None where it failed}
Seen: TypeAlias = Mapping[tuple[float, int], float | None]


class Ask(NamedTuple):
  """Trials to run next, all at once."""

  values: list[float]
  rows: int


class Found(NamedTuple):
  """The end of a search: the value, or why there is none."""

  value: float
  failure: str = ''


class TargetL0(NamedTuple):
  """The coefficient at which L0 is what is wanted: so points compare.

  L0 falls as the coefficient rises, about as a power of it: `tries` trials from
  `low` to `high` bracket the target, and each further round tries the
  interpolation of log L0 in log(coefficient), and to either side of it. Where
  the bracket's end has no active latents left, they try its middle. A trial
  within `tolerance` ends the search.
  """

  l0: float
  low: float
  high: float
  rows: int = 0  # of a trial; 0: as many as the point's
  tries: int = 3  # trials of a round
  rounds: int = 3
  tolerance: float = 0.03  # of log L0

  @property
  def start(self) -> float:
    """What other searches of the same point meanwhile use."""
    return math.sqrt(self.low * self.high)

  @property
  def ends(self) -> Sequence[float]:
    """Values that must work in a config."""
    return self.low, self.high

  def check(self, what: str) -> None:
    """Raises UserError for values that cannot work."""
    if not (self.l0 > 0 and 0 < self.low < self.high):
      raise UserError(f'{what}: needs l0 > 0 and 0 < low < high')
    if self.tries < 2 or self.rounds < 1 or self.rows < 0:
      raise UserError(f'{what}: needs tries >= 2, rounds >= 1 and rows >= 0')
    _whole(what, self.rows, self.tries, self.rounds)

  def most(self, rows: int) -> list[int]:
    """Rows of each trial there can be, for a point of so many rows."""
    return [min(self.rows or rows, rows)] * (self.tries * self.rounds)

  def next(self, seen: Seen, rows: int) -> Ask | Found:
    """rows: of the point."""
    rows = min(self.rows or rows, rows)
    first = spaced(self.low, self.high, self.tries)
    if missing := [v for v in first if (v, rows) not in seen]:
      return Ask(missing, rows)
    tried = [
      (v, x)
      for (v, r), x in sorted(seen.items())
      if r == rows and x is not None  # it failed
    ]
    distance = lambda t: abs(math.log(t[1] / self.l0)) if t[1] else math.inf
    if tried and distance(best := min(tried, key=distance)) <= self.tolerance:
      return Found(best[0])
    around = [
      (a, b)
      for a, b in zip(tried, tried[1:], strict=False)
      if a[1] >= self.l0 > b[1]
    ]
    if not around:
      got = ', '.join(f'{x:.4g} at {v:.3g}' for v, x in tried) or 'none'
      return Found(
        math.nan,
        f'no L0 of {self.l0:g} between coefficients {self.low:g} and '
        f'{self.high:g} (L0 was {got}): widen them',
      )
    (a, l0_a), (b, l0_b) = min(around, key=lambda p: p[1][0] / p[0][0])
    share = math.log(l0_a / self.l0) / math.log(l0_a / l0_b) if l0_b else 0.5
    guess = _rounded(a * (b / a) ** share)
    left = self.tries * self.rounds - len(seen)
    if left <= 0:
      if l0_b:
        return Found(guess)
      return Found(
        math.nan,
        f'L0 falls from {l0_a:.4g} to 0 between coefficients {a:g} and {b:g}: '
        'search there, or in more rounds',
      )
    # Closer than the ends of the bracket, which are known.
    step = (b / a) ** (0.5 / self.tries)
    near = [
      _rounded(guess * step ** (i - (self.tries - 1) / 2))
      for i in range(self.tries)
    ]
    missing = [v for v in near if (v, rows) not in seen]
    return Ask(missing[:left], rows) if missing else Found(guess)


class Halving(NamedTuple):
  """The best of some values by successive halving (Jamieson and Talwalkar 2016,
  arXiv 1502.07943): all are tried on few rows, the best 1/`eta` of them on
  `eta` times as many, and so on to one, or to the rows of the point.

  Trials begin anew: their schedules are shares of their own rows. The best is
  that of the least loss: FVU, and for JumpReLU the loss of training with its
  penalty, as trials of one coefficient differ in L0.
  """

  values: Sequence[float]
  rows: int  # of the first trials
  eta: int = 3

  @property
  def start(self) -> float:
    """The middle one, which other searches of the same point meanwhile use."""
    return sorted(self.values)[len(self.values) // 2]

  @property
  def ends(self) -> Sequence[float]:
    """Values that must work in a config."""
    return self.values

  def check(self, what: str) -> None:
    """Raises UserError for values that cannot work."""
    if not len(self.values) or self.rows < 1 or self.eta < 2:
      raise UserError(f'{what}: needs values, rows >= 1 and eta >= 2')
    _whole(what, self.rows, self.eta)

  def most(self, rows: int) -> list[int]:
    """Rows of each trial there can be, for a point of so many rows."""
    left, at = len(set(self.values)), min(self.rows, rows)
    found = [at] * left
    while (left := math.ceil(left / self.eta)) > 1 and at * self.eta <= rows:
      at *= self.eta
      found += [at] * left
    return found

  def next(self, seen: Seen, rows: int) -> Ask | Found:
    """rows: of the point."""
    left, at = sorted(set(self.values)), min(self.rows, rows)
    while True:
      if missing := [v for v in left if (v, at) not in seen]:
        return Ask(missing, at)
      figures = {v: f for v in left if (f := seen[v, at]) is not None}
      ranked = sorted(figures, key=lambda v: figures[v])
      if not ranked:
        return Found(math.nan, f'all trials of {len(left)} values failed')
      left = ranked[: math.ceil(len(left) / self.eta)]
      if len(left) == 1 or at * self.eta > rows:
        return Found(ranked[0])
      at *= self.eta


Search: TypeAlias = TargetL0 | Halving


def spaced(low: float, high: float, n: int) -> list[float]:
  """n values from low to high, each the same multiple of the one before."""
  return [_rounded(low * (high / low) ** (i / (n - 1))) for i in range(n)]


def _whole(what: str, *numbers: float) -> None:
  for number in numbers:
    if not isinstance(number, int):
      raise UserError(f'{what}: {number!r} must be a whole number')


def _rounded(value: float) -> float:
  """Four digits: the same in every file and on every machine."""
  return float(f'{value:.3e}')
