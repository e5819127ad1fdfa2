"""How often the intervals of scaling laws hold the true exponents.

Draws points from known laws with lognormal noise, fits them, and prints the
share of draws whose intervals hold the truth. No study is needed.
"""

import json
import time

import numpy as np
from absl import flags

from sae_jax import cli
from sae_jax.scaling import envelope, laws
from sae_jax.scaling.forms import IRREDUCIBLE, JOINT, POWER, Law

_DRAWS = flags.DEFINE_integer('draws', 100, 'Draws of each line.')
_LEVEL = flags.DEFINE_float('level', 0.9, 'Of the intervals.')
_SEED = flags.DEFINE_integer('seed', 0, 'Of the noise.')
_JSON = flags.DEFINE_bool('json', False, 'Print a line of JSON for each.')
_ONLY = flags.DEFINE_string('only', '', 'Cases whose names begin so.')
NOISES = (0.01, 0.03, 0.1)

# Gao et al. 2024 (arXiv 2406.04093), for GPT-4.
GPT4 = (-0.50, 0.26, -0.017, -0.042, -1.32, -0.085)


def widths(count: int) -> np.ndarray:
  return np.geomspace(512, 131072, count)[:, None]


def computes(count: int) -> np.ndarray:
  return np.geomspace(1e13, 1e18, count)[:, None]


def grid(ns: int, ks: int) -> np.ndarray:
  n, k = np.geomspace(2**11, 2**19, ns), np.geomspace(8, 512, ks)
  return np.stack([a.ravel() for a in np.meshgrid(n, k, indexing='ij')], -1)


# name: (law, parameters as published, points x [n, d])
CASES = {
  'L(N), 8 points': (IRREDUCIBLE, (0.1, 3.0, 0.4), widths(8)),
  'L(N), 12 points': (IRREDUCIBLE, (0.1, 3.0, 0.4), widths(12)),
  'L(N), small E': (IRREDUCIBLE, (0.02, 2.0, 0.25), widths(9)),
  'L(N), large E': (IRREDUCIBLE, (0.3, 3.0, 0.5), widths(9)),
  'L(C), 10 points': (IRREDUCIBLE, (0.09, 120.0, 0.2), computes(10)),
  'N_opt(C), 8 points': (POWER, (2e-4, 0.55), computes(8)),
  'L(N, K), 6 x 4': (JOINT, GPT4, grid(6, 4)),
  'L(N, K), steeper': (
    JOINT,
    (1.5, 0.1, -0.35, -0.03, -1.8, -0.15),
    grid(6, 4),
  ),
}

# Curves of L(N, R) = E + A N^-a + B R^-b, whose optimum is known.
E, A, ALPHA, B, BETA = 0.1, 2.0, 0.35, 800.0, 0.7
_SLOPE = ALPHA * BETA / (ALPHA + BETA)
ENVELOPES = {
  'envelope, N_opt(C)': (POWER, 'latents', BETA / (ALPHA + BETA)),
  'envelope, L(C)': (IRREDUCIBLE, 'loss', _SLOPE),
}


def exact(law: Law, truth: tuple[float, ...], x: np.ndarray) -> np.ndarray:
  """log y without noise [n]. At a centre of zero theta is as published."""
  theta = np.array(truth, float)
  if law.kind != 'joint':
    logs = ~np.array(law.slopes)
    theta[logs] = np.log(theta[logs])
  return law.value(theta[None], np.log(x))[0][0]


def truths(case: str) -> dict[str, float]:
  """What intervals are to hold: exponents, and y at four times the width."""
  law, truth, x = CASES[case]
  true = {
    name: value
    for name, value, slope in zip(law.names, truth, law.slopes, strict=True)
    if slope
  }
  if law.kind == 'joint':
    true['exponent'] = -truth[2] - truth[3] * np.log(x[:, 1]).mean()
  else:
    true['exponent'] = truth[-1]
  far = np.array(x[-1:])
  far[:, 0] *= 4
  return true | {'beyond': float(np.exp(exact(law, truth, far)[0]))}


def drawn(case: str, noise: float, seed: list[int]):
  """Points of a case: x [n, d], y [n], and errors as `laws.fit` takes them."""
  rng = np.random.default_rng(seed)
  if case not in ENVELOPES:
    law, truth, x = CASES[case]
    log_y = exact(law, truth, x) + noise * rng.standard_normal(len(x))
    return x, np.exp(log_y), None
  rows, curves = np.geomspace(2**14, 2**25, 40), []
  for n in 2 ** np.arange(9, 16):  # all of a curve is off by the same factor
    loss = E + A * float(n) ** -ALPHA + B * rows**-BETA
    loss *= np.exp(noise * rng.standard_normal())
    one = envelope.curve(int(n), 12 * 64 * n * rows, loss, rows, rows)
    curves += [one] if one else []
  best = envelope.thinned(envelope.optima(curves), curves)
  ends = [(c.latents, c.loss[-1]) for c in curves]
  x, y = np.array(ends, float).T
  scales = laws.fit(IRREDUCIBLE, x[:, None], y).scales
  name = ENVELOPES[case][1]
  x = np.array([o.flops for o in best])[:, None]
  y = np.array([getattr(o, name) for o in best])
  return x, y, envelope.shaken(curves, best, scales, 0)[name]


def measure(case: str, noise: float, draws: int, level: float, seed: int):
  """A line of the table; draws that can be given no law are not counted."""
  law = (CASES | ENVELOPES)[case][0]
  true = {'exponent': ENVELOPES[case][2]} if case in ENVELOPES else truths(case)
  held, off, unknown = dict.fromkeys(true, 0), [], 0
  began = time.perf_counter()
  for draw in range(draws):
    x, y, errors = drawn(case, noise, [seed, draw])
    if laws.missing(law, x):
      continue
    found = laws.fit(law, x, y, level=level, seed=draw, errors=errors)
    is_ = laws.parameters(found) | {'exponent': laws.exponent(found)}
    if 'beyond' in true:
      far = np.array(CASES[case][2][-1:])
      far[:, 0] *= 4
      is_['beyond'] = laws.predict(found, far)[0]
    for name, value in true.items():
      held[name] += is_[name].low <= value <= is_[name].high
    off.append(abs(is_['exponent'].value / true['exponent'] - 1))
    unknown += bool(laws.undetermined(found, 'x'))
  fitted = max(len(off), 1)
  return {
    'law': case, 'noise': noise, 'draws': len(off),
    'covered': {name: float(count / fitted) for name, count in held.items()},
    'median_error': float(np.median(off)), 'undetermined': unknown / fitted,
    'seconds_per_fit': (time.perf_counter() - began) / draws,
  }  # fmt: skip


def main() -> None:
  print(
    f'{"law":<20}{"noise":>6}{"draws":>6}{"covered":>9}{"least":>7}'
    f'{"4x beyond":>11}{"error":>8}{"undetermined":>14}{"s/fit":>8}'
  )
  for case in CASES | ENVELOPES:
    for noise in NOISES if case.startswith(_ONLY.value) else ():
      line = measure(case, noise, _DRAWS.value, _LEVEL.value, _SEED.value)
      print(json.dumps(line) if _JSON.value else as_text(line), flush=True)


def as_text(line: dict) -> str:
  held = dict(line['covered'])
  beyond = held.pop('beyond', None)
  return (
    f'{line["law"]:<20}{line["noise"]:>6.0%}{line["draws"]:>6}'
    f'{held["exponent"]:>9.0%}{min(held.values()):>7.0%}'
    + (f'{beyond:>11.0%}' if beyond is not None else f'{"":>11}')
    + f'{line["median_error"]:>8.1%}{line["undetermined"]:>14.0%}'
    f'{line["seconds_per_fit"]:>8.3f}'
  )


if __name__ == '__main__':
  cli.run(main)
