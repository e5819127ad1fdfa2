"""Jobs of a study elsewhere: a Slurm array, or one command each."""

import getpass
import json
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from sae_jax.errors import UserError
from sae_jax.paths import write_atomic
from sae_jax.sweep import drive, study
from sae_jax.sweep.study import Job, Study


def missing(s: Study, retry: bool) -> list[Job]:
  """The jobs that nobody runs now and that have something left to do."""
  found = []
  for job in study.jobs(s):
    if drive.ended(job, set() if retry else {'*'}):
      continue
    with study.claim(job.folder) as descriptor:
      if descriptor is not None:
        found.append(job)
  return found


def commands(jobs: Sequence[Job], flags: Sequence[str]) -> list[list[str]]:
  """For each job the command that runs it; flags: those of this program."""
  program = [sys.executable, str(Path(sys.argv[0]).resolve())]
  return [[*program, *flags, f'--job={job.id}'] for job in jobs]


def in_shell(command: Sequence[str]) -> str:
  return shlex.join(command)


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
  queued = _queued(s)
  jobs = [job for job in jobs if job.id not in queued]
  if not jobs:
    return f'{len(queued)} jobs are in the queue: nothing to submit'
  folder = s.folder / 'slurm'
  name = f'{int(time.time())}-{len(list(folder.glob("*.txt")))}'
  path = folder / f'{name}.txt'
  lines = [in_shell(c) + '\n' for c in commands(jobs, flags)]
  write_atomic(path, ''.join(lines))
  done = subprocess.run(
    ['sbatch', '--parsable', f'--array=0-{len(jobs) - 1}',
     f'--output={folder}/%A_%a.out', *shlex.split(options),
     str(checkout / 'launch' / 'slurm' / 'sweep.sbatch'), str(path)],
    capture_output=True, text=True, cwd=checkout,
  )  # fmt: skip
  if done.returncode:
    path.unlink()
    reason = ' '.join(done.stderr.split())
    raise UserError(f'--submit=slurm: sbatch refused: {reason}')
  number = done.stdout.strip().partition(';')[0]
  record = {'array': number, 'jobs': [job.id for job in jobs]}
  write_atomic(folder / f'{name}.json', json.dumps(record) + '\n')
  return f'array {number}: {len(jobs)} jobs submitted, output in {folder}'


def _queued(s: Study) -> set[str]:
  """Jobs of the study's arrays that are in Slurm's queue, running or not."""
  done = subprocess.run(
    ['squeue', '-h', '-r', '-u', getpass.getuser(), '-o', '%F %K'],
    capture_output=True, text=True,
  )  # fmt: skip
  if done.returncode:
    reason = ' '.join(done.stderr.split())
    raise UserError(f'--submit=slurm: squeue does not answer: {reason}')
  there = set(done.stdout.splitlines())
  found = set()
  for path in (s.folder / 'slurm').glob('*.json'):
    record = json.loads(path.read_text())
    for i, id in enumerate(record['jobs']):
      if f'{record["array"]} {i}' in there:
        found.add(id)
  return found
