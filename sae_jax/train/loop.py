"""The training loop, read from top to bottom.

Order matters: evaluate and save the state before the next batch is pulled;
read a step's metrics only after the next one is under way.
"""

import contextlib
import math
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging

from sae_jax.config import Config
from sae_jax.errors import UserError
from sae_jax.models.sae import Norm
from sae_jax.parallel.mesh import DATA, make_mesh
from sae_jax.parallel.mesh import P as Spec
from sae_jax.store import reader
from sae_jax.store.batches import BatchSource, train_batches
from sae_jax.store.manifest import store_fingerprint
from sae_jax.train import growing
from sae_jax.train.checkpoints import Checkpoints
from sae_jax.train.config import validate
from sae_jax.train.progress import Progress
from sae_jax.train.run import (
  check_restored,
  check_run,
  lock,
  run_folder,
  write_config,
)
from sae_jax.train.state import State, abstract_state, init_state, steps_of
from sae_jax.train.step import evaluate, make_step


def train(config: Config, run_dir: str) -> State:
  """Trains one SAE as `config` says and leaves it in the run folder.

  Continues from the newest checkpoint of the folder, if there is one. Raises
  UserError for what the user can mend (a loss that is not finite among it),
  SystemExit after SIGTERM (143) or Ctrl-C (130), when all is saved.
  """
  validate(config)
  folder, c = run_folder(run_dir), config.train
  check_run(folder, config)
  source = open_source(config)
  mesh = make_mesh(config.mesh.data, config.mesh.dict)
  # Of a store that is still being written held-out and normaliser shards must
  # be there; whatever can be refused without them has been.
  reader.await_shards(source.root, range(source.manifest.pinned_shards))
  last = steps_of(c.rows, c.batch_rows)
  every = lambda rows: max(rows // c.batch_rows, 1) if rows else 0

  with jax.set_mesh(mesh):
    held_out = held_out_rows(config)
  with (
    jax.set_mesh(mesh),
    lock(folder),
    _stop_signals() as stop_asked,  # in force until the last save is written
    Checkpoints(folder, c.keep, every(c.keep_rows)) as checkpoints,
  ):
    fingerprint = store_fingerprint(source.manifest, source.site.name)
    state, position = restore_or_init(config, source, checkpoints, fingerprint)
    start = int(state.step)
    if start > last:
      raise UserError(
        f'--workdir={run_dir} is at {start * c.batch_rows} rows already: give '
        f'--config.train.rows={start * c.batch_rows} or more'
      )
    claim = growing.Claim(config, source, folder)
    claim.tell()
    write_config(folder, config)
    step_fn, progress = make_step(config), Progress(config, folder, start)
    progress.also = checkpoints.timings
    batches = train_batches(source, position_rows=position)
    pending = None
    try:
      for step in range(start, last + 1):
        over = step == last or stop_asked()
        # Ahead of the harvest: a save lets it remove what was read.
        ahead = not over and source.missing(step) is not None
        due = step > start and step % every(c.save_rows) == 0
        save = over or due or (ahead and step > start)
        if pending and save:  # nothing that is not finite is ever saved
          progress.read(*pending)
          pending = None
        if held_out is not None and (step > start or not start):
          if step == last or step % every(c.eval_rows) == 0:
            progress.write(step, _evaluate(state, held_out))
        if save and step != checkpoints.latest():
          checkpoints.save(
            step,
            state,
            dict(position=position, config=config.to_dict(), store=fingerprint),
          )
          claim.tell()
        if ahead:
          growing.await_batch(source, step, claim, stop_asked)
          over = source.missing(step) is not None  # asked to stop: all is saved
        if over:
          break
        x = next_batch(batches, progress)
        position += c.batch_rows
        state, metrics = step_fn(state, x)
        if pending:
          progress.read(*pending)
        pending = (step + 1, metrics)
    finally:
      progress.close()
      source.close()
      batches.close()
  if step < last:
    claim.tell()
    logging.info('stopped: saved at step %d of %d in %s', step, last, folder)
    sys.exit(128 + stop_asked())
  claim.done()
  logging.info('trained on %d rows: %s', last * c.batch_rows, folder)
  return state


def open_source(config: Config) -> BatchSource:
  """The store's batches; UserError unless store and config fit together."""
  c = config.store
  source = BatchSource(
    c.path, c.site, config.train.batch_rows, seed=config.seed, window=c.window
  )
  if source.site.width != config.sae.d_in:
    raise UserError(
      f'config.sae.d_in={config.sae.d_in}, but site {c.site} of the store '
      f'{c.path} is {source.site.width} wide: set '
      f'--config.sae.d_in={source.site.width}'
    )
  growing.check(config, source, source.manifest)
  return source


def restore_or_init(
  config: Config,
  source: BatchSource,
  checkpoints: Checkpoints,
  fingerprint: str,
) -> tuple[State, int]:
  """(state, data position in rows) to go on from."""
  found = checkpoints.restore_newest(abstract_state(config))
  if found is not None:
    step, state, meta = found
    check_restored(checkpoints.run_dir, meta['config'], config)
    if meta['store'] != fingerprint:
      raise UserError(
        f'the store {config.store.path} is not the one this run was started '
        'on: give the old one, or take another --workdir'
      )
    logging.info('going on from step %d (%d rows)', step, meta['position'])
    return state, meta['position']
  mean, centred, raw = reader.normalizer(source.root, source.site.name)
  if not config.sae.center:
    mean, centred = np.zeros_like(mean), raw
  norm = Norm(jnp.asarray(mean, jnp.float32), jnp.float32(math.sqrt(centred)))
  state = jax.jit(lambda norm: init_state(config, norm))(norm)
  checkpoints.prepare(state)
  return state, 0


def held_out_rows(config: Config) -> jax.Array | None:
  """The first config.train.eval_size held-out rows [n@data, D], or as many as
  there are; None when no evaluation is asked for."""
  if not config.train.eval_rows:
    return None
  c, taken = config.store, []
  unit, size = config.mesh.data, config.train.eval_size
  for rows, _ in reader.held_out(c.path, c.site):
    taken.append(rows)
    if sum(map(len, taken)) >= size:
      break
  count = min(sum(map(len, taken)), size) // unit * unit
  if not count:
    raise UserError(
      f'config.train.eval_rows={config.train.eval_rows} asks for evaluations, '
      f'but there are fewer than config.mesh.data={unit} held-out rows in '
      f'{c.path} or config.train.eval_size={size}: set it to 0, or harvest '
      'with store.held_out_shards=1'
    )
  return jax.device_put(np.concatenate(taken)[:count], Spec(DATA, None))


def next_batch(batches: Iterator[np.ndarray], progress: Progress) -> jax.Array:
  """The next rows [B@data, D] on the devices; the wait is metered."""
  began = time.perf_counter()
  rows = next(batches)
  x = jax.make_array_from_process_local_data(Spec(DATA, None), rows)
  progress.waited += time.perf_counter() - began
  return x


def _evaluate(state: State, held_out: jax.Array) -> dict[str, float]:
  values = jax.device_get(evaluate(state, held_out))
  return {name: float(v) for name, v in values.items()}


@contextlib.contextmanager
def _stop_signals() -> Iterator[Callable[[], int]]:
  """Gives a function that tells which of SIGTERM and SIGINT came, or 0.

  A signal asks the loop to save and stop; the same one again kills. Leaves
  alone what a caller has installed, and threads other than the main one,
  which cannot have handlers.
  """
  came: list[int] = []
  default = {
    signal.SIGTERM: signal.SIG_DFL,
    signal.SIGINT: signal.default_int_handler,
  }

  def note(number, frame):
    del frame
    came.append(number)
    signal.signal(number, default[number])

  main = threading.current_thread() is threading.main_thread()
  ours = [s for s, f in default.items() if main and signal.getsignal(s) == f]
  for number in ours:
    signal.signal(number, note)
  try:
    yield lambda: came[0] if came else 0
  finally:
    for number in ours:
      signal.signal(number, default[number])
