"""The points of a study, sorted into slices that one law can describe.

A slice has one activation and one k (or one L0 coefficient, where no L0 is
aimed at) on one site. At each width it has the setting that did best.
"""

import json
import math
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np

from sae_jax.scaling.envelope import Curve, curve, vertex
from sae_jax.sweep.tables import Mark, Point
from sae_jax.train.run import trajectory

METRICS = ('fvu', 'mse', 'delta_loss')
# Keys of `changes` that make another problem of it, not another setting.
_PROBLEM = (
  'store.path', 'store.site', 'sae.d_in', 'sae.center', 'sae.pre_bias',
)  # fmt: skip
# Keys that the columns of a point already say.
_KNOWN = (
  'sae.latents', 'act.name', 'act.k', 'loss.target_l0', 'loss.l0_coef',
  'optim.lr', 'optim.lr_width', 'seed', 'store.seed', 'train.rows',
  'train.batch_rows',
)  # fmt: skip
# An L0 further from the one aimed at is another slice's, in truth.
_L0_OFF = 0.1


class Slice(NamedTuple):
  """What one law is fitted to."""

  where: (
    dict  # activation, k and, if these vary, l0_coef and the problem's keys
  )
  label: str
  points: list[Point]  # at each width the longest runs of its best setting
  grid: list[Point]  # all but trials
  curves: list[Curve]  # of all runs of these settings
  tried: list[Point]  # all, trials too
  warnings: list[str]


class Noise(NamedTuple):
  """What seeds tell of the noise of one run's log loss."""

  scale: float  # its standard deviation
  free: int  # degrees of freedom that tell it


def usable(points: list[Point], metric: str) -> tuple[list[Point], str]:
  """Points that are done and have the metric, and a sentence on the others."""
  kept, lost = [], Counter()
  for point in points:
    value = getattr(point, metric)
    if point.state != 'done':
      lost[point.state] += 1
    elif value is None or not math.isfinite(value):
      lost[f'no {metric}'] += 1
    elif value <= 0:
      lost[f'a {metric} of 0 or less'] += 1
    else:
      kept.append(point)
  if not lost:
    return kept, ''
  what = ', '.join(_of_state(count, why) for why, count in lost.items())
  out = lost.total()
  verb = 'is' if out == 1 else 'are'
  return kept, f'{out} of {len(points)} points {verb} left out: {what}'


def _of_state(count: int, why: str) -> str:
  if why in ('failed', 'running', 'missing'):
    return f'{count} {why}'
  return f'{count} {"has" if count == 1 else "have"} {why}'


def seed_noise(points: list[Point], metric: str) -> Noise | None:
  """Pooled over points equal but for the seed; None if there are none."""
  groups = _grouped(
    points, lambda p: (_key(where_is(p)), p.latents, p.rows, _setting(p))
  )
  square, free = 0.0, 0
  for group in groups.values():
    logs = np.log([getattr(p, metric) for p in group])
    square += float(np.sum((logs - logs.mean()) ** 2))
    free += len(logs) - 1
  return Noise(math.sqrt(square / free), free) if free else None


def slices(
  points: list[Point],
  marks: list[Mark],
  metric: str,
  flops: str,
  decayed: bool,
) -> list[Slice]:
  """The slices of usable points, in order of activation and k."""
  by_point, groups = _grouped(marks, lambda m: m.point), by_slice(points)
  several = len({p.activation for p in points}) > 1
  loose = [
    p
    for where, tried in groups
    if where['k'] is None and all(p.stage == 'trial' for p in tried)
    for p in tried
  ]
  found = []
  for where, tried in groups:
    grid = [p for p in tried if p.stage != 'trial']
    if not grid:
      continue
    # Trials at a coefficient are of no L0, and so count for each.
    if where['k'] is not None:
      alike = [p._replace(k=where['k']) for p in loose]
      tried = tried + [p for p in alike if where_is(p) == where]
    runs = _best(grid, metric)
    longest = [
      p for p in runs if p.rows == max(q.rows for q in runs if _same(p, q))
    ]
    curves = _curves(runs, by_point, metric, flops, decayed)
    label, off = _label(where, several), _off(longest)
    found.append(Slice(where, label, longest, grid, curves, tried, off))
  return found


def by_slice(points: Sequence[Point]) -> list[tuple[dict, list[Point]]]:
  """(`Slice.where`, its points) in order of activation and k."""
  groups = _grouped(points, lambda p: _key(where_is(p))).values()
  return sorted(
    ((where_is(group[0]), group) for group in groups),
    key=lambda g: (g[0]['activation'], g[0]['k'] or math.inf, str(g[0])),
  )


def at_rows(one: Slice, rows: int, metric: str) -> list[Point]:
  """At each width the runs of so many rows of the setting that is best."""
  return _best([p for p in one.grid if p.rows == rows], metric)


def best_lrs(
  tried: list[Point], metric: str
) -> tuple[list[tuple[int, float]], list[str]]:
  """(width, learning rate of the least loss) and what is wrong with others.

  The vertex of the parabola in log lr through the best rate and its neighbours,
  among runs equal in all but lr and seed.
  """
  found, said, short = [], [], []
  widths = _grouped(tried, lambda p: p.latents)
  for latents in sorted(widths):
    rates, rows = _rates(widths[latents], metric)
    at = f'at {latents:,} latents'
    if len(rates) < 2:  # it was not looked for at this width
      continue
    if len(rates) < 3:
      said.append(
        f'{at} {len(rates)} learning rates were tried: give 3 or more'
      )
      continue
    log_lr, log_loss = np.array(sorted(rates.items())).T
    best = int(np.argmin(log_loss))
    if best in (0, len(rates) - 1):
      end, way = ('largest', 'above') if best else ('smallest', 'below')
      said.append(
        f'{at} the best of {len(rates)} learning rates is the {end}, '
        f'{math.exp(log_lr[best]):.3g}: the optimum lies at the edge; '
        f'try rates {way} it'
      )
      continue
    near = slice(best - 1, best + 2)
    found.append(
      (latents, float(np.exp(vertex(log_lr[near], log_loss[near])[0])))
    )
    longest = max(
      (p.rows for p in widths[latents] if p.stage != 'trial'), default=rows
    )
    if rows < longest:
      short.append((rows, longest, latents))
  if short:
    rows, longest, latents = min(short, key=lambda s: s[0] / s[1])
    said.append(
      f'at {len(short)} of {len(found)} widths learning rates were compared on '
      f'fewer rows than the longest runs have ({rows:,} of {longest:,} at '
      f'{latents:,} latents): the best rate of those may be another'
    )
  return found, said


def _rates(points: list[Point], metric: str) -> tuple[dict[float, float], int]:
  """{log lr: mean log loss} of runs equal in all else, and their rows: of the
  longest that have an optimum, then of those nearest to the L0 aimed at."""

  def losses(group: list[Point]) -> dict[float, float]:
    rates = _grouped(group, lambda p: math.log(p.lr))
    return {lr: _log_loss(same, metric) for lr, same in rates.items()}

  def worth(group: list[Point]) -> tuple:
    rates = losses(group)
    # Of many rates Halving goes on with three: the best may be at their edge.
    edge = min(rates, key=lambda r: rates[r]) in (min(rates), max(rates))
    off = [abs(math.log(p.l0 / p.k)) for p in group if p.l0 and p.k]
    enough = min(len(rates), 3)
    return not edge, enough, group[0].rows, len(rates), -np.mean(off or [0.0])

  groups = _grouped(points, lambda p: (p.rows, _setting(p._replace(lr=0.0))))
  group = max(groups.values(), key=worth)
  return losses(group), group[0].rows


def where_is(point: Point) -> dict:
  """The slice of a point: `Slice.where`."""
  changes = json.loads(point.changes or '{}')
  where = {'activation': point.activation, 'k': point.k}
  if point.k is None:
    where['l0_coef'] = point.l0_coef
  return where | {k: v for k, v in changes.items() if k in _PROBLEM}


def _setting(point: Point) -> str:
  """What may be chosen for a width: everything but its seed and its length."""
  changes = json.loads(point.changes or '{}')
  rest = {
    key: value
    for key, value in trajectory(changes).items()
    if key not in _KNOWN + _PROBLEM
  }
  # A coefficient found for an L0 follows from that, and differs between seeds.
  given = (
    point.activation != 'jumprelu'
    or point.k is None
    or point.stage == 'trial'
    or 'loss.target_l0' in changes
  )
  l0_coef = point.l0_coef if given else None
  return _key([point.lr, point.batch_rows, l0_coef, rest])


def _key(value: object) -> str:
  return json.dumps(value, sort_keys=True)


def _label(where: dict, several: bool) -> str:
  parts = [where['activation']] if several else []
  if where['k'] is not None:
    parts.append(f'k={where["k"]:g}')
  for key, value in where.items():
    if key not in ('activation', 'k'):
      parts.append(f'{key}={value}')
  return ', '.join(parts)


def _grouped(items: Iterable, key: Callable[[Any], Any]) -> dict[Any, list]:
  groups: dict[Any, list] = defaultdict(list)
  for item in items:
    groups[key(item)].append(item)
  return dict(groups)


def _same(p: Point, q: Point) -> bool:
  return p.latents == q.latents


def _log_loss(points: list[Point], metric: str) -> float:
  return float(np.mean(np.log([getattr(p, metric) for p in points])))


def _best(points: list[Point], metric: str) -> list[Point]:
  """At each width all runs of the setting that is best in its longest runs."""
  found = []
  for same in _grouped(points, lambda p: p.latents).values():
    longest = [p for p in same if p.rows == max(q.rows for q in same)]
    settings = _grouped(longest, _setting)
    best = min(settings, key=lambda s: _log_loss(settings[s], metric))
    found += [p for p in same if _setting(p) == best]
  return found


def _curves(runs, by_point, metric, flops, decayed) -> list[Curve]:
  """One for each run, or, of end points only, one for each width and seed."""
  if decayed or metric not in Mark._fields:
    groups = _grouped(runs, lambda p: (p.latents, p.seed))
    tables = [(run, group, 'rows_done') for run, group in groups.items()]
  else:
    tables = [
      ((p.latents, p.seed), by_point.get(p.point, []), 'rows') for p in runs
    ]
  name = 'flops' if flops == 'published' else 'flops_executed'
  found = [
    curve(n, *_columns(group, (name, metric, rows, 'seconds')), seed=seed)
    for (n, seed), group, rows in tables
    if group
  ]
  return [c for c in found if c]


def _columns(items: list, names: tuple[str, ...]) -> list[list[float]]:
  return [[getattr(item, name) for item in items] for name in names]


def _off(points: list[Point]) -> list[str]:
  off = [p for p in points if p.k and p.l0 and abs(p.l0 / p.k - 1) > _L0_OFF]
  if not off:
    return []
  worst = max(off, key=lambda p: abs(math.log((p.l0 or 1) / (p.k or 1))))
  return [
    f'{len(off)} of {len(points)} points are more than {_L0_OFF:.0%} off the '
    f'L0 aimed at (L0 {worst.l0:.3g} for {worst.k:g})'
  ]
