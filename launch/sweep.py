"""Runs a study: a grid of dictionaries that share batches and compiled steps.

python launch/sweep.py --config=configs/scaling.py:demo --workdir=studies/a
The config file's sweep() says what the points differ in. The same command again
does only what is missing, whatever was killed. docs/scaling.md has the rest.
"""

import shlex
import sys
from pathlib import Path

from absl import flags, logging
from ml_collections import config_flags

from sae_jax import cli
from sae_jax.errors import UserError
from sae_jax.sweep import (
  drive,
  estimate,
  grid,
  packing,
  run_job,
  study,
  submit,
  tables,
)
from sae_jax.sweep.machine import UNKNOWN, Machine, here
from sae_jax.train.run import run_folder

_CONFIG = config_flags.DEFINE_config_file('config', None, 'Config of a study.')
_WORKDIR = flags.DEFINE_string('workdir', None, 'Folder of the study.')
_SUBMIT = flags.DEFINE_enum(
  'submit', 'here', ['here', 'slurm', 'print'],
  'Run the jobs on this machine, submit them as a Slurm array, or print a '
  'command for each.',
)  # fmt: skip
_DRY_RUN = flags.DEFINE_bool(
  'dry_run', False, 'Only print the grid, FLOPs, time and disk estimates.'
)
_POINTS = flags.DEFINE_integer(
  'points_per_job', 0, 'At most so many; 0: as many as memory has room for '
  '(8 where that is not known).', lower_bound=0,
)  # fmt: skip
_RETRY = flags.DEFINE_bool('retry_failed', False, 'Run failed points again.')
_SEQUENCES = flags.DEFINE_integer(
  'sequences', 16, 'Held-out sequences for the delta loss of each point; 0: no '
  'evaluation with the language model.', lower_bound=0,
)  # fmt: skip
_JOB = flags.DEFINE_string('job', '', 'Run this job of the study only.')
_SLURM = flags.DEFINE_string('slurm', '', 'More options for sbatch.')
flags.mark_flag_as_required('config')
flags.register_validator('workdir', bool, 'give the folder of the study')

LAUNCH = Path(__file__).resolve().parent
# Flags that the commands of jobs do not inherit.
_OWN = ('submit', 'dry_run', 'slurm', 'job', 'retry_failed')


def main() -> None:
  flag = flags.FLAGS['config']
  sweep = grid.load_sweep(
    config_flags.get_config_filename(flag),
    config_flags.get_override_values(flag),
  )
  entries = grid.entries(_CONFIG.value, sweep)
  machine = lambda: here() if _local() else UNKNOWN
  if _DRY_RUN.value:
    return dry_run(entries, here(speed=True) if _local() else UNKNOWN)
  s = study.open_study(str(_WORKDIR.value), _CONFIG.value, entries)
  if _local():
    drive.drive(
      s, machine, LAUNCH, most=_POINTS.value, only=_JOB.value,
      retry=_RETRY.value, after=evaluation,
    )  # fmt: skip
    return tell(s)
  drive.plan(s, machine, _most())
  jobs = submit.missing(s, _RETRY.value, evaluation)
  given = inherited(sys.argv[1:])
  if _SUBMIT.value == 'print':
    for command in submit.commands(jobs, given):
      print(shlex.join(command))
  elif jobs:
    said = submit.to_slurm(s, jobs, given, _SLURM.value, LAUNCH.parent)
    logging.info('%s', said)
  if not jobs:
    tell(s)


def _local() -> bool:
  return _SUBMIT.value == 'here' or bool(_JOB.value)


def _most() -> int:
  return _POINTS.value if _local() else _POINTS.value or 8


def inherited(argv: list[str]) -> list[str]:
  """The flags without those that the commands of jobs do not have."""
  found, skip = [], False
  for argument in argv:
    if skip:
      skip = False
      continue
    name, equals, _ = argument.lstrip('-').partition('=')
    if not argument.startswith('-') or name.removeprefix('no') not in _OWN:
      found.append(argument)
      continue
    skip = not equals and name in ('submit', 'slurm', 'job')  # --slurm VALUE
  return found


def dry_run(entries: list[grid.Entry], machine: Machine) -> None:
  """Prints what would run, of the study that is there or of a new one."""
  s = study.Study(run_folder(str(_WORKDIR.value)), _CONFIG.value, entries)
  planned = {x.id for job in study.jobs(s) for x in job.specs}
  wanted = drive.wanted(s)
  new = [x for x in wanted if x.id not in planned]
  left = [drive.left(job, study.read_job(job.folder)) for job in study.jobs(s)]
  packs = [specs for specs in left if specs]
  packs += packing.pack(new, machine, _most()) if new else []
  waiting = [
    grid.ahead(s.base, entry, drive.results_of(s))
    for entry, found in drive.unplanned(s)
    if isinstance(found, list)
  ]
  print(
    estimate.text(packs, machine, waiting, len(planned) - sum(map(len, left)))
  )


def evaluation(runs: list[Path]) -> list[str]:
  """The program that evaluates run folders with the language model."""
  left = _lacking(runs)
  if not left:
    return []
  return [
    str(LAUNCH / 'evaluate.py'), f'--sequences={_SEQUENCES.value}',
    '--rows=8192', '--contexts=0', *(f'--workdir={run}' for run in left),
  ]  # fmt: skip


def _lacking(runs: list[Path]) -> list[Path]:
  count = _SEQUENCES.value
  return [r for r in runs if count and not tables.evaluated(r, count)]


def tell(s: study.Study) -> None:
  """What became of the points. Raises UserError when some failed."""
  failed = drive.failures(s, _JOB.value)
  for what, why in failed:
    logging.warning('failed: %s: %s', what, why)
  results = drive.results_of(s)
  done = sum(bool(results(e.id)) for e in study.entries(s))
  logging.info('%d of %d points are done: %s', done, len(s.entries), s.folder)
  runs: list[Path] = []
  for job in study.jobs(s):
    runs += run_job.runs_of(job, study.read_job(job.folder))
  if lacking := _lacking(runs):
    logging.warning(
      '%d of them have no delta loss on %d sequences: the reason is in log.txt '
      'of their jobs, the same command tries again', len(lacking),
      _SEQUENCES.value,
    )  # fmt: skip
  if failed:
    raise UserError(
      f'{len(failed)} points of {s.folder} failed, the first ({failed[0][0]}): '
      f'{failed[0][1]}: mend that and add --retry_failed'
    )


if __name__ == '__main__':
  cli.run(main)
