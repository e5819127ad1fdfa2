"""Jobs of a study elsewhere: a Slurm array, or one command each."""

import getpass
import json
import os
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from sae_jax.errors import UserError
from sae_jax.paths import write_atomic
from sae_jax.sweep import drive, run_job, study
from sae_jax.sweep.study import Job, Study


def missing(
  s: Study, retry: bool, after: Callable[[list[Path]], list[str]]
) -> list[Job]:
  """The jobs that nobody runs now and that have something left to do, with
  `retry` their failures too, which are forgotten; after: see `drive.drive`."""
  found = []
  for job in study.jobs(s):
    with study.claim(job.folder) as descriptor:
      if descriptor is None or drive.by_hand(job):
        continue
      record = study.read_job(job.folder)
      if retry and record['failed']:
        study.write_job(job.folder, drive.forgiven(record, drive.gone(s)))
      if not drive.ended(job) or after(run_job.runs_of(job, record)):
        found.append(job)
  return found


def commands(jobs: Sequence[Job], flags: Sequence[str]) -> list[list[str]]:
  """For each job the command that runs it; flags: those of this program."""
  program = [sys.executable, str(Path(sys.argv[0]).resolve())]
  return [[*program, *flags, f'--job={job.id}'] for job in jobs]


def to_slurm(
  s: Study,
  jobs: Sequence[Job],
  flags: Sequence[str],
  options: str,
  checkout: Path,
) -> str:
  """Submits an array with a task for each job; what to say of it.

  options: more of sbatch's. Jobs that a former array has in the queue are left
  to it. Raises UserError where there is no Slurm, or it refuses.
  """
  if not shutil.which('sbatch'):
    raise UserError(
      '--submit=slurm: there is no sbatch here: use --submit=print'
    )
  try:
    more = shlex.split(options)
  except ValueError as error:
    raise UserError(f'--slurm={options}: {error}') from None
  with study.claim(s.folder, wait=True):  # of two one looks at a time
    queued = _queued(s)
    jobs = [job for job in jobs if job.id not in queued]
    if not jobs:
      return f'{len(queued)} jobs are in the queue: nothing to submit'
    folder = s.folder / 'slurm'
    name = f'{int(time.time())}-{os.getpid()}'
    path, record = folder / f'{name}.txt', folder / f'{name}.json'
    here = shlex.quote(os.getcwd())
    lines = [
      f'cd {here} && exec {shlex.join(c)}\n' for c in commands(jobs, flags)
    ]
    write_atomic(path, ''.join(lines))
    # Before the array, which has its name: so a kill cannot hide it.
    write_atomic(record, json.dumps([job.id for job in jobs]) + '\n')
    done = subprocess.run(
      ['sbatch', '--parsable', f'--array=0-{len(jobs) - 1}', *more,
       f'--comment={name}', f'--output={folder}/%A_%a.out',
       str(checkout / 'launch' / 'slurm' / 'sweep.sbatch'), str(path)],
      capture_output=True, text=True, cwd=checkout,
    )  # fmt: skip
    if done.returncode:
      record.unlink()
      path.unlink()
      reason = ' '.join(done.stderr.split())
      raise UserError(f'--submit=slurm: sbatch refused: {reason}')
    number = done.stdout.strip().partition(';')[0]
    return f'array {number}: {len(jobs)} jobs submitted, output in {folder}'


def _queued(s: Study) -> set[str]:
  """Jobs of the study's arrays that are in Slurm's queue, running or not."""
  done = subprocess.run(
    ['squeue', '-h', '-r', '-u', getpass.getuser(), '-o', '%k %K'],
    capture_output=True, text=True,
  )  # fmt: skip
  if done.returncode:
    reason = ' '.join(done.stderr.split())
    raise UserError(f'--submit=slurm: squeue does not answer: {reason}')
  there = set(done.stdout.splitlines())
  found = set()
  for path in (s.folder / 'slurm').glob('*.json'):
    for i, id in enumerate(json.loads(path.read_text())):
      if f'{path.stem} {i}' in there:
        found.add(id)
  return found
