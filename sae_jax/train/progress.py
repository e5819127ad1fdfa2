"""What a run tells while it trains: checked metrics, speed, a progress bar."""

import math
import time
from collections.abc import Callable, Sequence

import jax
from absl import logging
from tqdm import tqdm

from sae_jax.config import Config
from sae_jax.errors import UserError
from sae_jax.parallel import processes
from sae_jax.train import perf
from sae_jax.train.members import Member
from sae_jax.train.skipping import Skips
from sae_jax.train.state import candidates, steps_of
from sae_jax.train.step import Metrics
from sae_jax.train.writer import Writer

_QUIET_SECONDS = 10  # between lines on a log that is not a terminal
_DENSE = 1000  # updates in a row that outgrow sparse codes: worth a word


class Progress:
  """Reads the metrics of finished steps and passes them on.

  `waited` collects the seconds in which the loop waited for input.
  """

  def __init__(
    self,
    config: Config,
    members: Sequence[Member],
    step: int,
    skips: Sequence[Skips],
  ):
    c = config.train
    self._config, self._batch = config, c.batch_rows
    self._last = steps_of(c.rows, c.batch_rows)
    self._every = max(c.log_rows // c.batch_rows, 1)
    self._skips, first = skips, processes.is_first()
    self._writers = [
      Writer(member.folder, step, step * c.batch_rows)
      for member in members
      if first
    ]
    self._members, self._dense = members, [0] * len(members)
    self._speed = Speed([member.config for member in members], config)
    self._spoken = -math.inf
    self._bar = tqdm(
      total=self._last * c.batch_rows, initial=step * c.batch_rows,
      unit='row', unit_scale=True, desc='train',
      disable=None if first else True,
    )  # fmt: skip
    self.waited = 0.0
    # More values to log, of each member.
    self.also: list[Callable[[], dict[str, float]]] = [dict] * len(members)

  def read(self, step: int, metrics: list[Metrics], position: int) -> None:
    """Takes each member's metrics of the step'th update; waits for it.

    position: rows of the stream up to and with its batch. Raises UserError
    when the loss or a gradient is not finite, unless the update was skipped
    for that; BadStretch after too many of those in a row.
    """
    found = [
      {name: float(v) for name, v in values.items()}
      for values in jax.device_get(metrics)
    ]
    for values, skips in zip(found, self._skips, strict=True):
      _check(step, values, skips, position)
    self._warn_of_dense(found)
    self._bar.update(self._batch)
    if step % self._every and step not in (1, self._last):
      return
    speed = self._speed.read(step, self.waited, found)
    self.waited = 0.0
    for values, also in zip(found, self.also, strict=True):
      values |= speed | also()
    self.write(step, found)
    self._show(step, found)

  def write(self, step: int, found: list[dict[str, float]]) -> None:
    """Appends values of the state after `step` updates to each run's files."""
    if self._writers:
      for writer, values in zip(self._writers, found, strict=True):
        writer.write(step, step * self._batch, values)

  def _warn_of_dense(self, found: list[dict[str, float]]) -> None:
    """A word to who pays for the search and the dense rule at every step."""
    for i, (member, values) in enumerate(
      zip(self._members, found, strict=True)
    ):
      tried = member.config.act.name == 'jumprelu' and candidates(member.config)
      over = tried and values['train/dense']
      self._dense[i] = self._dense[i] + 1 if over else 0
      if self._dense[i] == _DENSE:
        logging.warning(
          '%s%d updates in a row had more candidates than sparse codes hold '
          '(mean L0 %.4g, room for %d a row): give --config.train.codes=dense, '
          'or a larger --config.train.budget',
          self._skips[i].who, _DENSE, values['train/l0'], tried,
        )  # fmt: skip

  def _show(self, step: int, found: list[dict[str, float]]) -> None:
    """Of several members their means."""
    mean = lambda name: sum(values[name] for values in found) / len(found)
    shown = {k: mean(f'train/{k}') for k in ('loss', 'fvu', 'l0', 'dead')}
    self._bar.set_postfix({k: f'{v:.3g}' for k, v in shown.items()})
    now = time.monotonic()
    due = now - self._spoken > _QUIET_SECONDS or step == self._last
    if self._bar.disable and due:
      self._spoken = now
      text = ' '.join(f'{k} {v:.4g}' for k, v in shown.items())
      rate = found[0].get('perf/rows_per_s', 0.0)
      rows = step * self._batch
      logging.info('%9d rows  %s  %.0f rows/s', rows, text, rate)

  def close(self) -> None:
    for writer in self._writers:
      writer.close()
    self._bar.close()


def _check(
  step: int, values: dict[str, float], skips: Skips, position: int
) -> None:
  """Of one member; changes `train/skipped` to their sum."""
  skipped = values.get('train/skipped', 0) > 0
  if 'train/skipped' in values:  # the sum is the same after a restart
    values['train/skipped'] = float(skips.total + skipped)
  for name in ('train/loss', 'train/grad_norm'):
    if not skipped and not math.isfinite(values[name]):
      raise UserError(
        f'{skips.who}{name} of step {step} is {values[name]}: lower '
        'config.optim.lr or look at the rows; the newest checkpoint is finite, '
        'delete it to start again from the one before'
      )
  skips.count(skipped, step, position, values)


class Speed:
  """Rows of the stream per second, and utilisation, between two logged steps;
  the work is that of all members."""

  def __init__(self, members: Sequence[Config], config: Config):
    self._rows, self._members = config.train.batch_rows, members
    mesh = config.mesh
    virtual = jax.devices()[0].platform == 'cpu'  # they share the cores
    devices = 1 if virtual else mesh.member * mesh.data * mesh.dict
    self._peak = perf.peak_tflops() * devices * 1e12
    self._step, self._time = -1, 0.0

  def read(
    self, step: int, waited: float, found: Sequence[dict[str, float]]
  ) -> dict[str, float]:
    """Figures of the steps since the last call; none at the first call,
    whose time is mostly compilation. `found`: the step's metrics."""
    now = time.perf_counter()
    seconds, steps = now - self._time, step - self._step
    first = self._step < 0
    self._step, self._time = step, now
    if first or not steps:
      return {}
    rate = steps / seconds
    flops = list(map(perf.logged_flops, self._members, found))
    use = lambda how: rate * sum(f[how] for f in flops) / self._peak
    return {
      'perf/rows_per_s': rate * self._rows,
      'perf/step_ms': 1e3 / rate,
      'perf/wait_ms': 1e3 * waited / steps,
      'perf/wait_share': waited / seconds,
      'perf/mfu': use('published'),
      'perf/mfu_executed': use('executed'),
    }
