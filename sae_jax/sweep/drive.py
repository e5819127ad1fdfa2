"""Runs the jobs of a study on this machine, each in a process of its own.

Whatever is killed, the same command goes on: what is done is read off the
folders. A job that fails is tried once more point by point, each from its own
newest checkpoint: the points that fail by themselves are recorded with the
reason, the others end as if nothing had been.
"""

import contextlib
import functools
import hashlib
import os
import re
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from absl import logging

from sae_jax import locks
from sae_jax.errors import UserError
from sae_jax.sweep import grid, packing, run_job, study
from sae_jax.sweep.grid import Entry, Spec
from sae_jax.sweep.machine import Machine
from sae_jax.sweep.run_job import Running
from sae_jax.sweep.study import Job, Study
from sae_jax.train.run import LOCK
from sae_jax.train.stopping import stop_signals
from sae_jax.train.writer import read_metrics

_POLL_SECONDS = 10.0  # between looks at others' jobs
# What says which share of a machine a program has; programs with other shares
# of it do not wait for each other.
_SHARE = (
  'SLURM_JOB_ID', 'CUDA_VISIBLE_DEVICES', 'HIP_VISIBLE_DEVICES',
  'ROCR_VISIBLE_DEVICES', 'TPU_VISIBLE_CHIPS', 'TPU_VISIBLE_DEVICES',
)  # fmt: skip


def drive(
  s: Study,
  machine: Callable[[], Machine],
  programs: Path,
  *,
  most: int = 0,
  only: str = '',
  retry: bool = False,
  after: Callable[[list[Path]], list[str]] = lambda runs: [],
) -> None:
  """Runs what is missing until nothing is, or what other programs have.

  programs: folder of train.py. most: points a job at most, 0 for as many as
  fit. only: run this job and no other, whatever else runs on this machine.
  retry: failed points again. after: called with the run folders of a job's
  points when they are done; a program to run on them. Raises SystemExit (143,
  130, 129) when asked to stop, all saved; UserError in the end when this
  machine cannot train a job's points; with `only` these have failed.
  """
  machine = functools.cache(machine)
  retried: set[str] = gone(s) if retry else {'*'}
  seen: set[Path] = set()  # runs that `after` was called with here
  with stop_signals() as stop_asked:
    while True:
      if not only:
        plan(s, machine, most)
      busy, ran, large = [], False, []
      jobs = [j for j in study.jobs(s) if only in ('', j.id)]
      if only and not jobs:
        raise UserError(f'--job={only}: {s.folder} has no such job')
      for job in jobs:
        runs = run_job.runs_of(job, study.read_job(job.folder))
        if ended(job, retried) and (seen >= set(runs) or not after(runs)):
          continue
        with _claimed(s, job, not only) as descriptors:
          if not descriptors or by_hand(job):
            busy.append(job.id)
            continue
          record = forgiven(study.read_job(job.folder), retried)
          todo = left(job, record)  # planned elsewhere, perhaps
          wrong = {x.id: packing.misfit(x.config, machine()) for x in todo}
          if any(wrong.values()) and not only:  # others may fit
            large += todo
            continue
          # Whoever named the job meant this machine.
          record['failed'] |= {id: why for id, why in wrong.items() if why}
          ran = True
          run_job.run(
            Running(job, record, programs, descriptors, stop_asked, after)
          )
          record = study.read_job(job.folder)
          seen |= set(run_job.runs_of(job, record))
          if retry:  # what failed here is not tried again here
            retried |= set(record['failed'])
      if not ran and not busy:
        if large:
          packing.check_fit(large, machine())
        return
      if only and not busy:
        return
      if not ran:
        logging.info('waiting for other programs: %d jobs left', len(busy))
        _sleep(_POLL_SECONDS, stop_asked)


@contextlib.contextmanager
def _claimed(s: Study, job: Job, machine: bool) -> Iterator[list[int]]:
  """The locks of a job and, if asked for, of this machine, whose memory one
  job may fill; none while another program has one of them."""
  with contextlib.ExitStack() as stack:
    folders = [machine_folder(s)] * machine + [job.folder]
    claims = [stack.enter_context(study.claim(f)) for f in folders]
    held = [c for c in claims if c is not None]
    yield held if len(held) == len(folders) else []


def machine_folder(s: Study) -> Path:
  """Where the lock of this program's machine, or share of it, lies."""
  share = str([os.environ.get(name) for name in _SHARE])
  host = re.sub(r'[^\w.-]', '_', socket.gethostname())
  name = f'{host}-{hashlib.sha256(share.encode()).hexdigest()[:8]}'
  return s.folder / 'machines' / name


def by_hand(job: Job) -> bool:
  """Whether launch/train.py is at work on a job without a claim."""
  return locks.taken(job.folder / LOCK)


def forgiven(record: dict[str, Any], retried: set[str]) -> dict[str, Any]:
  """The record without the failures that are to be tried again, which are
  noted in `retried`."""
  again = [id for id in record['failed'] if _again(id, retried)]
  for id in again:
    retried.add(id)
    del record['failed'][id]
  if again:  # together, if all of them
    record['attempts'].append({'failed': False, 'reason': 'tried again'})
  return record


def gone(s: Study) -> set[str]:
  """Points in jobs that have left the grid: not to be tried again."""
  ids = study.grid_ids(study.read_study(s.folder))
  specs = [spec for job in study.jobs(s) for spec in job.specs]
  return {x.id for x in specs if x.stage == 'grid' and x.id not in ids}


def plan(s: Study, machine: Callable[[], Machine], most: int) -> None:
  """Puts points that are in no job yet into jobs; those that searches ask for
  when their trials have ended among them."""
  with study.claim(s.folder, wait=True):
    planned = {spec.id for job in study.jobs(s) for spec in job.specs}
    waiting, stands = {}, {}
    for entry, found in unplanned(s):
      if isinstance(found, Spec):
        if found.id in planned:
          stands[entry.id] = [found.id, found.k]
        continue
      state = ['missing', 'its trials have not ended']
      if isinstance(found, str):
        state = ['failed', found]
      point = grid.record_of(grid.begun(s.base, entry), s.base)
      waiting[entry.id] = point | {'state': state}
    study.note(s, waiting, stands)
    new = [x for x in wanted(s) if x.id not in planned]
    if new:
      study.add_jobs(s, packing.pack(new, machine(), most))


def wanted(s: Study) -> list[Spec]:
  """The points and trials that can be run by now, each once. Those that are
  in a job are as they were put there."""
  ids = {e.id for e in study.entries(s)}
  found = [x for job in study.jobs(s) for x in job.specs if x.id in ids]
  for _, one in unplanned(s):
    if not isinstance(one, str):
      found += [one] if isinstance(one, Spec) else one
  # A point of the grid may be a trial of another.
  found.sort(key=lambda spec: spec.stage == 'grid')
  return list({spec.id: spec for spec in found}.values())


def unplanned(s: Study) -> list[tuple[Entry, Spec | list[Spec] | str]]:
  """The points that are in no job, and what `grid.resolve` says of them. Where
  a trial is the same run it stands for the point, which has its id."""
  planned = {spec.id: spec for job in study.jobs(s) for spec in job.specs}
  free = {id for id, spec in planned.items() if spec.stage == 'trial'}
  results, found = results_of(s), []
  for entry in study.entries(s):
    if entry.id in planned:
      continue
    what = grid.resolve(s.base, entry, results)
    if isinstance(what, Spec) and (id := grid.id_of(what.config)) in free:
      free.remove(id)  # of two such points the other is trained
      what = what._replace(id=id)
    found.append((entry, what))
  return found


def results_of(s: Study) -> grid.Results:
  """The last evaluation of a point that is done, {} of one that failed."""
  where = {spec.id: (job, spec) for job in study.jobs(s) for spec in job.specs}

  def results(id: str):
    if id not in where:
      return None
    job, spec = where[id]
    record = study.read_job(job.folder)
    if id in record['failed']:
      return {}
    done = id in record['done']
    if study.state(job.run(spec), spec.config, done) != 'done':
      return None
    last = [m for m in read_metrics(job.run(spec)) if 'eval/fvu' in m][-1]
    return {k.removeprefix('eval/'): v for k, v in last.items()}

  return results


def ended(job: Job, retried: set[str] = {'*'}) -> bool:  # noqa: B006
  """Whether there is nothing left to do: all points are whole, or failed."""
  record = study.read_job(job.folder)
  for spec in job.specs:
    if spec.id in record['failed']:
      if _again(spec.id, retried):
        return False
    elif spec.id not in record['done']:
      return False
    elif study.state(job.run(spec), spec.config, True) != 'done':
      return False
  return True


def left(job: Job, record: dict[str, Any]) -> list[Spec]:
  """The points of a job that are neither whole nor have failed."""
  state = lambda x: study.state(job.run(x), x.config, x.id in record['done'])
  return [
    x for x in job.specs if x.id not in record['failed'] and state(x) != 'done'
  ]


def _again(id: str, retried: set[str]) -> bool:
  return not retried & {'*', id}


def _sleep(seconds: float, stop_asked: Callable[[], int]) -> None:
  until = time.monotonic() + seconds
  while time.monotonic() < until:
    if stop_asked():
      raise SystemExit(128 + stop_asked())
    time.sleep(0.2)


def failures(s: Study, only: str = '') -> list[tuple[str, str]]:
  """(point in words, reason) of the points of the grid that failed, those
  among them that no search found a value for; of one job, if `only` names it.
  A trial that failed is its search's business."""
  # A grid may lose points.
  found, wanted = [], {e.id for e in study.entries(s)}
  for job in study.jobs(s):
    failed = study.read_job(job.folder)['failed']
    found += [
      (grid.in_words(spec.changes), failed[spec.id])
      for spec in job.specs
      if spec.id in failed and spec.id in wanted and only in ('', job.id)
    ]
  if not only:
    found += [(grid.in_words(e.changes), why) for e, why in unfound(s)]
  return found


def unfound(s: Study) -> list[tuple[Entry, str]]:
  """Points that no search found a value for, and why."""
  return [(e, why) for e, why in unplanned(s) if isinstance(why, str)]
