"""What laws say of widths and budgets that were not measured."""

from typing import NamedTuple

import numpy as np

from sae_jax.scaling import laws
from sae_jax.scaling.laws import Fit
from sae_jax.sweep.slices import Slice

FAR = 10  # times beyond the grid: from here on with a warning


class Settings(NamedTuple):
  """What to fit, and to be told."""

  metric: str = 'fvu'
  flops: str = 'published'
  level: float = 0.9
  decayed: bool = False  # learning rates fell: only ends of runs compare
  predict_latents: int = 0
  budget_flops: float = 0.0
  base: int = 0  # recommended widths are multiples of it; 0: powers of two
  resamples: int = 400


class Made(NamedTuple):
  """A fit of laws.json, and what it was made from; None where it was not."""

  entry: dict
  fit: Fit | None


def predictions(found, made, settings: Settings) -> list[dict]:
  """Of a single measurement at `predict_latents`."""
  n, lines = settings.predict_latents, []
  for one in found if n else ():
    is_, law = made[one.label]['L(N)'], 'L(N)'
    if is_.fit is None:
      continue
    value = laws.predict(is_.fit, np.array([n]), measured=True)[0]
    beyond = n / is_.fit.x.max()
    lines.append({
      'slice': one.where, 'latents': n, 'predicted': value.value,
      'low': value.low, 'high': value.high, 'beyond': beyond, 'law': law,
      'warnings': _far(beyond, 'width') + _doubts(is_),
    })  # fmt: skip
  return lines


def recommend(one, made, best, settings: Settings) -> dict | str | None:
  """Width, rows and learning rate for a budget; a sentence if there is none."""
  flops = settings.budget_flops
  if not flops:
    return None
  width, loss = made['N_opt(C)'], made['L(C)']
  if width.fit is None or loss.fit is None:
    lacking = width if width.fit is None else loss
    return (
      f'no recommendation for {one.label}: {lacking.entry["name"]}: '
      f'{lacking.entry["why"]}'
    )
  n = laws.predict(width.fit, np.array([flops]))[0]
  latents = rounded(n.value, settings.base)
  value = laws.predict(loss.fit, np.array([flops]), measured=True)[0]
  largest = max(o.flops for o in best)
  lr = made.get('lr_opt(N)')
  warnings = _far(flops / largest, 'compute') + _doubts(width) + _doubts(loss)
  if lr is None or lr.fit is None:
    lr, doubt = None, 'no law of the learning rate: set it by trials'
    warnings.append(doubt)
  else:
    warnings += _doubts(lr)
    lr = laws.predict(lr.fit, np.array([latents]))[0].value
  return {
    'slice': one.where, 'flops': flops, 'latents': latents,
    'latents_low': n.low, 'latents_high': n.high,
    'rows': round(flops / _flops_a_row(one, latents)), 'lr': lr,
    'predicted': value.value, 'low': value.low, 'high': value.high,
    'beyond': flops / largest, 'warnings': list(dict.fromkeys(warnings)),
  }  # fmt: skip


def _flops_a_row(one: Slice, latents: int) -> float:
  """Of a width: that of the nearest measured one, by latents."""
  near = min(one.curves, key=lambda c: abs(np.log(c.latents / latents)))
  return near.flops[-1] / near.rows[-1] * latents / near.latents


def rounded(latents: float, base: int) -> int:
  """To the next power of two in log, or to a multiple of `base`."""
  if base:
    return max(base, round(latents / base) * base)
  return 2 ** round(float(np.log2(latents)))


def _far(beyond: float, what: str) -> list[str]:
  if beyond <= FAR:
    return []
  return [
    f'{beyond:.3g}x beyond the largest {what} measured: laws seldom hold so far'
  ]


def _doubts(made: Made) -> list[str]:
  entry = made.entry
  why = [] if entry['verdict'] == 'ok' else [f'{entry["name"]}: {entry["why"]}']
  return why + entry['warnings']
