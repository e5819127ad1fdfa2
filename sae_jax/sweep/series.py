"""The parts of a study, and the series that charts are made of."""

import math
import re
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple, TypeGuard

from sae_jax.evaluate.plots import MAIN, SECOND
from sae_jax.sweep.drawing import Chart, Look, Series, ramp
from sae_jax.sweep.tables import Mark, Point


class Study(NamedTuple):
  """What the charts are made from: points that were evaluated."""

  grid: list[Point]  # done, without trials
  done: list[Point]
  marks: Sequence[Mark]
  laws: dict[str, Any]
  metric: str  # the loss of the laws: a field of Point
  widths: list[int]  # of all charts: a width keeps its colour

  def look(self, latents: int) -> Look:
    """Colour and marker of a width."""
    return ramp(self.widths.index(latents), len(self.widths))


def series_of(
  label: str,
  at: Iterable[tuple],
  form: str,
  color: str,
  marker: str = 'o',
  edges: Sequence[tuple] = (),
  points: Sequence[str | None] = (),
) -> list[Series]:
  """A Series of the (x, y) that are numbers, x above zero; [] without any.

  `edges` are their (low, high), given for all or none; `points` their ids.
  """  # fmt: skip
  at = list(at)
  keep = [
    i for i, (x, y) in enumerate(at)
    if finite(x) and finite(y) and x > 0
  ]  # fmt: skip
  if not keep:
    return []
  low, high = zip(*(edges[i] for i in keep), strict=True) if edges else ((), ())
  if not all(finite(v) for v in (*low, *high)):
    low = high = ()
  return [
    Series(
      label, [at[i][0] for i in keep], [at[i][1] for i in keep], color, form,
      marker, low, high, [points[i] for i in keep] if points else (),
    )
  ]  # fmt: skip


def curve(
  label: str, of: dict[str, Any], form: str, color: str
) -> list[Series]:
  """A fitted curve with its band."""
  at = zip(of['x'], of['y'], strict=True)
  low, high = of.get('low') or (), of.get('high') or ()
  edges = list(zip(low, high, strict=True))
  return series_of(label, at, form, color, edges=edges)


def fit_points(
  fit: dict[str, Any],
) -> tuple[list[tuple[float, float]], list[str | None]]:
  """The (x, y) of a fit, and the ids of their points."""
  at = [(p['x'], p['y']) for p in fit['points']]
  return at, [p.get('point') for p in fit['points']]


def law(fit: dict[str, Any] | None) -> list[Series]:
  """The curve of a fit: dotted where it is not determined."""
  if not fit or not fit.get('curve'):
    return []
  ok = fit['verdict'] == 'ok'
  label, form = ('law', 'line') if ok else ('law, undetermined', 'dotted')
  return curve(label, fit['curve'], form, MAIN)


def held_out(fit: dict[str, Any] | None) -> list[Series]:
  """The widest, measured, and what a fit without them predicts for them."""
  held = fit.get('held_out') if fit else None
  if not held:
    return []
  x, edges = held['x'], [(held['low'], held['high'])]
  measured, predicted = (x, held['measured']), (x, held['predicted'])
  return series_of('held out', [measured], 'hollow', SECOND, 's') + series_of(
    'predicted without it', [predicted], 'points', SECOND, 'D', edges
  )


def distinct(parts: Iterable[dict]) -> list[dict]:
  """Each once, in their order: dicts are not hashable."""
  found: list[dict] = []
  for part in parts:
    if part not in found:
      found.append(part)
  return found


def values(points: Sequence[Point], field: str) -> list:
  """The values of a field, in order; None left out."""
  return sorted({getattr(p, field) for p in points} - {None})


def finite(value: float | None) -> TypeGuard[float]:
  return value is not None and math.isfinite(value)


def slug(name: str, part: dict[str, Any]) -> str:
  """A file's name: 'latents-topk-k-32'."""
  text = '-'.join(
    str(v)
    if k == 'activation'
    else f'{k}-{v:g}'
    if isinstance(v, int | float)
    else f'{k}-{v}'
    for k, v in part.items()
    if v is not None
  )
  return re.sub(r'[^a-z0-9.]+', '-', f'{name}-{text}'.lower()).strip('-')


def alike(charts: list[Chart]) -> list[Chart]:
  """Small multiples: the same axes and ticks for all."""
  drawn = [s for chart in charts for s in chart.series]
  x = [v for s in drawn for v in s.x]
  y = [v for s in drawn for v in s.y]
  if len(charts) < 2 or min(y) <= 0:
    return charts
  spans = ((min(x) / 1.15, max(x) * 1.15), (min(y) / 1.15, max(y) * 1.15))
  ticks = sorted({tick for chart in charts for tick in chart.ticks})
  return [chart._replace(spans=spans, ticks=ticks) for chart in charts]
