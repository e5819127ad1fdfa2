"""All laws of a study, from its two tables to the dict of laws.json."""

import numpy as np

from sae_jax.errors import UserError
from sae_jax.scaling import laws
from sae_jax.scaling.envelope import (
  Optimum,
  optima,
  reach,
  shaken,
  thinned,
)
from sae_jax.scaling.forms import IRREDUCIBLE, JOINT, POWER, Law
from sae_jax.scaling.laws import Fit
from sae_jax.sweep.advice import FAR, Made, Settings, predictions, recommend
from sae_jax.sweep.convergence import comparable, falls
from sae_jax.sweep.slices import (
  METRICS,
  Noise,
  Slice,
  best_lrs,
  seed_noise,
  slices,
  usable,
)
from sae_jax.sweep.tables import Mark, Point

FLOPS = ('published', 'executed')
_CURVE = 80  # points of a drawn law
_TARGETS = 5  # losses whose cost is listed, for each slice
_NO_NOISE = (
  'the noise of single runs is not known, and intervals would be too narrow: '
  'add a width, so that L(N) is fitted, or repeat points with other seeds'
)


class NoLaw(UserError):
  """No law at all can be fitted to a study."""


def study_laws(
  points: list[Point], marks: list[Mark], settings: Settings
) -> dict:
  """The dict of laws.json. Raises UserError for bad settings, or NoLaw."""
  _check(settings)
  kept, left_out = usable(points, settings.metric)
  noise = seed_noise(kept, settings.metric)
  found = slices(kept, marks, settings.metric, settings.flops, settings.decayed)
  best = {one.label: optima(one.curves) for one in found}
  made = {
    one.label: _fits(one, best[one.label], settings, noise) for one in found
  }
  joint = [_joint(same, settings, noise) for same in _poolable(found)]
  entries = [m.entry for fits in made.values() for m in fits.values()]
  entries += [m.entry for m in joint]
  if not any(entry['params'] for entry in entries):
    why = entries[0]['why'] if entries else 'no point can be used'
    raise NoLaw(
      f'no law can be fitted: {why}'
      + (f'; {left_out}' if left_out else '')
      + ': run more points of the study'
    )
  advised = [
    recommend(one, made[one.label], best[one.label], settings) for one in found
  ]
  return {
    'format': 'sae_jax.laws', 'version': 1, 'metric': settings.metric,
    'flops': settings.flops, 'level': settings.level, 'left_out': left_out,
    'seed_noise': noise and noise.scale, 'fits': entries,
    'envelopes': [
      {'slice': one.where, **_columns(best[one.label])} for one in found
    ],
    'time_to_target': [row for one in found for row in _to_target(one)],
    'predictions': predictions(found, made, settings),
    'recommendation': [a for a in advised if isinstance(a, dict)],
    'notes': [a for a in advised if isinstance(a, str)],
  }  # fmt: skip


def _check(settings: Settings) -> None:
  for flag, value, known in (
    ('metric', settings.metric, METRICS),
    ('flops', settings.flops, FLOPS),
  ):
    if value not in known:
      raise UserError(f'--{flag}={value}: give one of {", ".join(known)}')
  if not 0.5 <= settings.level < 1:
    raise UserError(f'--level={settings.level:g}: give 0.5 or more, below 1')


def _fits(
  one: Slice, best: list[Optimum], settings: Settings, noise: Noise | None
) -> dict[str, Made]:
  """L(N), L(C), N_opt, rows_opt and, where rates were tried, lr_opt."""
  y = settings.metric
  known = noise.scale if noise else 0.0
  made = {}

  def add(name, law, title, letter, x, y, rows, warnings, **more):
    entry = {
      'name': f'{name}|{one.label}',
      'title': title + (f', {one.label.replace("=", " = ")}'),
      'formula': law.formula.replace('x', letter),
      'x': x, 'y': y, 'slice': one.where,
    }  # fmt: skip
    made[name] = _made(law, entry, rows, warnings, settings, **more)

  points, said = comparable([one], y)
  rows = [(p.latents, getattr(p, y), p.point) for p in points]
  add('L(N)', IRREDUCIBLE, 'loss against latents', 'N', 'latents', y, rows,
      said + one.warnings, noise=known)  # fmt: skip
  made['L(N)'].entry['convergence'] = falls(one)
  inner, edges = thinned(best, one.curves), _edges(best)
  at = lambda name: [(o.flops, getattr(o, name), None) for o in inner]
  scales = _scales(made['L(N)'].fit, noise, settings.resamples)
  errors, doubt = {}, ''
  if scales is None:
    doubt = _NO_NOISE
  elif inner:
    errors = shaken(one.curves, inner, scales, 0)
  for name, law, title, y_name, values in (
    ('L(C)', IRREDUCIBLE, 'least loss against compute', y, 'loss'),
    ('N_opt(C)', POWER, 'best latents against compute', 'latents', 'latents'),
    ('rows_opt(C)', POWER, 'best rows against compute', 'rows', 'rows'),
  ):
    add(name, law, title, 'C', 'flops', y_name, at(values), edges,
        noise=known if values == 'loss' else 0.0, errors=errors.get(values),
        doubt=doubt)  # fmt: skip
  if len({(p.latents, p.lr) for p in one.tried}) > len(
    {p.latents for p in one.tried}
  ):
    rates, said = best_lrs(one.tried, y)
    add('lr_opt(N)', POWER, 'best learning rate against latents', 'N',
        'latents', 'lr', [(n, lr, None) for n, lr in rates], said)  # fmt: skip
  return made


def _scales(
  ends: Fit | None, noise: Noise | None, resamples: int
) -> np.ndarray | None:
  """What the noise of single runs may be [R]: that of the residuals of L(N),
  without such a law that of seeds."""
  if ends or not noise:
    return ends and ends.scales
  chi_square = np.random.default_rng(0).chisquare(noise.free, resamples)
  return noise.scale * np.sqrt(noise.free / chi_square)


def _made(
  law: Law, entry: dict, rows: list, warnings: list[str], settings: Settings,
  *, noise: float = 0.0, errors: np.ndarray | None = None, doubt: str = '',
) -> Made:  # fmt: skip
  """rows: (x or (n, k), y, id of the point). Fits, or says why not; doubt: why
  a fit's intervals would be wrong."""
  rows = sorted(rows, key=lambda row: row[0])
  x = np.array([row[0] for row in rows], float).reshape(
    len(rows), 2 if law.kind == 'joint' else 1
  )
  y = np.array([row[1] for row in rows], float)
  entry |= {
    'law': law.kind, 'warnings': warnings,
    'points': [
      {'x': a[0], 'y': b, 'point': row[2]} | ({'k': a[1]} if a[1:] else {})
      for a, b, row in zip(x.tolist(), y.tolist(), rows, strict=True)
    ],
    'params': None, 'rms_log_error': None, 'held_out': None,
    'curves' if law.kind == 'joint' else 'curve': None,
  }  # fmt: skip
  if why := laws.missing(law, x):
    return Made(entry | {'verdict': 'too few points', 'why': why}, None)
  options = {
    'level': settings.level, 'resamples': settings.resamples, 'noise': noise
  }  # fmt: skip
  found = laws.fit(law, x, y, errors=errors, **options)
  quantity = {'flops': 'compute'}.get(entry['x'], entry['x'])
  why = doubt or laws.undetermined(found, f'the range of {quantity}')
  entry |= {
    'params': {
      name: value._asdict() for name, value in laws.parameters(found).items()
    },
    'exponent': laws.exponent(found)._asdict(),
    'rms_log_error': found.rms,
    'verdict': 'undetermined' if why else 'ok', 'why': why,
  }  # fmt: skip
  if quantity != 'compute':  # points of an envelope share their curves
    entry['held_out'] = _held_out(law, x, y, options)
  ends = x[0, 0], max(FAR * x[-1, 0], settings.predict_latents)
  if entry['x'] == 'flops':
    ends = x[0, 0], max(FAR * x[-1, 0], settings.budget_flops)
  along = np.geomspace(*ends, _CURVE)
  if law.kind == 'joint':
    entry['curves'] = {
      f'{k:g}': _curve(found, along, np.full(_CURVE, k))
      for k in np.unique(x[:, 1])
    }
  else:
    entry['curve'] = _curve(found, along)
  return Made(entry, found)


def _curve(found: Fit, *x: np.ndarray) -> dict:
  y = laws.predict(found, np.stack(x, -1))
  return {'x': x[0].tolist()} | {
    key: [getattr(one, at) for one in y]
    for key, at in (('y', 'value'), ('low', 'low'), ('high', 'high'))
  }


def _held_out(law: Law, x, y, options) -> dict | None:
  """The largest width as a fit without it predicts it.

  The interval is that of a measurement. Of the joint law: the worst k.
  """
  rest = x[:, 0] < x[:, 0].max()
  if laws.missing(law, x[rest]):
    return None
  found = laws.fit(law, x[rest], y[rest], **options)
  at, index = np.unique(x[~rest], axis=0, return_inverse=True)
  log_y = np.log(y[~rest])
  lines = []
  for i, is_ in enumerate(laws.predict(found, at, measured=True)):
    measured = float(np.exp(log_y[index.ravel() == i].mean()))
    lines.append({
      'x': float(at[i, 0]), 'measured': measured, 'predicted': is_.value,
      'low': is_.low, 'high': is_.high, 'error': is_.value / measured - 1,
    } | ({'k': float(at[i, 1])} if law.kind == 'joint' else {}))  # fmt: skip
  return max(lines, key=lambda line: abs(np.log1p(line['error'])))


def _poolable(found: list[Slice]) -> list[list[Slice]]:
  """Slices that differ in k only, two or more."""
  pools: dict[str, list[Slice]] = {}
  for one in found:
    if one.where['k'] is not None:
      rest = {k: v for k, v in one.where.items() if k != 'k'}
      pools.setdefault(str(sorted(rest.items())), []).append(one)
  return [pool for pool in pools.values() if len(pool) > 1]


def _joint(pool: list[Slice], settings: Settings, noise: Noise | None) -> Made:
  where = {k: v for k, v in pool[0].where.items() if k != 'k'}
  entry = {
    'name': 'L(N, K)|' + ', '.join(str(v) for v in where.values()),
    'title': 'loss against latents and k', 'formula': JOINT.formula,
    'x': 'latents', 'y': settings.metric, 'slice': where | {'k': None},
  }  # fmt: skip
  points, said = comparable(pool, settings.metric)
  rows = [
    ((p.latents, p.k), getattr(p, settings.metric), p.point) for p in points
  ]
  said += [f'{one.label}: {w}' for one in pool for w in one.warnings]
  known = noise.scale if noise else 0.0
  return _made(JOINT, entry, rows, said, settings, noise=known)


def _edges(best: list[Optimum]) -> list[str]:
  edges = sum(o.edge for o in best)
  if not edges:
    return []
  return [
    f'at {edges} of {len(best)} computes the best width is the smallest or '
    'largest that reaches it: these are left out'
  ]


def _columns(best: list[Optimum]) -> dict:
  return {
    name: [getattr(o, name) for o in best]
    for name in ('flops', 'loss', 'latents', 'rows', 'edge')
  }


def _to_target(one: Slice) -> list[dict]:
  """What each width needs to reach the last losses of some widths."""
  ends = [curve.loss[-1] for curve in one.curves]
  if not ends:
    return []
  targets = np.quantile(ends, np.linspace(1, 0, min(_TARGETS, len(ends))))
  return [
    {'slice': one.where, **line._asdict()}
    for target in targets.tolist()
    for line in reach(one.curves, target)
  ]
