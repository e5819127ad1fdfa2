"""What a run tells while it trains: checked metrics, speed, a progress bar."""

import math
import time
from collections.abc import Callable

import jax
from absl import logging
from tqdm import tqdm

from sae_jax.config import Config
from sae_jax.errors import UserError
from sae_jax.parallel import processes
from sae_jax.train import perf
from sae_jax.train.skipping import Skips
from sae_jax.train.state import steps_of
from sae_jax.train.step import Metrics
from sae_jax.train.writer import Writer

_QUIET_SECONDS = 10  # between lines on a log that is not a terminal


class Progress:
  """Reads the metrics of finished steps and passes them on.

  `waited` collects the seconds in which the loop waited for input.
  """

  def __init__(self, config: Config, run_dir, step: int, skips: Skips):
    c = config.train
    self._config, self._batch = config, c.batch_rows
    self._last = steps_of(c.rows, c.batch_rows)
    self._every = max(c.log_rows // c.batch_rows, 1)
    self._skips, first = skips, processes.is_first()
    self._writer = Writer(run_dir, step, step * c.batch_rows) if first else None
    self._speed = Speed(config)
    self._spoken = -math.inf
    self._bar = tqdm(
      total=self._last * c.batch_rows, initial=step * c.batch_rows,
      unit='row', unit_scale=True, desc='train',
      disable=None if first else True,
    )  # fmt: skip
    self.waited = 0.0
    self.also: Callable[[], dict[str, float]] = dict  # more values to log

  def read(self, step: int, metrics: Metrics, position: int) -> None:
    """Takes the metrics of the step'th update; waits until it is done.

    position: rows of the stream up to and with its batch. Raises UserError
    when the loss or a gradient is not finite, unless the update was skipped
    for that; BadStretch after too many of those in a row.
    """
    values = {name: float(v) for name, v in jax.device_get(metrics).items()}
    skipped = values.get('train/skipped', 0) > 0
    if 'train/skipped' in values:  # the sum is the same after a restart
      values['train/skipped'] = float(self._skips.total + skipped)
    for name in ('train/loss', 'train/grad_norm'):
      if not skipped and not math.isfinite(values[name]):
        raise UserError(
          f'{name} of step {step} is {values[name]}: lower config.optim.lr or '
          'look at the rows; the newest checkpoint is finite, delete it to '
          'start again from the one before'
        )
    self._skips.count(skipped, step, position, values)
    self._bar.update(self._batch)
    if step % self._every and step not in (1, self._last):
      return
    values |= self._speed.read(step, self.waited, values)
    values |= self.also()
    self.waited = 0.0
    self.write(step, values)
    self._show(step, values)

  def write(self, step: int, values: dict[str, float]) -> None:
    """Appends values of the state after `step` updates to the run's files."""
    if self._writer:
      self._writer.write(step, step * self._batch, values)

  def _show(self, step: int, values: dict[str, float]) -> None:
    shown = {k: values[f'train/{k}'] for k in ('loss', 'fvu', 'l0', 'dead')}
    self._bar.set_postfix({k: f'{v:.3g}' for k, v in shown.items()})
    now = time.monotonic()
    due = now - self._spoken > _QUIET_SECONDS or step == self._last
    if self._bar.disable and due:
      self._spoken = now
      text = ' '.join(f'{k} {v:.4g}' for k, v in shown.items())
      rate = values.get('perf/rows_per_s', 0.0)
      rows = step * self._batch
      logging.info('%9d rows  %s  %.0f rows/s', rows, text, rate)

  def close(self) -> None:
    if self._writer:
      self._writer.close()
    self._bar.close()


class Speed:
  """Rows per second and utilisation between two logged steps."""

  def __init__(self, config: Config):
    self._rows, self._config = config.train.batch_rows, config
    virtual = jax.devices()[0].platform == 'cpu'  # they share the cores
    devices = 1 if virtual else config.mesh.data * config.mesh.dict
    self._peak = perf.peak_tflops() * devices * 1e12
    self._step, self._time = -1, 0.0

  def read(
    self, step: int, waited: float, values: dict[str, float]
  ) -> dict[str, float]:
    """Figures of the steps since the last call; none at the first call,
    whose time is mostly compilation. `values`: the step's metrics."""
    now = time.perf_counter()
    seconds, steps = now - self._time, step - self._step
    first = self._step < 0
    self._step, self._time = step, now
    if first or not steps:
      return {}
    rate = steps / seconds
    flops = self._flops(values)
    return {
      'perf/rows_per_s': rate * self._rows,
      'perf/step_ms': 1e3 / rate,
      'perf/wait_ms': 1e3 * waited / steps,
      'perf/wait_share': waited / seconds,
      'perf/mfu': rate * flops['published'] / self._peak,
      'perf/mfu_executed': rate * flops['executed'] / self._peak,
    }

  def _flops(self, values: dict[str, float]) -> dict[str, float]:
    """FLOPs of a step with these metrics: AuxK has no work while none is dead,
    a sparse step touches the active latents only."""
    c = self._config
    aux = c.act.name != 'jumprelu' and c.loss.aux_coef > 0
    aux = aux and values['train/dead'] > 0
    active = 0 if values['train/dense'] else values['train/l0']
    active += aux * c.loss.aux_k if active else 0
    return perf.step_flops(
      self._rows, c.sae.d_in, c.sae.latents, aux=aux, active=active
    )
