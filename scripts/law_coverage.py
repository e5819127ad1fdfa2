"""How often the intervals of scaling laws hold the true exponents.

Draws points from known laws with lognormal noise, fits them, and prints the
share of draws whose intervals hold the truth. No study is needed.
"""

import json
import time

import numpy as np
from absl import flags

from sae_jax import cli
from sae_jax.scaling import laws
from sae_jax.scaling.forms import IRREDUCIBLE, JOINT, POWER, Law

_DRAWS = flags.DEFINE_integer('draws', 100, 'Draws of each line.')
_LEVEL = flags.DEFINE_float('level', 0.9, 'Of the intervals.')
_SEED = flags.DEFINE_integer('seed', 0, 'Of the noise.')
_JSON = flags.DEFINE_bool('json', False, 'Print a line of JSON for each.')
NOISES = (0.01, 0.03, 0.1)

# Gao et al. 2024 (arXiv 2406.04093).
GPT4 = (-0.50, 0.26, -0.017, -0.042, -1.32, -0.085)


def widths(count: int) -> np.ndarray:
  return np.geomspace(512, 131072, count)


def grid(ns: int, ks: int) -> np.ndarray:
  n, k = np.geomspace(2**11, 2**19, ns), np.geomspace(8, 512, ks)
  return np.stack([a.ravel() for a in np.meshgrid(n, k, indexing='ij')], -1)


# name: (law, parameters as published, points)
CASES = {
  'L(N), 8 points': (IRREDUCIBLE, (0.1, 3.0, 0.4), widths(8)),
  'L(N), 12 points': (IRREDUCIBLE, (0.1, 3.0, 0.4), widths(12)),
  'L(N), small E': (IRREDUCIBLE, (0.02, 2.0, 0.25), widths(9)),
  'L(N), large E': (IRREDUCIBLE, (0.3, 3.0, 0.5), widths(9)),
  'L(C), 10 points': (
    IRREDUCIBLE, (0.09, 120.0, 0.2), np.geomspace(1e13, 1e18, 10)
  ),
  'N_opt(C), 8 points': (
    POWER, (2e-4, 0.55), np.geomspace(1e13, 1e18, 8)
  ),
  'L(N, K), 6 x 4': (JOINT, GPT4, grid(6, 4)),
  'L(N, K), steeper': (
    JOINT, (1.5, 0.1, -0.35, -0.03, -1.8, -0.15), grid(6, 4)
  ),
}  # fmt: skip


def exact(law: Law, truth: tuple[float, ...], x: np.ndarray) -> np.ndarray:
  """log y without noise [n]. At a centre of zero theta is as published."""
  theta = np.array(truth, float)
  if law.kind != 'joint':
    logs = ~np.array(law.slopes)
    theta[logs] = np.log(theta[logs])
  z = np.log(x.reshape(len(x), -1))
  return law.value(theta[None], z)[0][0]


def measure(case: str, noise: float, draws: int, level: float, seed: int):
  """A line of the table."""
  law, truth, x = CASES[case]
  log_y = exact(law, truth, x)
  names = [n for n, slope in zip(law.names, law.slopes, strict=True) if slope]
  held = dict.fromkeys([*names, 'exponent', 'beyond'], 0)
  errors, unknown, began = [], 0, time.perf_counter()
  centre = np.log(x.reshape(len(x), -1)).mean(0)
  true = dict(zip(law.names, truth, strict=True))
  far = x.reshape(len(x), -1)[-1] * [4.0] + 0.0
  true['beyond'] = np.exp(exact(law, truth, far[None])[0])
  true['exponent'] = true[names[0]]
  if law.kind == 'joint':
    true['exponent'] = -truth[2] - truth[3] * centre[1]
  for draw in range(draws):
    rng = np.random.default_rng([seed, draw])
    y = np.exp(log_y + noise * rng.standard_normal(len(x)))
    found = laws.fit(law, x, y, level=level, seed=draw)
    is_ = laws.parameters(found)
    is_['exponent'] = laws.exponent(found)
    is_['beyond'] = laws.predict(found, far[None])[0]
    for name in held:
      held[name] += is_[name].low <= true[name] <= is_[name].high
    errors.append(abs(is_['exponent'].value / true['exponent'] - 1))
    unknown += bool(laws.undetermined(found, 'x'))
  return {
    'law': case, 'noise': noise, 'draws': draws,
    'covered': {name: count / draws for name, count in held.items()},
    'median_error': float(np.median(errors)), 'undetermined': unknown / draws,
    'seconds_per_fit': (time.perf_counter() - began) / draws,
  }  # fmt: skip


def main() -> None:
  print(
    f'{"law":<20}{"noise":>6}{"covered":>9}{"least":>7}{"4x beyond":>11}'
    f'{"error":>8}{"undetermined":>14}{"s/fit":>8}'
  )
  for case in CASES:
    for noise in NOISES:
      line = measure(case, noise, _DRAWS.value, _LEVEL.value, _SEED.value)
      if _JSON.value:
        print(json.dumps(line), flush=True)
        continue
      held = line['covered']
      least = min(v for name, v in held.items() if name != 'beyond')
      print(
        f'{case:<20}{noise:>6.0%}{held["exponent"]:>9.0%}{least:>7.0%}'
        f'{held["beyond"]:>11.0%}{line["median_error"]:>8.1%}'
        f'{line["undetermined"]:>14.0%}{line["seconds_per_fit"]:>8.3f}',
        flush=True,
      )


if __name__ == '__main__':
  cli.run(main)
