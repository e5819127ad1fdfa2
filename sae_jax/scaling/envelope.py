"""From training curves to the compute-optimal points of one slice.

With a constant learning rate every point of a curve is a run that could have
ended there; docs/math.md, "Scaling laws", says when it is not so.
"""

from collections import defaultdict
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

_COUNT = 32  # C on the grid of an envelope
_MOST = 12  # ... of which laws are fitted to so many


class Curve(NamedTuple):
  """The loss of one run while it trained, or of runs of several lengths."""

  latents: int
  flops: np.ndarray  # [m], rising
  loss: np.ndarray  # [m]
  rows: np.ndarray  # [m]
  seconds: np.ndarray  # [m]
  seed: int = 0  # runs of equal width and seed are one, of several lengths


class Optimum(NamedTuple):
  """The best that can be done with `flops`."""

  flops: float
  loss: float
  latents: float
  rows: float
  edge: bool  # the best is the smallest or largest width that was tried


class Reach(NamedTuple):
  """The least that one width needs to reach a loss; None: it does not."""

  target: float
  latents: int
  flops: float | None
  seconds: float | None


def curve(
  latents: int,
  flops: Sequence[float] | np.ndarray,
  loss: Sequence[float] | np.ndarray,
  rows: Sequence[float] | np.ndarray,
  seconds: Sequence[float] | np.ndarray,
  seed: int = 0,
) -> Curve | None:
  """A curve in order of its FLOPs, or None where nothing of it can be used.

  Left out: what has no FLOPs or no loss above 0, as log-log needs.
  """
  table = np.array([flops, loss, rows, seconds], float)  # [4, m]
  table = table[:, np.isfinite(table).all(0) & (table[:3] > 0).all(0)]
  if not table.size:
    return None
  _, first = np.unique(table[0], return_index=True)
  table = table[:, first]
  return Curve(latents, *table[:4], seed=seed)


def optima(curves: Sequence[Curve], count: int = _COUNT) -> list[Optimum]:
  """The compute-optimal points at `count` C in geometric progression.

  From the C that three widths reach (fewer: none, if there are fewer widths) to
  the last that three reach. At each C the loss of a width is interpolated in
  log-log, seeds of equal width are averaged in log, and the best is the vertex
  of the parabola in log N through the best width and its neighbours.
  """
  spans: dict[int, tuple[float, float]] = {}
  for one in curves:
    low, high = spans.get(one.latents, (np.inf, 0.0))
    spans[one.latents] = min(low, one.flops[0]), max(high, one.flops[-1])
  if len(spans) < 3:
    return []
  low = sorted(first for first, _ in spans.values())[2]
  high = sorted(last for _, last in spans.values())[-3]
  if low >= high:
    return []
  # The ends hold rounding: they must not fall out of the curves.
  found = [
    _optimum(curves, c)
    for c in np.geomspace(low * (1 + 1e-9), high * (1 - 1e-9), count)
  ]
  return [one for one in found if one]


def thinned(best: Sequence[Optimum], curves: Sequence[Curve]) -> list[Optimum]:
  """Those to fit laws to: not at an edge, and about as many as seeds of widths.

  Neighbours on an envelope share the noise of their curves; more of them would
  seem to be more than was measured. Five at least, to fit three parameters.
  """
  inner = [one for one in best if not one.edge]
  runs = len({(c.latents, c.seed) for c in curves})
  count = min(len(inner), max(5, min(runs, _MOST)))
  if not count:
    return []
  at = np.linspace(0, len(inner) - 1, count).round().astype(int)
  return [inner[i] for i in at]


def shaken(
  curves: Sequence[Curve],
  best: Sequence[Optimum],
  scales: np.ndarray,
  seed: int,
) -> dict[str, np.ndarray]:
  """What noise of the curves would do to optima: log changes [R, n] by name.

  In each of R resamples every seed of a width is moved by one factor, noise of
  standard deviation scales [R], and the optima are found again with the means
  of the seeds that reach them; a best at an edge is held within its three
  widths.
  """
  rng = np.random.default_rng(seed)
  moved = {
    run: rng.standard_normal(len(scales)) * scales
    for run in sorted({(c.latents, c.seed) for c in curves})
  }
  found = []
  for one in best:
    log_n, log_loss, log_rows = np.log(_table(curves, one.flops)).T
    widths = np.exp(log_n).round().astype(int)
    means = [
      np.mean([moved[n, seed] for seed in _reaching(curves, n, one.flops)], 0)
      for n in widths
    ]
    shifted = log_loss + np.stack(means, -1)  # [R, W]
    middle = np.clip(shifted.argmin(-1), 1, len(widths) - 2)
    near = middle[:, None] + np.arange(-1, 2)
    at, lowest = vertex(log_n[near], np.take_along_axis(shifted, near, -1))
    found.append((at, lowest, np.interp(at, log_n, log_rows)))
  logs = np.array(found).reshape(len(best), 3, len(scales))
  return {
    name: (logs[:, i] - np.log([[getattr(o, name)] for o in best])).T
    for i, name in enumerate(('latents', 'loss', 'rows'))
  }


def _optimum(curves: Sequence[Curve], flops: float) -> Optimum | None:
  table = _table(curves, flops)
  if len(table) < 3:
    return None
  log_n, log_loss, log_rows = np.log(table).T
  best = int(np.argmin(log_loss))
  if best in (0, len(table) - 1):
    n, loss, rows = table[best].tolist()
    return Optimum(flops, loss, n, rows, True)
  near = slice(best - 1, best + 2)
  at, lowest = vertex(log_n[near], log_loss[near])
  rows = np.interp(at, log_n, log_rows)
  loss, n, rows = np.exp([lowest, at, rows]).tolist()
  return Optimum(flops, loss, n, rows, False)


def _table(curves: Sequence[Curve], flops: float) -> np.ndarray:
  """Width, loss and rows [W, 3] of the widths that reach so many FLOPs."""
  found = [
    (n, _at(curves, n, flops)) for n in sorted({c.latents for c in curves})
  ]
  return np.array([(n, *at) for n, at in found if at], float)


def _at(curves, latents: int, flops: float) -> tuple[float, float] | None:
  """Loss and rows of a width at so many FLOPs: means in log of its seeds."""
  at = lambda c: [np.log(_between(c.flops, y, flops)) for y in (c.loss, c.rows)]
  seeds = [
    np.mean([at(c) for c in same], 0)
    for same in _reaching(curves, latents, flops).values()
  ]
  if not seeds:
    return None
  loss, rows = np.exp(np.mean(seeds, 0)).tolist()
  return loss, rows


def _reaching(curves, latents: int, flops: float) -> dict[int, list[Curve]]:
  """The curves of a width that span so many FLOPs, by seed."""
  found = defaultdict(list)
  for c in curves:
    if c.latents == latents and c.flops[0] <= flops <= c.flops[-1]:
      found[c.seed].append(c)
  return found


def _between(x: np.ndarray, y: np.ndarray, at: float) -> float:
  return float(np.exp(np.interp(np.log(at), np.log(x), np.log(y))))


def vertex(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  """The lowest point of the parabola through three points of rising x [..., 3].

  It is between the outer ones if the middle one is the lowest; else the lowest
  that is not outside them.
  """
  left, right = x[..., 0] - x[..., 1], x[..., 2] - x[..., 1]
  a, b = y[..., 0] - y[..., 1], y[..., 2] - y[..., 1]
  curved = (a / left - b / right) / (left - right)
  slope = a / left - curved * left
  ends = np.where(a < b, left, right)  # of what is not a bowl
  bowl = curved > 1e-12
  at = np.where(bowl, -slope / (2 * np.where(bowl, curved, 1)), ends)
  at = np.clip(at, left, right)
  return x[..., 1] + at, y[..., 1] + slope * at + curved * at**2


def fall(one: Curve) -> float | None:
  """The part of the loss that the last doubling of rows took away.

  None where the curve does not reach so far back.
  """
  if one.rows[0] > one.rows[-1] / 2:
    return None
  return float(
    1 - one.loss[-1] / _between(one.rows, one.loss, one.rows[-1] / 2)
  )


def reach(curves: Sequence[Curve], target: float) -> list[Reach]:
  """What each width needs to reach a loss, the least of its runs."""
  found = []
  for latents in sorted({c.latents for c in curves}):
    crossings = [_crossing(c, target) for c in curves if c.latents == latents]
    there = [c for c in crossings if c]
    found.append(
      Reach(
        target,
        latents,
        min((c[0] for c in there), default=None),
        min((c[1] for c in there), default=None),
      )
    )
  return found


def _crossing(one: Curve, target: float) -> tuple[float, float] | None:
  """FLOPs and seconds where a curve first is at or below a loss."""
  below = np.flatnonzero(one.loss <= target)
  if not len(below):
    return None
  i = int(below[0])
  if not i:
    return float(one.flops[0]), float(one.seconds[0])
  log_loss = np.log(one.loss[i - 1 : i + 1])
  part = (np.log(target) - log_loss[0]) / (log_loss[1] - log_loss[0])
  flops = np.log(one.flops[i - 1 : i + 1])
  return (
    float(np.exp(flops[0] + part * (flops[1] - flops[0]))),
    float(one.seconds[i - 1] + part * (one.seconds[i] - one.seconds[i - 1])),
  )
