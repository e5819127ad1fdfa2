"""Fits scaling laws to a study: prints them, writes laws.json and a report.

python launch/fit_laws.py --study=DIR
python launch/fit_laws.py --study=DIR --predict_latents=65536 \
    --budget_flops=1e18
docs/math.md, "Scaling laws", says how they are fitted and when to believe them.
"""

import json
from pathlib import Path

from absl import flags

from sae_jax import cli
from sae_jax.paths import write_atomic
from sae_jax.sweep import laws_text, report, study, tables
from sae_jax.sweep.study_laws import NoLaw, Settings, study_laws
from sae_jax.train.run import run_folder

_STUDY = flags.DEFINE_string('study', None, 'Folder of the study.')
_METRIC = flags.DEFINE_string('metric', 'fvu', 'Loss: fvu, mse or delta_loss.')
_FLOPS = flags.DEFINE_string(
  'flops', 'published', 'Compute: published (12 B D F a step) or executed.'
)
_LEVEL = flags.DEFINE_float('level', 0.9, 'Of the intervals.')
_DECAYED = flags.DEFINE_bool(
  'decayed', None, 'Learning rates fell at the end of runs, so that only ends '
  'compare; else as config.json of the runs says.',
)  # fmt: skip
_LATENTS = flags.DEFINE_integer(
  'predict_latents', 0, 'Width to predict the loss of.', lower_bound=0
)
_BUDGET = flags.DEFINE_float(
  'budget_flops', 0, 'FLOPs to recommend a width for.', lower_bound=0
)
_BASE = flags.DEFINE_integer(
  'base', 0, 'Recommend a multiple of this; 0: a power of two.', lower_bound=0
)
flags.mark_flag_as_required('study')


def main() -> None:
  folder = run_folder(str(_STUDY.value))
  points, marks = tables.read(folder)
  decayed = _DECAYED.value
  if decayed is None:
    decayed = any(_decays(Path(p.folder)) for p in points if p.state == 'done')
  settings = Settings(
    metric=_METRIC.value, flops=_FLOPS.value, level=_LEVEL.value,
    decayed=decayed, predict_latents=_LATENTS.value,
    budget_flops=_BUDGET.value, base=_BASE.value,
  )  # fmt: skip
  try:
    found = study_laws(points, marks, settings)
  except NoLaw:  # the points are worth a page without laws, too
    (folder / 'laws.json').unlink(missing_ok=True)  # it was of another page
    if points:
      shown = {'metric': settings.metric, 'flops': settings.flops}
      report.write(folder, title(folder), points, marks, shown)
    raise
  data = json.dumps(found, indent=2, allow_nan=False) + '\n'
  write_atomic(folder / 'laws.json', data)
  print(laws_text.text(found))
  print(
    f'\nreport: {report.write(folder, title(folder), points, marks, found)}'
  )


def title(folder: Path) -> str:
  """What was studied: the site."""
  store = study.read_study(folder)['config']['store']
  return f'{store["site"]} of {Path(store["path"]).name}'


def _decays(folder: Path) -> bool:
  try:
    config = json.loads((folder / 'config.json').read_text())
    return config['optim']['decay_rows'] > 0
  except (OSError, ValueError, KeyError, TypeError):  # the folder is gone
    return False


if __name__ == '__main__':
  cli.run(main)
