"""The charts of the laws, each with the measurements it was fitted to."""

from collections import defaultdict

from sae_jax.evaluate.plots import INK, MAIN, MUTED
from sae_jax.sweep.drawing import Chart, ramp
from sae_jax.sweep.law_words import (
  agree,
  find,
  flops_key,
  in_words,
  sentence,
  words,
)
from sae_jax.sweep.series import (
  Study,
  alike,
  curve,
  distinct,
  fit_points,
  held_out,
  law,
  series_of,
  slug,
  values,
)
from sae_jax.sweep.slices import by_slice
from sae_jax.sweep.tables import Mark


def compute(study: Study) -> list[Chart]:
  """Loss while training over FLOPs, its envelope and L(C); one a slice."""
  flops, metric, made = flops_key(study.laws), study.metric, []
  of_point = defaultdict(list)
  marks = study.marks if metric in Mark._fields else []
  for m in sorted(marks, key=lambda m: m.rows):
    of_point[m.point].append((getattr(m, flops), getattr(m, metric)))
  for part, chosen in by_slice(study.grid):
    series = []
    for p in sorted(chosen, key=lambda p: p.latents):
      line, look = of_point[p.point], study.look(p.latents)
      label, ids = f'{p.latents:,}', [p.point] * len(line)
      series += series_of(label, line, 'thin', *look, points=ids)
      end = [(getattr(p, flops), getattr(p, metric))]
      series += series_of('', end, 'small', *look, points=[p.point])
    if not series:
      continue
    fit = find(study.laws, 'L(C)', part)
    series += law(fit)
    for e in study.laws.get('envelopes', []):
      if agree(e['slice'], part):
        lowest = zip(e['flops'], e['loss'], strict=True)
        series += series_of('lowest', lowest, 'dashed', INK)
    series += held_out(fit)
    made.append(
      Chart(
        slug('compute', part), f'Loss against compute, {words(part)}',
        in_words(fit, 'L(C)'), 'flops', metric, series,
      )
    )  # fmt: skip
  return alike(made)


def latents(study: Study) -> list[Chart]:
  """L(N) with what was held out and what is predicted; one a slice."""
  made = []
  for part, chosen in by_slice(study.grid):
    fit = find(study.laws, 'L(N)', part)
    if fit:
      at, ids = fit_points(fit)
    else:
      at = [(p.latents, getattr(p, study.metric)) for p in chosen]
      ids = [p.point for p in chosen]
    series = series_of('measured', at, 'points', INK, points=ids)
    series += law(fit) + held_out(fit)
    for p in study.laws.get('predictions', []):
      if fit and agree(p['slice'], part):
        guess, edges = [(p['latents'], p['predicted'])], [(p['low'], p['high'])]
        series += series_of('predicted', guess, 'hollow', MAIN, 'D', edges)
    if series:
      drawn = [s for s in series if s.form in ('points', 'hollow')]
      made.append(
        Chart(
          slug('latents', part), f'Loss against latents, {words(part)}',
          in_words(fit, 'L(N)'), 'latents', study.metric, series,
          ticks=sorted({x for s in drawn for x in s.x}),
        )
      )  # fmt: skip
  return alike(made)


def joint(study: Study) -> list[Chart]:
  """L(N, K), a line per k."""
  made = []
  for fit in study.laws.get('fits', []):
    if fit['law'] != 'joint':
      continue
    at = dict(zip(*reversed(fit_points(fit)), strict=True))
    chosen = [p for p in study.grid if p.point in at]
    lines = {float(k): c for k, c in (fit.get('curves') or {}).items()}
    sparsity, series = values(chosen, 'k'), []
    for i, k in enumerate(sparsity):
      ids = [p.point for p in chosen if p.k == k]
      label, look = f'k = {k:g}', ramp(i, len(sparsity))
      own = [at[p] for p in ids]
      series += series_of(label, own, 'points', *look, points=ids)
      line = lines.get(k)
      series += curve('', line, 'line', look.color) if line else []
    if series:
      made.append(
        Chart(
          slug('joint', fit['slice']), sentence(fit['title']),
          in_words(fit, 'L(N, K)'), 'latents', fit['y'], series,
          ticks=values(chosen, 'latents'),
        )
      )  # fmt: skip
  return made


def optimum(study: Study) -> list[Chart]:
  """N_opt(C) and rows_opt(C)."""
  made, envelopes = [], study.laws.get('envelopes', [])
  names = {'latents': 'N_opt(C)', 'rows': 'rows_opt(C)'}
  fits = [
    f for f in study.laws.get('fits', [])
    if f['name'].startswith(tuple(names.values()))
  ]  # fmt: skip
  for part in distinct(e['slice'] for e in [*envelopes, *fits]):
    for key, name in names.items():
      fit = find(study.laws, name, part)
      best = [] if fit is None else fit_points(fit)[0]
      series, seen = series_of('best', best, 'points', INK), dict(best)
      for e in envelopes:
        if agree(e['slice'], part):
          rest = [
            (c, y, edge)
            for c, y, edge in zip(e['flops'], e[key], e['edge'], strict=True)
            if c not in seen
          ]
          inner = [(c, y) for c, y, edge in rest if not edge and not fit]
          outer = [(c, y) for c, y, edge in rest if edge]
          series += series_of('best', inner, 'points', INK)
          series += series_of('best, at the edge', outer, 'hollow', MUTED)
      series += law(fit) + held_out(fit)
      if series:
        what = 'width' if key == 'latents' else 'rows'
        made.append(
          Chart(
            slug(f'best-{what}', part),
            f'Best {what} against compute, {words(part)}',
            in_words(fit, name), 'flops', key, series,
          )
        )  # fmt: skip
  return made
