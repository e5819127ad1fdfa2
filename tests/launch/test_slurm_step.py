"""launch/slurm/step.sh with stand-ins for Slurm's commands, one of which may
fail: what a restart of slurmctld in the wrong moment leads to."""

import os
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

# Two tasks, one after the other; the highest code counts.
SRUN = """#!/bin/bash
"$@"
a=$?
SLURM_PROCID=1 "$@"
b=$?
exit $((a > b ? a : b))
"""
# $FAKE/answers: a line for each call, with the code and what is printed.
SCONTROL = """#!/bin/bash
echo "$1" >> "$FAKE/calls"
read -r code answer < "$FAKE/answers" || exit 1
sed -i 1d "$FAKE/answers"
echo "$answer"
exit $code
"""
SLEEP = """#!/bin/bash
echo sleep >> "$FAKE/calls"
"""
AWAY = '1'
RUNS = '0 JobId=7 JobState=RUNNING Requeue=1 Restarts=0'
DONE = '0'


def step(folder, command, *answers, seconds=150):
  """The finished step.sh, and the calls of scontrol and sleep."""
  for name, text in (('srun', SRUN), ('scontrol', SCONTROL), ('sleep', SLEEP)):
    (folder / name).write_text(text)
    (folder / name).chmod(0o755)
  (folder / 'answers').write_text(''.join(f'{line}\n' for line in answers))
  (folder / 'calls').touch()
  env = {k: v for k, v in os.environ.items() if not k.startswith('SLURM')}
  done = subprocess.run(
    ['bash', 'launch/slurm/step.sh', 'bash', '-c', command],
    cwd=ROOT,
    env=env
    | {
      'PATH': f'{folder}:{os.environ["PATH"]}', 'FAKE': str(folder),
      'SLURM_JOB_ID': '7', 'SLURM_PROCID': '0',
      'SAE_SLURMCTLD_SECONDS': str(seconds),
    },
    capture_output=True,
    text=True,
    timeout=60,
  )  # fmt: skip
  return done, (folder / 'calls').read_text().split()


@pytest.mark.parametrize(
  'codes, wanted',
  [('0 0', 0), ('1 75', 1), ('134 1', 1), ('1 2', 2), ('75 2', 2)],
)
def test_ends_for_good(tmp_path, codes, wanted):
  done, calls = step(tmp_path, f'c=({codes}); exit ${{c[SLURM_PROCID]}}')
  assert (done.returncode, calls) == (wanted, [])


ASKS = 'show sleep '


@pytest.mark.parametrize(
  'answers, calls, said',
  [
    ([RUNS, DONE], 'show requeue', 'back into the queue (restart 1)'),
    # slurmctld is away for a while, or answers without the job.
    ([AWAY, DONE, RUNS, DONE], 2 * ASKS + 'show requeue', 'back into'),
    ([RUNS, AWAY, AWAY, RUNS, DONE],
     'show requeue sleep ' + ASKS + 'show requeue', 'back into'),
    # It has done what was asked; the answer was lost.
    ([RUNS, AWAY, RUNS.replace('RUNNING', 'PENDING')],
     'show requeue sleep show', 'PENDING: left as it is'),
    ([AWAY, RUNS.replace('RUNNING', 'CANCELLED')],
     ASKS + 'show', 'CANCELLED: left as it is'),
    ([RUNS.replace('Requeue=1', 'Requeue=0')], 'show', 'submit it again'),
  ],
)  # fmt: skip
def test_goes_on_when_slurmctld_is_away(tmp_path, answers, calls, said):
  done, found = step(tmp_path, 'exit 75', *answers)
  assert done.returncode == 75
  assert found == calls.split()
  assert said in done.stdout + done.stderr


def test_gives_up_when_slurmctld_stays_away(tmp_path):
  done, calls = step(tmp_path, 'exit 75', seconds=1)
  assert done.returncode == 75
  assert len(calls) > 2 and set(calls) == {'show', 'sleep'}
  assert 'no answer from slurmctld: submit it again' in done.stderr


@pytest.mark.parametrize('given', ['', 'glibc.malloc.check=1'])
def test_tasks_get_huge_pages_unless_told_otherwise(
  tmp_path, monkeypatch, given
):
  monkeypatch.delenv('GLIBC_TUNABLES', raising=False)
  if given:
    monkeypatch.setenv('GLIBC_TUNABLES', given)
  done, _ = step(tmp_path, 'echo "has $GLIBC_TUNABLES"')
  assert f'has {given or "glibc.malloc.hugetlb=1"}\n' in done.stdout
