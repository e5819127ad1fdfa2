"""The training loop, read from top to bottom.

Order matters: evaluate and save the state before the next batch is pulled;
read a step's metrics only after the next one is under way.
"""

import contextlib
import hashlib
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
from tqdm import tqdm

from sae_jax.config import Config
from sae_jax.errors import UserError
from sae_jax.models.sae import Norm
from sae_jax.parallel.mesh import DATA, make_mesh
from sae_jax.parallel.mesh import P as Spec
from sae_jax.store import reader
from sae_jax.store.manifest import Manifest
from sae_jax.train import perf
from sae_jax.train.checkpoints import Checkpoints
from sae_jax.train.config import validate
from sae_jax.train.run import open_run
from sae_jax.train.state import (
  State,
  abstract_state,
  init_state,
  steps_of,
)
from sae_jax.train.step import evaluate, make_step
from sae_jax.train.writer import Writer

PREEMPTED = 128 + signal.SIGTERM  # exit code: saved, start me again


def train(config: Config, run_dir: str) -> State:
  """Trains one SAE as `config` says and leaves it in the run folder.

  Continues from the newest checkpoint of the folder, if there is one. Raises
  UserError for what the user can mend (a loss that is not finite among it),
  SystemExit(143) after SIGTERM, when all is saved.
  """
  validate(config)
  c = config.train
  source = open_source(config)
  mesh = make_mesh(config.mesh.data, config.mesh.dict)
  open_run(run_dir, config)
  last = steps_of(c.rows, c.batch_rows)
  every = lambda rows: max(rows // c.batch_rows, 1) if rows else 0
  with (
    jax.set_mesh(mesh),
    _sigterm() as asked_to_stop,
    Checkpoints(
      run_dir, keep=c.keep, keep_every=every(c.keep_rows)
    ) as checkpoints,
  ):
    fingerprint = store_fingerprint(source.manifest)
    state, position = restore_or_init(config, source, checkpoints, fingerprint)
    held_out = held_out_rows(config) if c.eval_rows else None
    batches = reader.train_batches(source, position_rows=position)
    step_fn, start = make_step(config), int(state.step)
    writer, meter = Writer(run_dir, start), Meter(config)
    bar = tqdm(
      total=last * c.batch_rows, initial=start * c.batch_rows, unit='row',
      unit_scale=True, desc='train', disable=None,
    )  # fmt: skip
    pending = None
    try:
      for step in range(start, last + 1):
        over = step == last or asked_to_stop()
        save = over or (step > start and step % every(c.save_rows) == 0)
        if pending and save:  # nothing that is not finite is ever saved
          pending = _read(pending, writer, meter, bar, config)
        due = held_out is not None and step % every(c.eval_rows) == 0
        new = step > start or not start  # else evaluated before it was saved
        if new and (due or (held_out is not None and step == last)):
          writer.write(step, step * c.batch_rows, _evaluate(state, held_out))
        if save and step != checkpoints.latest():
          meta = dict(
            position=position, config=config.to_dict(), store=fingerprint
          )
          checkpoints.save(step, state, meta)
        if over:
          break
        x = next_batch(batches, meter)
        position += c.batch_rows
        state, metrics = step_fn(state, x)
        if pending:
          pending = _read(pending, writer, meter, bar, config)
        pending = (step + 1, metrics)
    finally:
      writer.close()
      bar.close()
      batches.close()
  if step < last:
    logging.info('SIGTERM: saved at step %d of %d in %s', step, last, run_dir)
    sys.exit(PREEMPTED)
  logging.info('trained on %d rows: %s', last * c.batch_rows, run_dir)
  return state


def open_source(config: Config) -> reader.BatchSource:
  """The store's batches; UserError unless store and config fit together."""
  c = config.store
  source = reader.BatchSource(
    c.path, c.site, config.train.batch_rows, seed=config.seed, window=c.window
  )
  if source.site.width != config.sae.d_in:
    raise UserError(
      f'config.sae.d_in={config.sae.d_in}, but site {c.site} of the store '
      f'{c.path} is {source.site.width} wide: set '
      f'--config.sae.d_in={source.site.width}'
    )
  return source


def store_fingerprint(manifest: Manifest) -> str:
  """What tells one store from another: a hash of its files' checksums."""
  files = [
    (file, entry.checksum)
    for shard in manifest.shards
    for file, entry in sorted(shard.files.items())
  ]
  return hashlib.sha256(repr(files).encode()).hexdigest()


def restore_or_init(
  config: Config,
  source: reader.BatchSource,
  checkpoints: Checkpoints,
  fingerprint: str,
) -> tuple[State, int]:
  """(state, data position in rows) to go on from."""
  step = checkpoints.latest()
  if step is not None:
    state, meta = checkpoints.restore(step, abstract_state(config))
    if meta['store'] != fingerprint:
      raise UserError(
        f'the store {config.store.path} is not the one this run was started '
        'on: give the old one, or take another --workdir'
      )
    logging.info('going on from step %d (%d rows)', step, meta['position'])
    return state, meta['position']
  mean, centred, raw = reader.normalizer(source.manifest, source.site.name)
  if not config.sae.center:
    mean, centred = np.zeros_like(mean), raw
  norm = Norm(jnp.asarray(mean, jnp.float32), jnp.float32(math.sqrt(centred)))
  return jax.jit(lambda norm: init_state(config, norm))(norm), 0


def held_out_rows(config: Config) -> jax.Array:
  """The first config.train.eval_size held-out rows, whole per data shard."""
  c, taken = config.store, []
  unit, size = config.mesh.data, config.train.eval_size
  for rows, _ in reader.held_out(c.path, c.site):
    taken.append(rows)
    if sum(map(len, taken)) >= size:
      break
  x = np.concatenate(taken)[:size]
  return jax.device_put(x[: len(x) // unit * unit], Spec(DATA, None))


def next_batch(batches: Iterator[np.ndarray], meter: 'Meter') -> jax.Array:
  """The next rows [B@data, D] on the devices; the wait is metered."""
  began = time.perf_counter()
  rows = next(batches)
  x = jax.make_array_from_process_local_data(Spec(DATA, None), rows)
  meter.waited += time.perf_counter() - began
  return x


class Meter:
  """Rows per second, utilisation and waiting since the last logged step."""

  def __init__(self, config: Config):
    c, self._rows = config.sae, config.train.batch_rows
    flops = lambda aux: perf.step_flops(self._rows, c.d_in, c.latents, aux=aux)
    auxk = config.act.name == 'topk' and config.loss.aux_coef > 0
    self._flops = {False: flops(False), True: flops(auxk)}
    virtual = jax.devices()[0].platform == 'cpu'  # they share the cores
    devices = 1 if virtual else config.mesh.data * config.mesh.dict
    self._peak = perf.peak_tflops() * devices * 1e12
    self._step, self._time, self.waited = -1, 0.0, 0.0
    self._spoken = -math.inf

  def may_speak(self) -> bool:
    """True at most every 10 s: lines on a log that is not a terminal."""
    now = time.monotonic()
    due = now - self._spoken > 10
    self._spoken = now if due else self._spoken
    return due

  def read(self, step: int, *, dead: bool) -> dict[str, float]:
    """Figures of the steps since the last call; none at the first call,
    whose time is mostly compilation. `dead`: whether AuxK had work to do."""
    now = time.perf_counter()
    seconds, steps, waited = now - self._time, step - self._step, self.waited
    first = self._step < 0
    self._step, self._time, self.waited = step, now, 0.0
    if first or not steps:
      return {}
    rate = steps / seconds
    return {
      'perf/rows_per_s': rate * self._rows,
      'perf/step_ms': 1e3 / rate,
      'perf/wait_ms': 1e3 * waited / steps,
      'perf/mfu': rate * self._flops[dead]['published'] / self._peak,
      'perf/mfu_executed': rate * self._flops[dead]['executed'] / self._peak,
    }


def _read(pending, writer, meter, bar, config) -> None:
  """Fetches a finished step's metrics, checks, shows and logs them."""
  step, metrics = pending
  values = {name: float(v) for name, v in jax.device_get(metrics).items()}
  for name in ('train/loss', 'train/grad_norm'):
    if not math.isfinite(values[name]):
      raise UserError(
        f'{name} of step {step} is {values[name]}: lower config.optim.lr or '
        'look at the rows; the newest checkpoint is an earlier, finite state'
      )
  c = config.train
  bar.update(c.batch_rows)
  every = max(c.log_rows // c.batch_rows, 1)
  if step % every and step != 1 and step * c.batch_rows < c.rows:
    return
  shown = {k: values[f'train/{k}'] for k in ('loss', 'fvu', 'l0', 'dead')}
  values |= meter.read(step, dead=values['train/dead'] > 0)
  writer.write(step, step * c.batch_rows, values)
  bar.set_postfix({k: f'{v:.3g}' for k, v in shown.items()})
  if bar.disable and (meter.may_speak() or step * c.batch_rows >= c.rows):
    rate = values.get('perf/rows_per_s', 0)
    text = ' '.join(f'{k} {v:.4g}' for k, v in shown.items())
    logging.info('%9d rows  %s  %.0f rows/s', step * c.batch_rows, text, rate)


def _evaluate(state: State, held_out: jax.Array) -> dict[str, float]:
  values = jax.device_get(evaluate(state, held_out))
  return {name: float(v) for name, v in values.items()}


@contextlib.contextmanager
def _sigterm() -> Iterator[Callable[[], bool]]:
  """Gives a function that tells whether SIGTERM came; it no longer kills.

  Leaves alone what a caller has installed, and threads other than the main
  one, which cannot have handlers.
  """
  came: list[bool] = []
  ours = (
    threading.current_thread() is threading.main_thread()
    and signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
  )
  if ours:
    signal.signal(signal.SIGTERM, lambda *_: came.append(True))
  try:
    yield lambda: bool(came)
  finally:
    if ours:
      signal.signal(signal.SIGTERM, signal.SIG_DFL)
