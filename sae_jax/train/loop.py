"""The training loop, read from top to bottom.

Order matters: evaluate and save the state before the next batch is pulled;
read a step's metrics only after the next one is under way. All processes of a
job run it together, and whatever steers it is the same in all of them.
"""

import contextlib
import functools
import math
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import logging
from jax.sharding import Mesh

from sae_jax.config import Config
from sae_jax.errors import UserError
from sae_jax.parallel import processes
from sae_jax.parallel.mesh import make_mesh
from sae_jax.store import reader
from sae_jax.store.batches import BatchSource, train_batches
from sae_jax.store.manifest import store_fingerprint
from sae_jax.train import growing, rounds, skipping
from sae_jax.train.checkpoints import Checkpoints
from sae_jax.train.config import plain_members, validate
from sae_jax.train.keys import flatten
from sae_jax.train.members import Job, States, initial, make_job, members_of
from sae_jax.train.progress import Progress
from sae_jax.train.rows import (
  Ahead,
  held_out_rows,
  next_batch,
  open_source,
  warn_of_norms,
  warn_of_size,
)
from sae_jax.train.run import (
  check_restored,
  check_run,
  lock,
  run_folder,
  write_config,
)
from sae_jax.train.state import steps_of
from sae_jax.train.step import make_step
from sae_jax.train.stopping import stop_signals


def train(config: Config, run_dir: str) -> States:
  """Trains one SAE as `config` says and leaves it in the run folder.

  With config.members that many, each in a run folder of its own within it.
  Continues from the newest checkpoint of the folder, if there is one. All
  processes of a job call this. Raises UserError for what the user can mend (a
  loss that is not finite among it), SystemExit after SIGTERM (143), Ctrl-C
  (130) or SIGHUP (129), when all is saved; ends the process with exit code 75
  when another one of its job died.
  """
  validate(config)
  config = plain_members(config)
  if not processes.is_first():
    logging.set_verbosity(logging.WARNING)
  processes.check_same(_must_agree(config, run_dir))
  folder, source, mesh = processes.agreed(lambda: _open(config, run_dir))
  # Of a store that is still being written held-out and normaliser shards must
  # be there; whatever can be refused without them has been.
  reader.await_shards(source.root, range(source.manifest.pinned_shards))
  warn_of_size(config, source)
  processes.agreed(lambda: warn_of_norms(source))
  with jax.set_mesh(mesh):
    held_out = processes.agreed(lambda: held_out_rows(config, source))
  with (
    jax.set_mesh(mesh),
    _locked(_runs(config, folder)),
    stop_signals() as stop_asked,  # in force until the last save is written
  ):
    stretch = None
    while True:
      try:
        states, step = _run(
          config, folder, source, held_out, stop_asked, stretch
        )
        break
      except skipping.BadStretch as found:
        # Its traceback holds _run's frame: the whole state, a second time.
        stretch = found.with_traceback(None)
        for member in members_of(config, folder):
          forget = functools.partial(
            skipping.forget, member.folder, found.began
          )
          processes.agreed(forget)
        source = _open(config, run_dir)[1]
  rows = step * config.train.batch_rows
  if step < steps_of(config.train.rows, config.train.batch_rows):
    logging.info('stopped: saved at step %d (%d rows): %s', step, rows, folder)
    sys.exit(128 + stop_asked())
  logging.info('trained on %d rows: %s', rows, folder)
  return states


def _run(
  config: Config,
  folder: Path,
  source: BatchSource,
  held_out: jax.Array | None,
  stop_asked: Callable[[], int],
  stretch: skipping.BadStretch | None,
) -> tuple[States, int]:
  """(states, step) at the end or where a stop was asked for, when it is saved.

  stretch: data to leave out on the way. Raises BadStretch for one that it
  finds; called again with it, it goes on behind it.
  """
  c = config.train
  last = steps_of(c.rows, c.batch_rows)
  every = lambda rows: max(rows // c.batch_rows, 1) if rows else 0
  fingerprint = store_fingerprint(source.manifest, source.site.name)
  job = make_job(config, folder, make_step)
  runs = [m.folder for m in job.members]
  with (
    rounds.opened(job.members, c.keep, every(c.keep_rows)) as checkpoints,
    processes.dies_with_its_job(),
  ):
    states, start, records = restore_or_init(
      config, source, checkpoints, fingerprint, job
    )
    position = records[0].get('position', 0)
    if start > last:
      raise UserError(
        f'--workdir={folder} is at {start * c.batch_rows} rows already: give '
        f'--config.train.rows={start * c.batch_rows} or more'
      )
    skips = [
      skipping.restored(
        record, start, c.max_skipped, f'member {m.name}: ' if m.name else ''
      )
      for m, record in zip(job.members, records, strict=True)
    ]
    if stretch:
      position = skipping.jump(skips, position, stretch)
    jumped = position - start * c.batch_rows
    claim, missing = growing.open_claim(config, source, folder, runs, jumped)
    processes.agreed(claim.tell)
    if processes.is_first():
      for run, its in _runs(config, folder).items():
        write_config(run, its)
    progress = Progress(config, job.members, start, skips)
    progress.also = [one.timings for one in checkpoints]
    read = skipping.readable(source, c.on_bad_block)
    batches = Ahead(train_batches(read, position_rows=position), source)
    pending = None
    with (
      contextlib.closing(progress),
      _closed(batches, source),
      jax.transfer_guard('disallow'),  # every transfer is an explicit one
    ):
      for step in range(start, last + 1):
        over = step == last or stop_asked()
        # Ahead of the harvest: a save lets it remove what was read.
        batch = position // c.batch_rows
        ahead = not over and missing(batch) is not None
        due = step > start and step % every(c.save_rows) == 0
        save = over or due or (ahead and step > start)
        if pending and save:  # nothing that is not finite is ever saved
          _read(progress, job, *pending)
          pending = None
        look = c.eval_rows and (step > start or not start)
        look = look and (step == last or step % every(c.eval_rows) == 0)
        if held_out is not None and (look or save):
          states = job.settle(states, held_out)
          if look:
            progress.write(step, _evaluate(job, states, held_out))
        # Going back must lead behind what is being skipped.
        save = save and (over or ahead or not any(s.in_a_row for s in skips))
        if save and step != checkpoints[0].latest():
          records = [
            dict(
              position=position, config=m.config.to_dict(), store=fingerprint
            )
            | its.record()
            for m, its in zip(job.members, skips, strict=True)
          ]
          rounds.save(checkpoints, step, job, states, records)
          claim.tell()
        if ahead:
          growing.await_batch(source, missing, batch, claim, stop_asked)
          over = missing(batch) is not None  # asked to stop: all is saved
        if over:
          break
        x = next_batch(batches, progress)
        position += c.batch_rows
        states, metrics = job.step(states, x)
        if pending:
          _read(progress, job, *pending)
        pending = (step + 1, metrics, position)
  if step < last:
    claim.tell()
  else:
    claim.done()
  return states, step


def _open(config: Config, run_dir: str) -> tuple[Path, BatchSource, Mesh]:
  """The run's folder, its data and its devices, which fit together."""
  folder = run_folder(run_dir)
  if processes.is_first():
    for run, its in _runs(config, folder).items():
      check_run(run, its)
  if not processes.several():  # the store first: devices may take seconds
    source = open_source(config)
    return folder, source, _mesh(config)
  mesh = _mesh(config)
  if mesh.size != jax.device_count():
    raise UserError(
      f'config.mesh: {" x ".join(map(str, mesh.devices.shape))} devices are '
      f'not the {jax.device_count()} of {jax.process_count()} processes: '
      'change config.mesh.data or config.mesh.dict'
    )
  return folder, open_source(config, *processes.data_parts(mesh)), mesh


def _mesh(config: Config) -> Mesh:
  c = config.mesh
  return make_mesh(c.data, c.dict, member=c.member)


def _runs(config: Config, folder: Path) -> dict[Path, Config]:
  """The config of each folder of a job: its own, and its members'."""
  members = {m.folder: m.config for m in members_of(config, folder)}
  return {folder: config} | members


@contextlib.contextmanager
def _locked(folders: Iterable[Path]) -> Iterator[None]:
  """Keeps other jobs out of the folders."""
  with contextlib.ExitStack() as stack:
    for folder in folders:
      enter = functools.partial(stack.enter_context, lock(folder))
      processes.agreed(enter if processes.is_first() else lambda: None)
    yield


@contextlib.contextmanager
def _closed(batches, source: BatchSource) -> Iterator[None]:
  """Closes both in the end: readers that wait for a harvest first."""
  try:
    yield
  finally:
    source.close()
    batches.close()


def _must_agree(config: Config, run_dir: str) -> dict:
  """What all processes of a job must have been given alike."""
  flat = {f'config.{k}': v for k, v in flatten(config.to_dict()).items()}
  return flat | {'--workdir': run_dir, 'the version of jax': jax.__version__}


def restore_or_init(
  config: Config,
  source: BatchSource,
  checkpoints: list[Checkpoints],
  fingerprint: str,
  job: Job,
) -> tuple[States, int, list[dict[str, Any]]]:
  """(states, step, each member's record, {} of a new run) to go on from."""
  found = rounds.restore_newest(checkpoints, job)
  if found is not None:
    step, states, records = found
    for member, record in zip(job.members, records, strict=True):
      check_restored(member.folder, record['config'], member.config)
    if any(record['store'] != fingerprint for record in records):
      raise UserError(
        f'the store {config.store.path} is not the one this run was started '
        'on: give the old one, or take another --workdir'
      )
    rows = records[0]['position']
    logging.info('going on from step %d (%d rows)', step, rows)
    return states, step, records
  mean, centred, raw = reader.normalizer(
    source.root, source.site.name, source.bound
  )
  if not centred:  # sums of equal numbers are exact
    raise UserError(
      f'config.store.path: the rows of {source.site.name} in {source.root} '
      '(normaliser shards) do not vary: make the store again from other rows'
    )
  if not config.sae.center:
    mean, centred = np.zeros_like(mean), raw
  mean, scale = np.asarray(mean, np.float32), np.float32(math.sqrt(centred))
  states = job.join(initial(m, mean, scale) for m in job.members)
  for i, one in enumerate(checkpoints):
    one.prepare(job.part(states, i))
  return states, 0, [{} for _ in job.members]


def _read(
  progress: Progress, job: Job, step: int, metrics: Any, position: int
) -> None:
  progress.read(step, job.split(metrics), position)


def _evaluate(job: Job, states: States, held_out: jax.Array) -> list[dict]:
  found = jax.device_get(job.evaluate(states, held_out))
  return [{name: float(v) for name, v in values.items()} for values in found]
