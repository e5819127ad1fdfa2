"""One job of a study, run to its end by a program that holds its lock."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from absl import logging

from sae_jax.config import Config
from sae_jax.sweep import grid, packing, study
from sae_jax.sweep.grid import Spec
from sae_jax.sweep.study import Job
from sae_jax.train import checkpoints
from sae_jax.train.config import plain_members
from sae_jax.train.run import write_config

_POLL_SECONDS = 0.5
_STARTS = 3  # of a process that is killed, in one run of the program


class Running(NamedTuple):
  """A job, and what is needed to run it."""

  job: Job
  record: dict[str, Any]  # its job.json
  programs: Path  # folder of train.py
  descriptors: Sequence[int]  # of its lock and the machine's
  stop_asked: Callable[[], int]
  # The program that evaluates the points in these folders; [] for none.
  after: Callable[[list[Path]], list[str]]


def run(r: Running) -> None:
  """Trains what is left of the job, together what can be, then one by one.

  Raises SystemExit when asked to stop, once all is saved.
  """
  left, began = _left(r), time.monotonic()
  if left:
    logging.info('job %s: %d points', r.job.id, len(left))
  group = _together(r, left)
  if len(group) > 1:
    for spec in group:  # its time is the group's, whatever was tried before
      r.record['alone'].pop(spec.id, None)
    config = packing.job_config(group)
    code, reason = _train(r, config, r.job.folder)
    if code:
      logging.warning('job %s failed (%s): point by point', r.job.id, reason)
    left = _left(r)
  for spec in left:
    saved = checkpoints.kept_steps(r.job.run(spec))
    r.record['alone'].setdefault(spec.id, saved[-1] if saved else 0)
    code, reason = _train(r, spec.config, r.job.run(spec))
    if code:
      _fail(r, spec, reason)
  for spec in _left(r):  # it ended well, and left something else
    _fail(r, spec, 'its training ended, but is not whole')
  study.write_job(r.job.folder, r.record)
  done = [s for s in r.job.specs if s.id in r.record['done']]
  logging.info(
    'job %s: %d of %d points are done, %.0f s', r.job.id, len(done),
    len(r.job.specs), time.monotonic() - began,
  )  # fmt: skip
  command = r.after(runs_of(r.job, r.record))
  if command:
    code, reason = _start(r, command)
    if r.stop_asked():
      raise SystemExit(128 + r.stop_asked())
    if code:
      logging.warning('job %s: not evaluated: %s', r.job.id, reason)


def runs_of(job: Job, record: dict[str, Any]) -> list[Path]:
  """The run folders of its points of the grid that are done."""
  grid = [s for s in job.specs if s.stage == 'grid']
  return [job.run(s) for s in grid if s.id in record['done']]


def _fail(r: Running, spec: Spec, reason: str) -> None:
  r.record['failed'][spec.id] = reason
  what = grid.in_words(spec.changes)
  logging.warning('point %s (%s) failed: %s', spec.id, what, reason)


def _left(r: Running) -> list[Spec]:
  """The points to train; those that are whole are noted, those that are
  corrupt put aside."""
  left = []
  for spec in r.job.specs:
    if spec.id in r.record['failed']:
      continue
    folder, done = r.job.run(spec), spec.id in r.record['done']
    found = study.state(folder, spec.config, done)
    if found == 'done':
      if not done:
        r.record['done'].append(spec.id)
      continue
    left.append(spec)
    if done:
      r.record['done'].remove(spec.id)
    if done and found == 'open':
      logging.warning(
        'point %s (%s): its last checkpoint is damaged or gone: goes on from '
        'the one before', spec.id, grid.in_words(spec.changes),
      )  # fmt: skip
    if found != 'open':
      place = study.put_aside(folder).name if folder.exists() else 'nothing'
      logging.warning(
        'point %s (%s) is corrupt, %s: kept as %s, trained again', spec.id,
        grid.in_words(spec.changes), found, place,
      )  # fmt: skip
  return left


def _together(r: Running, left: list[Spec]) -> list[Spec]:
  """Those to train in one process, which goes on from the newest checkpoint
  that all have; not one that begins anew where others need not."""
  if not left or _failed_together(r):
    return []
  saved = {spec.id: checkpoints.kept_steps(r.job.run(spec)) for spec in left}
  begun = [spec for spec in left if saved[spec.id]]
  if len(begun) < len(left) and max(map(len, saved.values())) < 2:
    return left  # killed in the first round of saves, or before
  common = set.intersection(*(set(saved[spec.id]) for spec in begun))
  if common and len(begun) > 1:
    return begun
  return [spec for spec in left if not saved[spec.id]]


def _failed_together(r: Running) -> bool:
  """Whether points did, since failures were last asked to be tried again."""
  for attempt in reversed(r.record['attempts']):
    if attempt.get('points') != 1:
      return attempt['failed']
  return False


def _train(r: Running, config: Config, folder: Path) -> tuple[int, str]:
  """(exit code, reason) in the end; killed processes are started again."""
  study.write_job(r.job.folder, r.record)
  write_config(folder, plain_members(config))
  command = [
    str(r.programs / 'train.py'), f'--workdir={folder}',
    f'--config={r.programs.parent}/configs/run.py:{folder}',
  ]  # fmt: skip
  for start in range(_STARTS):
    began = time.time()
    code, reason = _start(r, command)
    if r.stop_asked():
      study.write_job(r.job.folder, r.record)
      logging.info('stopped: what was running has saved: %s', r.job.folder)
      raise SystemExit(128 + r.stop_asked())
    over = 0 <= code <= 2 or start == _STARTS - 1
    r.record['attempts'].append({
      'points': len(config.members) or 1, 'began': round(began),
      'seconds': round(time.time() - began, 1), 'code': code,
      'reason': reason, 'failed': bool(code) and over,
    })  # fmt: skip
    study.write_job(r.job.folder, r.record)
    if over:
      return code, reason
    logging.warning(
      'job %s: %s: started again where it saved', r.job.id, reason
    )
  raise AssertionError('unreachable')


def _start(r: Running, command: list[str]) -> tuple[int, str]:
  """Runs a Python program to its end, and passes signals on to it.

  It has the locks too: when this process is killed the job and the machine stay
  taken until the program has ended.
  """
  # Large arrays in huge pages, as in launch/slurm/step.sh.
  huge = {'GLIBC_TUNABLES': 'glibc.malloc.hugetlb=1'}
  log, told = r.job.folder / 'log.txt', False
  with open(log, 'ab') as out:
    at = out.tell()
    child = subprocess.Popen(
      [sys.executable, *command], stdout=out, stderr=subprocess.STDOUT,
      stdin=subprocess.DEVNULL, env=huge | os.environ,
      start_new_session=True, pass_fds=r.descriptors,
    )  # fmt: skip
    while child.poll() is None:
      if (number := r.stop_asked()) and not told:
        child.send_signal(number)
        told = True
      try:
        child.wait(_POLL_SECONDS)
      except subprocess.TimeoutExpired:
        continue
  return child.returncode, _reason(child.returncode, log, at)


def _reason(code: int, log: Path, at: int) -> str:
  """In one line, why a program ended with this code."""
  if not code:
    return ''
  if code < 0:
    name = signal.Signals(-code).name
    more = ', out of memory?' if -code == signal.SIGKILL else ''
    return f'killed by {name}{more}'
  with open(log, 'rb') as file:
    file.seek(at)
    text = file.read().decode(errors='replace')
  lines = [line for line in text.replace('\r', '\n').splitlines() if line]
  mistakes = [line for line in lines if line.startswith('error: ')]
  if mistakes:
    return mistakes[-1].removeprefix('error: ')
  return f'exit code {code}: {(lines or ["no message"])[-1]}'
