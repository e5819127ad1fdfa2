"""What the charts of a study show: from its points, marks and laws.

Points that lack a chart's numbers are left out of it.
"""

import math
import re
from collections.abc import Iterable, Sequence
from itertools import groupby
from typing import Any, NamedTuple

import numpy as np

from sae_jax.evaluate.plots import INK, MAIN, MUTED, SECOND
from sae_jax.sweep.drawing import Chart, Series, ramp
from sae_jax.sweep.law_words import (
  agree,
  find,
  flops_key,
  in_words,
  part_of,
  words,
)
from sae_jax.sweep.tables import Mark, Point


class Section(NamedTuple):
  name: str
  title: str
  text: str  # how to read its charts
  charts: list[Chart]
  absent: str  # why there may be none


def sections(
  points: Sequence[Point], marks: Sequence[Mark], laws: dict[str, Any]
) -> list[Section]:
  """The charts in the order of the page. `laws` is laws.json, or empty."""
  done = [p for p in points if p.state == 'done']
  grid = [p for p in done if p.stage == 'grid']
  return [
    Section(
      'compute', 'Loss against compute',
      'Each line is one SAE while it trains; colour is width. The dashed '
      'line is the lowest loss that any width reaches at that compute, the '
      'orange one the law fitted to it with its interval.',
      _compute(grid, marks, laws),
      'no evaluation while training was recorded',
    ),
    Section(
      'latents', 'Loss against latents',
      'The last evaluation of each SAE, the law fitted to it and its '
      'interval. Blue: the widest SAEs, held out of a second fit, beside what '
      'that fit predicts for them.',
      _latents(grid, laws),
      'no point has an FVU',
    ),
    Section(
      'joint', 'Loss against latents and sparsity',
      'One law for all widths and all k; a line per k.', _joint(grid, laws),
      'no joint law was fitted, which needs several k',
    ),
    Section(
      'optimum', 'The best width and length of training',
      'For each compute, the width and the number of rows that reach the '
      'lowest loss. Hollow: the best width was the narrowest or widest of '
      'the study, so the true one may lie beyond it; not fitted.',
      _optimum(laws),
      'no compute was reached by several widths, or no law was fitted',
    ),
    Section(
      'pareto', 'Fidelity against sparsity',
      'Lower and further left is better. A line per width joins the points '
      'that no other of that width beats on both axes; ringed points are '
      'beaten by none of any width.', _pareto(grid),
      'no point has an L0',
    ),
    Section(
      'lr', 'Learning rate',
      'Loss over the learning rate, a line per width. Hollow: the minimum '
      'that was found. A minimum at the end of its line is only a bound.',
      _rates(done, laws),
      'no width was trained at several learning rates',
    ),
    Section(
      'dead', 'Dead latents',
      'Share of the latents that had long not fired at the end of training.',
      _dead(grid),
      'no point has a share of dead latents',
    ),
    Section(
      'target', 'Cost of reaching a target loss',
      'The least training that reached each loss, a line per width; seconds '
      "hold for the study's machine only. Where a line ends, that width came "
      'no further.', _targets(laws),
      'no target loss was set, or none was reached',
    ),
  ]  # fmt: skip


def _compute(
  grid: Sequence[Point], marks: Sequence[Mark], laws: dict[str, Any]
) -> list[Chart]:
  flops = flops_key(laws)
  of_point = {
    key: sorted(group, key=lambda m: m.rows)
    for key, group in groupby(
      sorted(marks, key=lambda m: m.point), key=lambda m: m.point
    )
  }
  made = []
  for part, chosen in _slices(grid):
    widths, series = _values(chosen, 'latents'), []
    for p in sorted(chosen, key=lambda p: p.latents):
      curve = [
        (getattr(m, flops), m.fvu) for m in of_point.get(p.point, [])
      ]  # fmt: skip
      look = ramp(widths.index(p.latents), len(widths))
      series += _series(
        f'{p.latents:,}', curve, 'thin', points=[p.point] * len(curve), **look
      )
    if not series:
      continue
    for e in laws.get('envelopes', []):
      if agree(e['slice'], part):
        lowest = zip(e['flops'], e['loss'], strict=True)
        series += _series('lowest', lowest, 'dashed', INK)
    fit = find(laws, 'L(C)', part)
    series += _law(fit) + _held_out(fit)
    made.append(
      Chart(
        _slug('compute', part), f'Loss against compute, {words(part)}',
        in_words(fit, 'L(C)'), 'flops', 'fvu', series,
      )
    )  # fmt: skip
  return _alike(made)


def _latents(grid: Sequence[Point], laws: dict[str, Any]) -> list[Chart]:
  made = []
  for part, chosen in _slices(grid):
    fit = find(laws, 'L(N)', part)
    metric = fit['y'] if fit else 'fvu'
    if fit:
      at = [(p['x'], p['y']) for p in fit['points']]
      ids = [p.get('point') for p in fit['points']]
    else:
      at = [(p.latents, p.fvu) for p in chosen]
      ids = [p.point for p in chosen]
    series = _series('measured', at, 'points', INK, points=ids)
    series += _law(fit) + _held_out(fit)
    for p in laws.get('predictions', []):
      if fit and agree(p['slice'], part) and p['predicted'] is not None:
        series += _series(
          'predicted', [(p['latents'], p['predicted'])], 'hollow', MAIN, 'D',
          [(p['low'], p['high'])],
        )  # fmt: skip
    if series:
      ticks = sorted({x for s in series if s.form != 'line' for x in s.x})
      made.append(
        Chart(
          _slug('latents', part), f'Loss against latents, {words(part)}',
          in_words(fit, 'L(N)'), 'latents', metric, series, ticks=ticks,
        )
      )  # fmt: skip
  return _alike(made)


def _joint(grid: Sequence[Point], laws: dict[str, Any]) -> list[Chart]:
  made = []
  for fit in laws.get('fits', []):
    if fit['law'] != 'joint':
      continue
    chosen = [p for p in grid if agree(fit['slice'], p._asdict())]
    at = {p['point']: (p['x'], p['y']) for p in fit['points']}
    sparsity, series = _values(chosen, 'k'), []
    for i, k in enumerate(sparsity):
      ids = [p.point for p in chosen if p.k == k and p.point in at]
      look = ramp(i, len(sparsity))
      series += _series(
        f'k = {k:g}', [at[p] for p in ids], 'points', points=ids, **look
      )
      curve = (fit.get('curves') or {}).get(f'{k:g}')
      if curve:
        series += _curve('', curve, 'line', look['color'])
    if series:
      made.append(
        Chart(
          _slug('joint', fit['slice']), fit['title'].capitalize(),
          in_words(fit, 'L(N, K)'), 'latents', fit['y'], series,
          ticks=_values(chosen, 'latents'),
        )
      )  # fmt: skip
  return made


def _optimum(laws: dict[str, Any]) -> list[Chart]:
  made = []
  for e in laws.get('envelopes', []):
    for key, name in (('latents', 'N_opt(C)'), ('rows', 'rows_opt(C)')):
      fit = find(laws, name, e['slice'])
      edge = [
        (c, y) for c, y, on_edge in zip(e['flops'], e[key], e['edge'],
                                        strict=True) if on_edge
      ]  # fmt: skip
      if fit:
        inner = [(p['x'], p['y']) for p in fit['points']]
        edge = [at for at in edge if at not in inner]
      else:
        every = zip(e['flops'], e[key], strict=True)
        inner = [at for at in every if at not in edge]
      series = _series('best', inner, 'points', INK)
      series += _series('best, at the edge', edge, 'hollow', MUTED)
      series += _law(fit) + _held_out(fit)
      if series:
        what = 'width' if key == 'latents' else 'rows'
        made.append(
          Chart(
            _slug(f'best-{what}', e['slice']),
            f'Best {what} against compute, {words(e["slice"])}',
            in_words(fit, name), 'flops', key, series,
          )
        )  # fmt: skip
  return made


def _pareto(grid: Sequence[Point]) -> list[Chart]:
  made = []
  for metric, name in (('fvu', 'FVU'), ('delta_loss', 'Delta loss')):
    chosen = [p for p in grid if _finite(p.l0) and _finite(getattr(p, metric))]
    if not chosen:
      continue
    place = {p.point: (p.l0, getattr(p, metric)) for p in chosen}
    widths, kinds = _values(chosen, 'latents'), _values(chosen, 'activation')
    series = []
    for width in widths:
      for kind in kinds:
        own = [p for p in chosen if (p.latents, p.activation) == (width, kind)]
        look = ramp(widths.index(width), len(widths))
        label = f'{width:,}' + (f' {kind}' if len(kinds) > 1 else '')
        best = front(place[p.point] for p in own)
        series += _series(label, best, 'joined', **look)
        rest = [p for p in own if place[p.point] not in best]
        at = [place[p.point] for p in rest]
        ids = [p.point for p in rest]
        series += _series('', at, 'faint', points=ids, **look)
    best = front(place.values())
    series += _series('beaten by none', best, 'hollow', INK)
    made.append(
      Chart(
        f'pareto-{metric}', f'{name} against L0',
        f'{len(best)} of {len(chosen)} SAEs are beaten by none.',
        'l0', metric, series, log_y=metric == 'fvu',
      )
    )  # fmt: skip
  return made


def front(at: Iterable[tuple[float, float]]) -> list[tuple[float, float]]:
  """The (x, y) that no other beats on both, lower being better; by x."""
  best: list[tuple[float, float]] = []
  for x, y in sorted(set(at)):
    if not best or y < best[-1][1]:
      best.append((x, y))
  return best


def _rates(done: Sequence[Point], laws: dict[str, Any]) -> list[Chart]:
  made = []
  for part, chosen in _slices(done):
    widths, series = _values(chosen, 'latents'), []
    fit = find(laws, 'lr_opt', part)
    found = {p['x']: p['y'] for p in fit['points']} if fit else {}
    for i, width in enumerate(widths):
      look = ramp(i, len(widths))
      own = [p for p in chosen if p.latents == width and _finite(p.fvu)]
      for rows in _values(own, 'rows'):
        line = sorted((p.lr, p.fvu) for p in own if p.rows == rows)
        if len({lr for lr, _ in line}) < 2:
          continue
        series += _series(f'{width:,}', line, 'joined', **look)
        if width in found:
          series += [_minimum(line, found[width], look)]
    if series:
      made.append(
        Chart(
          _slug('lr', part), f'Loss against learning rate, {words(part)}',
          'Flat near its minimum, loss forgives a learning rate that is a '
          'little off.', 'lr', 'fvu', series,
        )
      )  # fmt: skip
    if fit and fit['points']:
      at = [(p['x'], p['y']) for p in fit['points']]
      made.append(
        Chart(
          _slug('best-lr', part), f'Best learning rate, {words(part)}',
          in_words(fit, 'lr_opt(N)'), 'latents', 'lr',
          _series('found', at, 'points', INK) + _law(fit) + _held_out(fit),
          ticks=sorted(found),
        )
      )  # fmt: skip
  return made


def _minimum(line: list, lr: float, look: dict[str, str]) -> Series:
  """Where the found minimum lies on a line of (lr, loss)."""
  loss = np.interp(math.log(lr), *zip(*((math.log(x), y) for x, y in line),
                                      strict=True))  # fmt: skip
  return Series('', [lr], [float(loss)], look['color'], 'hollow', 'o')


def _dead(grid: Sequence[Point]) -> list[Chart]:
  chosen = [p for p in grid if p.dead_share is not None]
  parts, series = _slices(chosen), []
  for i, (part, own) in enumerate(parts):
    at = sorted((p.latents, p.dead_share) for p in own)
    ids = [
      p.point for p in sorted(own, key=lambda p: (p.latents, p.dead_share))
    ]
    look = ramp(i, len(parts))
    series += _series(words(part), at, 'points', points=ids, **look)
    means = [
      (width, float(np.mean([y for x, y in at if x == width])))
      for width in _values(own, 'latents')
    ]
    series += _series('', means, 'thin', look['color'])
  if not series:
    return []
  widths = _values(chosen, 'latents')
  caption = 'A dot per SAE; the lines join the means of each width.'
  return [
    Chart('dead', 'Dead latents against width', caption, 'latents',
          'dead_share', series, log_y=False, ticks=widths)
  ]  # fmt: skip


def _targets(laws: dict[str, Any]) -> list[Chart]:
  entries, made = laws.get('time_to_target', []), []
  for part in _distinct(e['slice'] for e in entries):
    own = [e for e in entries if e['slice'] == part]
    widths = sorted({e['latents'] for e in own})
    for cost in ('seconds', 'flops'):
      series = []
      for i, width in enumerate(widths):
        at = sorted(
          (e['target'], e[cost]) for e in own
          if e['latents'] == width and e[cost] is not None
        )  # fmt: skip
        look = ramp(i, len(widths))
        series += _series(f'{width:,}', at, 'joined', **look)
      if not series:
        continue
      missed = sum(e[cost] is None for e in own)
      what = 'Time' if cost == 'seconds' else 'Compute'
      made.append(
        Chart(
          _slug(f'target-{cost}', part),
          f'{what} to reach a target loss, {words(part)}',
          f'{missed} of {len(own)} pairs of width and target were not reached.',
          'target', cost, series,
        )
      )  # fmt: skip
  return made


def _series(
  label: str,
  at: Iterable[tuple],
  form: str,
  color: str,
  marker: str = 'o',
  edges: Sequence[tuple] = (),
  points: Sequence[str | None] = (),
) -> list[Series]:
  """A Series of the (x, y) that are numbers, above zero; [] without any.

  `edges` are their (low, high), given for all or none; `points` their ids.
  """  # fmt: skip
  at = list(at)
  keep = [
    i for i, (x, y) in enumerate(at)
    if _finite(x) and _finite(y) and x > 0 and (y > 0 or y == 0)
  ]  # fmt: skip
  if not keep:
    return []
  low, high = zip(*(edges[i] for i in keep), strict=True) if edges else ((), ())
  if not all(_finite(v) for v in (*low, *high)):
    low = high = ()
  return [
    Series(
      label, [at[i][0] for i in keep], [at[i][1] for i in keep], color, form,
      marker, low, high, [points[i] for i in keep] if points else (),
    )
  ]  # fmt: skip


def _curve(label: str, curve: dict, form: str, color: str) -> list[Series]:
  """A fitted curve with its band."""
  at = zip(curve['x'], curve['y'], strict=True)
  low, high = curve.get('low') or (), curve.get('high') or ()
  edges = list(zip(low, high, strict=True))
  return _series(label, at, form, color, edges=edges)


def _law(fit: dict[str, Any] | None) -> list[Series]:
  """The curve of a fit: dotted where it is not determined."""
  if not fit or not fit.get('curve'):
    return []
  ok = fit['verdict'] == 'ok'
  label, form = ('law', 'line') if ok else ('law, undetermined', 'dotted')
  return _curve(label, fit['curve'], form, MAIN)


def _held_out(fit: dict[str, Any] | None) -> list[Series]:
  held = fit.get('held_out') if fit else None
  if not held:
    return []
  x, edges = held['x'], [(held['low'], held['high'])]
  measured, predicted = (x, held['measured']), (x, held['predicted'])
  return _series('held out', [measured], 'hollow', SECOND, 's') + _series(
    'predicted without it', [predicted], 'points', SECOND, 'D', edges
  )


def _slices(points: Sequence[Point]) -> list[tuple[dict, list[Point]]]:
  """Points by activation and k, in that order."""
  parts = sorted(
    _distinct(part_of(p) for p in points),
    key=lambda s: (s['activation'], 'k' in s, list(s.values())[1]),
  )
  return [(s, [p for p in points if part_of(p) == s]) for s in parts]


def _distinct(parts: Iterable[dict]) -> list[dict]:
  found: list[dict] = []
  for part in parts:
    if part not in found:
      found.append(part)
  return found


def _values(points: Sequence[Point], field: str) -> list:
  """The values of a field, in order; None left out."""
  return sorted({getattr(p, field) for p in points} - {None})


def _finite(value: Any) -> bool:
  return value is not None and math.isfinite(value)


def _slug(name: str, part: dict[str, Any]) -> str:
  """A file's name: 'latents-topk-k-32'."""
  return re.sub(r'[^a-z0-9.]+', '-', f'{name}-{words(part)}'.lower()).strip('-')


def _alike(charts: list[Chart]) -> list[Chart]:
  """Small multiples: the same axes for all."""
  drawn = [s for chart in charts for s in chart.series]
  if len(charts) < 2:
    return charts
  spans = tuple(
    (min(v) / 1.15, max(v) * 1.15)
    for v in (
      [x for s in drawn for x in s.x],
      [y for s in drawn for y in s.y if y > 0],
    )
  )
  return [chart._replace(spans=spans) for chart in charts]
