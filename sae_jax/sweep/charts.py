"""What the charts of a study show: from its points, marks and laws.

Points that lack a chart's numbers are left out of it.
"""

import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from statistics import fmean
from typing import Any

import numpy as np

from sae_jax.evaluate.plots import INK
from sae_jax.sweep import law_charts
from sae_jax.sweep.drawing import Chart, ramp
from sae_jax.sweep.law_words import find, in_words, words
from sae_jax.sweep.series import (
  Study,
  alike,
  distinct,
  finite,
  fit_points,
  held_out,
  law,
  series_of,
  slug,
  values,
)
from sae_jax.sweep.slices import by_slice
from sae_jax.sweep.tables import Mark, Point


def sections(
  points: Sequence[Point], marks: Sequence[Mark], laws: dict[str, Any]
) -> dict[str, list[Chart]]:
  """The charts of each section of the page. `laws` is laws.json, or empty."""
  metric = laws.get('metric', 'fvu')
  evaluated = {m.point for m in marks}
  done = [
    p for p in points if p.state == 'done'
    and (finite(getattr(p, metric)) or p.point in evaluated)
  ]  # fmt: skip
  grid = [p for p in done if p.stage == 'grid']
  timed = {e['latents'] for e in laws.get('time_to_target', [])}
  widths = sorted(timed | {p.latents for p in done})
  study = Study(grid, done, marks, laws, metric, widths)
  return {
    'compute': law_charts.compute(study),
    'latents': law_charts.latents(study),
    'joint': law_charts.joint(study),
    'optimum': law_charts.optimum(study),
    'pareto': _pareto(study),
    'rates': _rates(study),
    'dead': _dead(study),
    'targets': _targets(study),
  }


def _pareto(study: Study) -> list[Chart]:
  made, kinds = [], values(study.grid, 'activation')
  for metric, name in (('fvu', 'FVU'), ('delta_loss', 'Delta loss')):
    place = {
      p.point: (p.l0, getattr(p, metric)) for p in study.grid
      if finite(p.l0) and finite(getattr(p, metric))
    }  # fmt: skip
    overall, figures = front(place.values()), []
    for kind in kinds:
      groups, series = defaultdict(list), []
      for p in study.grid:
        if p.point in place and p.activation == kind:
          groups[p.latents].append(p.point)
      for width, ids in sorted(groups.items()):
        look, best = study.look(width), front(place[p] for p in ids)
        rest = [p for p in ids if place[p] not in best]
        at = [place[p] for p in rest]
        series += series_of(f'{width:,}', best, 'joined', *look)
        series += series_of('', at, 'faint', *look, points=rest)
      own = {place[p] for ids in groups.values() for p in ids}
      best = [at for at in overall if at in own]
      series += series_of('beaten by none', best, 'hollow', INK)
      if series:
        figures.append(
          Chart(
            slug(f'pareto-{metric}', {'activation': kind}),
            f'{name} against L0, {kind}',
            f'{len(best)} of {sum(map(len, groups.values()))} SAEs are beaten '
            'by none.', 'l0', metric, series,
            log_y=min(y for _, y in own) > 0,
          )
        )  # fmt: skip
    made += alike(figures)
  return made


def front(at: Iterable[tuple[float, float]]) -> list[tuple[float, float]]:
  """The (x, y) that no other beats on both, lower being better; by x."""
  best: list[tuple[float, float]] = []
  for x, y in sorted(set(at)):
    if not best or y < best[-1][1]:
      best.append((x, y))
  return best


def _rates(study: Study) -> list[Chart]:
  made = []
  for part, chosen in by_slice(study.done):
    series, fit = [], find(study.laws, 'lr_opt', part)
    at, ids = fit_points(fit) if fit else ([], [])
    lines = defaultdict(list)
    for p in chosen:
      if finite(getattr(p, study.metric)):
        lines[p.latents, p.rows].append((p.lr, getattr(p, study.metric)))
    for (width, _), line in sorted(lines.items()):
      if len({lr for lr, _ in line}) > 1:
        line, look = sorted(line), study.look(width)
        series += series_of(f'{width:,}', line, 'joined', *look)
        found = [_on_line(line, lr) for x, lr in at if x == width]
        series += series_of('', found, 'hollow', look.color)
    if series:
      made.append(
        Chart(
          slug('lr', part), f'Loss against learning rate, {words(part)}',
          'The flatter a line at its minimum, the less the exact rate matters.',
          'lr', study.metric, series,
        )
      )  # fmt: skip
    if at:
      series = series_of('found', at, 'points', INK, points=ids)
      made.append(
        Chart(
          slug('best-lr', part), f'Best learning rate, {words(part)}',
          in_words(fit, 'lr_opt(N)'), 'latents', 'lr',
          series + law(fit) + held_out(fit), ticks=sorted({x for x, _ in at}),
        )
      )  # fmt: skip
  return made


def _on_line(line: list[tuple[float, float]], lr: float) -> tuple[float, float]:
  """(lr, loss) where a line of them has this lr."""
  rates, losses = zip(*line, strict=True)
  return lr, float(np.interp(math.log(lr), np.log(rates), losses))


def _dead(study: Study) -> list[Chart]:
  chosen = [p for p in study.grid if finite(p.dead_share)]
  parts, series = by_slice(chosen), []
  for i, (part, own) in enumerate(parts):
    at = [(p.latents, p.dead_share or 0.0) for p in own]
    ids, look = [p.point for p in own], ramp(i, len(parts))
    means = [
      (width, fmean(y for x, y in at if x == width))
      for width in values(own, 'latents')
    ]
    series += series_of(words(part), at, 'points', *look, points=ids)
    series += series_of('', means, 'thin', look.color)
  if not series:
    return []
  return [
    Chart(
      'dead', 'Dead latents against width',
      'A dot per SAE; the lines join the means of each width.', 'latents',
      'dead_share', series, log_y=False, ticks=values(chosen, 'latents'),
    )
  ]  # fmt: skip


def _targets(study: Study) -> list[Chart]:
  entries, made = study.laws.get('time_to_target', []), []
  for part in distinct(e['slice'] for e in entries):
    own = [e for e in entries if e['slice'] == part]
    for cost, what in (('seconds', 'Time'), ('flops', 'Compute')):
      series = []
      for width in sorted({e['latents'] for e in own}):
        at = sorted((e['target'], e[cost]) for e in own
                    if e['latents'] == width and finite(e[cost]))  # fmt: skip
        series += series_of(f'{width:,}', at, 'joined', *study.look(width))
      missed = sum(not finite(e[cost]) for e in own)
      if series:
        made.append(
          Chart(
            slug(f'target-{cost}', part),
            f'{what} to reach a target loss, {words(part)}',
            f'{missed} of {len(own)} pairs of width and target not reached.',
            'target', cost, series, ticks=sorted({e['target'] for e in own}),
          )
        )  # fmt: skip
  return made
