"""The demo: every job as its own process, then one table of what came out.

Everything lies in the cache folder ($SAE_JAX_CACHE); what a former run of the
same demo left there is used again. Run it through scripts/quickstart.sh.
"""

import functools
import hashlib
import json
import os
import runpy
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

from absl import flags

from sae_jax import cli
from sae_jax.errors import UserError
from sae_jax.paths import cache_dir, write_atomic
from sae_jax.store.manifest import VERSION

ROOT = Path(__file__).resolve().parents[1]
_BUDGET = flags.DEFINE_enum(
  'budget', 'full', ['full', 'small'], 'small: a rehearsal in two minutes.'
)
_RECIPE = flags.DEFINE_list(
  'recipe', ['jumprelu', 'topk'], 'What to train: jumprelu, topk or both.'
)
_MINUTES = flags.DEFINE_float(
  'minutes', 10, 'About so long at most, with fewer rows and latents if need '
  'be; 0: however long. Installation and downloads come on top.', lower_bound=0,
)  # fmt: skip
_FIT = flags.DEFINE_string(
  'fit', '', 'Only write to this file what fits into --minutes here.'
)
RECIPES = ('jumprelu', 'topk')
SMALL = {
  'harvest': {
    'harvest.rows': 40_000, 'store.rows_per_shard': 8192,
    'harvest.compute_dtype': 'float32',
  },
  'train': {'train.rows': 150_000, 'sae.latents': 1024},
}  # fmt: skip
# What the configs take, and what else costs time: seconds to start a program
# and compile; in tokens through the model's first ten layers in float32 a row
# of training and an evaluation (two cores of a Zen 3: 2,000 tokens/s).
ROWS, TRAINING_ROWS, LATENTS = 500_000, 600_000, 4096
START, TRAINED, EVALUATED = 8, {'jumprelu': 0.5, 'topk': 0.28}, 100_000


class Stage(NamedTuple):
  """What one job took."""

  name: str
  seconds: float
  peak_gib: float  # resident memory
  note: str


def main() -> None:
  small = _BUDGET.value == 'small'
  for name in _RECIPE.value:
    if name not in RECIPES:
      raise UserError(f'--recipe={name}: use one of {", ".join(RECIPES)}')
  if _FIT.value:
    return fit(_FIT.value)
  stages = [run_stage('fetch', 'scripts/fetch_demo.py')]
  changes = SMALL
  if not small:
    given = f'--minutes={_MINUTES.value}', f'--recipe={",".join(_RECIPE.value)}'
    path = cache_dir('runs', f'quickstart-{digest("fit", VERSION, given)}.json')
    given, there = (f'--fit={path}', *given), os.path.exists(path)
    stages.append(run_stage('measure', __file__, *given, done=there))
    changes = json.loads(Path(path).read_text())
    print(*overrides(changes['harvest'] | changes['train']), flush=True)
  store, stage = harvest(changes['harvest'])
  stages.append(stage)
  runs = {}
  for name in _RECIPE.value:
    runs[name], done = train_and_evaluate(name, store, changes['train'], small)
    stages += done
  print_tables(runs, stages)


def fit(path: str) -> None:
  """Measures one batch of the harvest in each arithmetic, and writes changes of
  the configs with which all stages take --minutes."""
  from sae_jax.harvest import arithmetic, job
  from sae_jax.lm.subject import load_subject

  config = runpy.run_path(str(ROOT / 'configs' / 'harvest.py'))['get_config']()
  make = functools.partial(job.make_forward, load_subject(config.model))
  speed = arithmetic.speeds(config, make)
  dtype = arithmetic.faster(speed)
  changes, seconds = fitting(dtype, speed, _MINUTES.value, _RECIPE.value)
  print(f'about {seconds / 60:.0f} minutes from here')
  write_atomic(path, json.dumps(changes))


def fitting(
  dtype: str, speed: dict[str, float], minutes: float, recipes: list[str]
) -> tuple[dict, float]:
  """Changes of the configs, and the seconds that all stages then take: at most
  the configs' rows, and fewer latents before less than half of the rows."""
  slow, n = speed['float32'], len(recipes)
  fixed = START * (3 + 2 * n) + n * EVALUATED / slow
  trained = TRAINING_ROWS * sum(TRAINED[name] for name in recipes) / slow
  latents, part = 2 * LATENTS, 0.0
  while part < 0.4 and latents > LATENTS // 4:
    latents //= 2
    whole = ROWS / speed[dtype] + trained * latents / LATENTS
    part = min((60 * minutes - fixed) / whole, 1) if minutes else 1
  part = max(part, 0.1)
  harvest = {'harvest.rows': int(part * ROWS), 'harvest.compute_dtype': dtype}
  if part < 0.6:  # of several shards still
    harvest['store.rows_per_shard'] = 2**14
  train = {'train.rows': int(part * TRAINING_ROWS), 'sae.latents': latents}
  return {'harvest': harvest, 'train': train}, fixed + part * whole


def harvest(changes: dict) -> tuple[str, Stage]:
  """The store's folder, and what making it took."""
  config = ['configs/harvest.py:smollm2', *overrides(changes)]
  name = digest('harvest', VERSION, config)
  store = cache_dir('stores', f'quickstart-{name}')
  # Run even when the store is there: it looks whether all of it is.
  there = (Path(store) / 'manifest.json').exists()
  stage = run_stage(
    'harvest', 'launch/harvest.py', f'--config={config[0]}', *config[1:],
    f'--config.store.path={store}',
  )  # fmt: skip
  return store, stage._replace(note='re-used' if there else '')


def train_and_evaluate(
  name: str, store: str, changes: dict, small: bool
) -> tuple[Path, list[Stage]]:
  """The run folder of a recipe, and what its stages took."""
  config = [f'configs/{name}.py:demo', *overrides(changes)]
  run = Path(cache_dir('runs', f'quickstart-{name}-{digest(store, config)}'))
  trained = (run / 'trained').exists()
  train = run_stage(
    f'train {name}', 'launch/train.py', f'--workdir={run}',
    f'--config={config[0]}', *config[1:], f'--config.store.path={store}',
    done=trained,
  )  # fmt: skip
  write_atomic(run / 'trained', '')
  evaluated = trained and (run / 'report.html').exists()
  evaluate = run_stage(
    f'evaluate {name}', 'launch/evaluate.py', f'--workdir={run}',
    *(['--sequences=16', '--rows=8192'] if small else []),
    done=evaluated,
  )  # fmt: skip
  return run, [train, evaluate]


def run_stage(name: str, program: str, *args: str, done=False) -> Stage:
  """Runs a program to its end, or says that its result is there already."""
  if done:
    print(f'\n== {name}: re-using what an earlier run left', flush=True)
    return Stage(name, 0.0, 0.0, 're-used')
  print(f'\n== {name}', flush=True)
  start = time.monotonic()
  child = subprocess.Popen([sys.executable, str(ROOT / program), *args])
  _, status, usage = os.wait4(child.pid, 0)
  child.returncode = code = os.waitstatus_to_exitcode(status)
  if code:
    sys.exit(code if code > 0 else 128 - code)  # its own line says why
  unit = 2**30 if sys.platform == 'darwin' else 2**20  # bytes there, KiB here
  return Stage(name, time.monotonic() - start, usage.ru_maxrss / unit, '')


def overrides(changes: dict) -> list[str]:
  return [f'--config.{key}={value}' for key, value in changes.items()]


def digest(*what: object) -> str:
  """Names a result by its settings: changed ones get folders of their own."""
  files = [p.read_bytes() for p in sorted((ROOT / 'configs').glob('*.py'))]
  return hashlib.sha256(repr((what, files)).encode()).hexdigest()[:8]


def print_tables(runs: dict[str, Path], stages: list[Stage]) -> None:
  rows = [
    ('FVU', 'fvu', '.4f'),
    ('L0 (active latents per token)', 'l0', '.1f'),
    ('dead latents', 'dead_share', '.1%'),
    ('loss of the model alone, nats', 'ce_clean', '.4f'),
    ('delta loss, nats', 'delta_loss', '.4f'),
    ('loss recovered', 'loss_recovered', '.1%'),
  ]
  figures = {
    name: json.loads((run / 'evaluation.json').read_text())['figures']
    for name, run in runs.items()
  }
  print('\n' + ' ' * 32 + ''.join(f'{name:>12}' for name in figures))
  for label, key, form in rows:
    cells = ''.join(cell(figures[n][key], form) for n in figures)
    print(f'{label:<32}{cells}')
  rates = ''.join(f'{rows_per_s(run):>12,.0f}' for run in runs.values())
  print(f'{"training rows per second":<32}{rates}')
  print(f'\n{"stage":<20}{"seconds":>9}{"peak GiB":>10}')
  for s in stages:
    print(f'{s.name:<20}{s.seconds:>9.1f}{s.peak_gib:>10.2f}  {s.note}')
  total, peak = sum(s.seconds for s in stages), max(s.peak_gib for s in stages)
  print(f'{"all":<20}{total:>9.1f}{peak:>10.2f}\n')
  for name, run in runs.items():
    print(f'report ({name}): {run}/report.html')


def cell(value: float | None, form: str) -> str:
  return f'{"undefined":>12}' if value is None else f'{value:>12{form}}'


def rows_per_s(run: Path) -> float:
  """The median rate of a run's log."""
  lines = map(json.loads, (run / 'metrics.jsonl').read_text().splitlines())
  rates = sorted(x for m in lines if (x := m.get('perf/rows_per_s')))
  return rates[len(rates) // 2] if rates else 0.0


if __name__ == '__main__':
  cli.run(main)
