"""A study's folder: which points, in which jobs, how far each is.

  study.json                  the base config, the grid, the store; which points
                              wait for trials, and for which a trial stands
  jobs/<job>/job.json         its points; of each that failed the reason
  jobs/<job>/members/<point>/ the run folder of a point
  jobs/<job>/log.txt          what its processes printed
  machines/<host>-<hash>/     the lock of a machine, or of a share of one

Points are put into jobs once and stay there. All else is read off the run
folders, so that a job may as well be run by hand. Any number of programs may
work on a study: whoever holds a job's lock runs it.
"""

import contextlib
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from sae_jax import locks
from sae_jax.config import Config
from sae_jax.errors import UserError
from sae_jax.paths import write_atomic
from sae_jax.store.manifest import read_manifest, store_fingerprint
from sae_jax.sweep import grid, packing
from sae_jax.sweep.grid import Entry, Spec
from sae_jax.train import checkpoints
from sae_jax.train.config import base_config, plain_members
from sae_jax.train.integrity import Damaged
from sae_jax.train.run import (
  changed_keys,
  read_config,
  run_folder,
  take_lock,
  write_config,
)
from sae_jax.train.state import steps_of
from sae_jax.train.writer import read_metrics

FORMAT, VERSION = 'sae_jax.study', 1


class Job(NamedTuple):
  """Points that are trained together."""

  id: str
  folder: Path
  specs: list[Spec]

  def run(self, spec: Spec) -> Path:
    """The run folder of one of its points."""
    return self.folder / 'members' / spec.id


class Study(NamedTuple):
  """A study as its folder has it; `open_study` makes one."""

  folder: Path
  base: Config
  entries: list[Entry]


def open_study(folder: str, base: Config, entries: list[Entry]) -> Study:
  """Makes the folder, or finds the same study there; more points may have come
  to its grid. Raises UserError for the folder of another sweep."""
  root = run_folder(folder)
  path, ids = root / 'study.json', [e.id for e in entries]
  manifest = read_manifest(base.store.path, complete=False)
  record = {
    'format': FORMAT,
    'version': VERSION,
    'config': base.to_dict(),
    'grid': {e.id: grid.in_words(e.changes) for e in entries},
    'store': store_fingerprint(manifest, base.store.site),
    'waiting': {},
    'stands': {},
  }
  study = Study(root, base, entries)
  with claim(root, wait=True):  # of those that plan one at a time
    if path.exists():
      old = read_study(root)
      trained = {
        spec.id
        for job in jobs(study)
        for spec in job.specs
        if spec.id not in read_job(job.folder)['failed']
      }
      gone = [
        words
        for id, words in old['grid'].items()
        if id not in ids and old['stands'].get(id, [id])[0] in trained
      ]
      if gone:
        keys = changed_keys(base_of(old).to_dict(), record['config'])
        raise UserError(
          f'--workdir={folder} holds the study of another sweep: '
          + (f'config.{next(iter(keys))} differs, ' if keys else '')
          + f'{len(gone)} of its points are not in this one ({gone[0]}): take '
          'another folder'
        )
      if old['store'] != record['store']:
        raise UserError(
          f'--workdir={folder} holds a study of another store than that in '
          f'{base.store.path}: give the old one, or take another folder'
        )
      for name in ('waiting', 'stands'):
        record[name] = {k: v for k, v in old[name].items() if k in ids}
    elif any(p.stem != 'claim' and p.suffix != '.tmp' for p in root.iterdir()):
      raise UserError(
        f'--workdir={folder} is not empty and holds no study: take another '
        'folder'
      )
    write_atomic(path, json.dumps(record, indent=2) + '\n')
  return study


def read_study(root: Path) -> dict[str, Any]:
  """study.json. Raises UserError when there is none, or another thing."""
  path = root / 'study.json'
  try:
    record = json.loads(path.read_text())
  except FileNotFoundError:
    raise UserError(
      f'{path} does not exist: give the --workdir of launch/sweep.py'
    ) from None
  except ValueError as error:
    raise UserError(f'{path} is not JSON ({error}): restore it') from None
  if record.get('format') != FORMAT or record.get('version') != VERSION:
    raise UserError(f'{path} is no {FORMAT} of version {VERSION}')
  return {'waiting': {}, 'stands': {}} | record


def base_of(record: dict[str, Any]) -> Config:
  """The config in study.json; keys younger than it have their defaults."""
  base = base_config()
  base.update(record['config'])
  return base


def note(
  study: Study, waiting: dict[str, Any], stands: dict[str, list]
) -> None:
  """Records the points that are in no job, by id, each a `grid.record_of` with
  its 'state' and the reason, and those that a trial stands for: [the trial's
  id, the point's k]. Call under the study's lock."""
  record = read_study(study.folder)
  new = record | {'waiting': waiting, 'stands': record['stands'] | stands}
  if new != record:
    text = json.dumps(new, indent=2) + '\n'
    write_atomic(study.folder / 'study.json', text)


def entries(study: Study) -> list[Entry]:
  """Its points; one that a run of another id stands for has that id."""
  there = (study.folder / 'study.json').exists()
  stands = read_study(study.folder)['stands'] if there else {}
  return [e._replace(id=stands.get(e.id, [e.id])[0]) for e in study.entries]


def grid_ids(record: dict[str, Any]) -> set[str]:
  """Of study.json: what stands for the points of its grid."""
  return {record['stands'].get(id, [id])[0] for id in record['grid']}


@contextlib.contextmanager
def claim(folder: Path, wait: bool = False) -> Iterator[int | None]:
  """The lock of a job (or study) as a file descriptor, None while another has
  it. Whatever process inherits the descriptor has the lock too."""
  try:
    descriptor = take_lock(folder, 'claim', wait)
  except BlockingIOError:
    descriptor = None
  try:
    yield descriptor
  finally:
    if descriptor is not None:
      locks.release(descriptor)


def is_taken(folder: Path) -> bool:
  """Whether somebody works on a job; writes nothing."""
  return locks.taken(folder / 'claim')


def jobs(study: Study) -> list[Job]:
  """Those that were planned, in their order."""
  found = []
  paths = list((study.folder / 'jobs').glob('*/job.json'))
  if not paths:
    return []
  manifest = read_study(study.folder)
  # A point of the grid may have been planned as a trial of another.
  wanted, k = grid_ids(manifest), dict(manifest['stands'].values())
  for path in paths:
    record = read_job(path.parent)
    specs = [grid.read_spec(r, study.base) for r in record['points']]
    specs = [s._replace(k=k[s.id]) if s.id in k else s for s in specs]
    specs = [s._replace(stage='grid') if s.id in wanted else s for s in specs]
    found.append((record['order'], Job(path.parent.name, path.parent, specs)))
  return [job for _, job in sorted(found, key=lambda x: (x[0], x[1].id))]


def add_jobs(study: Study, packs: Iterable[list[Spec]]) -> None:
  """Plans a job for each list of points. Call under the study's lock."""
  order = 1 + max((read_job(j.folder)['order'] for j in jobs(study)), default=0)
  for i, specs in enumerate(packs):
    folder = study.folder / 'jobs' / specs[0].id
    # With that it can be run by hand, too.
    write_config(folder, plain_members(packing.job_config(specs)))
    write_job(folder, {
      'format': FORMAT + '.job',
      'version': VERSION,
      'order': order + i,
      'points': [grid.record_of(s, study.base) for s in specs],
      'done': [],  # points that were seen to be whole
      'failed': {},  # point: reason
      'alone': {},  # points trained by themselves: from which step on
      'attempts': [],
    })  # fmt: skip


def read_job(folder: Path) -> dict[str, Any]:
  """job.json. Raises UserError when it is not whole."""
  path = folder / 'job.json'
  try:
    record = json.loads(path.read_text())
  except ValueError:
    record = None
  keys = {'order', 'points', 'done', 'failed', 'alone', 'attempts'}
  if not isinstance(record, dict) or not keys <= record.keys():
    raise UserError(
      f'{path} is not what was written: remove {folder}, its points are '
      'trained again'
    )
  return record


def write_job(folder: Path, record: dict[str, Any]) -> None:
  """Replaces job.json. Call under the job's lock, if it may be running."""
  write_atomic(folder / 'job.json', json.dumps(record, indent=2) + '\n')


def state(run: Path, config: Config, seen_whole: bool = False) -> str:
  """'done', 'open', or what is wrong with a run folder.

  seen_whole: it has been done, and must be still.
  """
  last = steps_of(config.train.rows, config.train.batch_rows)
  if not run.exists():
    return 'its folder is gone' if seen_whole else 'open'
  steps = checkpoints.kept_steps(run)
  try:
    if (run / 'config.json').exists() or steps:
      keys = changed_keys(read_config(run).to_dict(), config.to_dict())
      if keys:
        return f'its config.json has another {next(iter(keys))}'
    whole, fault = [], ''
    for step in steps:
      try:
        checkpoints.read_meta(run, step)
        whole.append(step)
      except Damaged as error:  # training goes on from another one
        fault = f'{type(error).__name__}: {error}'
    if fault and not whole:
      return fault
    evaluated = [m['step'] for m in read_metrics(run) if 'eval/fvu' in m]
  except (
    UserError, ValueError, TypeError, AttributeError, KeyError,
  ) as error:  # fmt: skip  # what a file of other bytes may lead to
    return ' '.join(f'{type(error).__name__}: {error}'.split())
  if last not in whole:
    gone = seen_whole and not whole
    return 'its last checkpoint is gone' if gone else 'open'
  if last not in evaluated:
    return 'its last evaluation is gone'
  return 'done'


def put_aside(run: Path) -> Path:
  """Renames a run folder that is not to be used; its new place."""
  n = 1
  while (place := run.with_name(f'{run.name}.corrupt-{n}')).exists():
    n += 1
  run.rename(place)
  return place
