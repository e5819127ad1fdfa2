"""Updates that are left out, and rows that are left out after too many.

An update whose loss or gradient is not finite does nothing (train/step.py), on
all devices alike, and counts as a step. A batch that cannot be read takes that
way too: a process that finds a bad block gives rows that are not a number, and
so all skip the same batch, on any mesh, without a word between them.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from absl import logging

from sae_jax.errors import UserError
from sae_jax.parallel import processes
from sae_jax.store.batches import BatchSource
from sae_jax.train import checkpoints


class BadStretch(UserError):
  """So many updates in a row were skipped that the run goes back.

  position: rows of the stream up to which it leaves out the data then;
  began: the last step before them; jumped_at: the step from which it had gone
  around such rows before, if it had; who: whose updates they were.
  """

  def __init__(
    self, position: int, began: int, jumped_at: int | None, who: str
  ):
    super().__init__(f'the rows before row {position} of the stream are bad')
    self.position, self.began, self.jumped_at = position, began, jumped_at
    self.who = who


@dataclasses.dataclass
class Skips:
  """What one SAE left out so far; the same in all processes."""

  who: str  # 'member 03: ', or nothing
  most: int  # config.train.max_skipped
  start: int  # step of the last restore
  total: int = 0  # updates
  in_a_row: int = 0
  jumps: list[list[int]] = dataclasses.field(default_factory=list)
  jumped_at: int | None = None

  def count(
    self, skipped: bool, step: int, position: int, values: Mapping[str, float]
  ) -> None:
    """Takes note of one update. Raises BadStretch after too many."""
    self.total += skipped
    self.in_a_row = self.in_a_row + 1 if skipped else 0
    if skipped:
      logging.warning(
        '%sstep %d changes nothing: loss %g, gradient %g; %d in a row, %d in '
        'all', self.who, step,
        values['train/loss'], values['train/grad_norm'], self.in_a_row,
        self.total,
      )  # fmt: skip
    if self.in_a_row >= self.most:
      began = step - self.in_a_row
      raise BadStretch(position, began, self.jumped_at, self.who)

  def record(self) -> dict[str, Any]:
    """For the checkpoint."""
    return {
      'skipped': self.total,
      'skipped_in_a_row': self.in_a_row,
      'jumps': self.jumps,
    }


def jump(every: Sequence[Skips], position: int, stretch: BadStretch) -> int:
  """The position behind the stretch, for a job that was restored at
  `position`: if one SAE of it must go back, all do. UserError when it has been
  there before."""
  first = every[0]
  if stretch.jumped_at == first.start:
    raise UserError(
      f'{stretch.who}{first.most} updates in a row (config.train.max_skipped) '
      f'are not finite, again, after going back to step {first.start} and '
      f'around rows {first.jumps or position} to {stretch.position}: lower '
      'config.optim.lr, or check the store with launch/verify.py'
    )
  logging.warning(
    '%s%d updates in a row are not finite: back to step %d, and on without the '
    'rows %d to %d of the stream',
    stretch.who, first.most, first.start, position, stretch.position,
  )  # fmt: skip
  for skips in every:
    skips.jumps.append([position, stretch.position])
    skips.in_a_row, skips.jumped_at = 0, skips.start
  return stretch.position


def restored(
  record: Mapping[str, Any], step: int, most: int, who: str = ''
) -> Skips:
  """What the record of a checkpoint says, {} without one."""
  return Skips(
    who,
    most,
    step,
    record.get('skipped', 0),
    record.get('skipped_in_a_row', 0),
    record.get('jumps', []),
  )


def forget(run_dir: Path, began: int) -> None:
  """Puts aside the checkpoints after step `began`, from within a stretch that
  is to be gone around, if one from before it is left to go back to."""
  if not processes.is_first():
    return
  steps = checkpoints.kept_steps(run_dir)
  if any(_has_record(run_dir, step) for step in steps if step <= began):
    for step in (step for step in steps if step > began):
      checkpoints.put_aside(run_dir, step, 'skipped')


def _has_record(run_dir: Path, step: int) -> bool:
  try:
    checkpoints.read_meta(run_dir, step)
  except checkpoints.Damaged:  # put aside by the restore
    return False
  return True


def readable(source: BatchSource, on_bad_block: str) -> Any:
  """The batches as they are to be read: config.train.on_bad_block."""
  return source if on_bad_block == 'stop' else _Readable(source)


class _Readable:
  """The batches of a source; what cannot be read is not a number."""

  def __init__(self, source: BatchSource):
    self._source, self.batch_rows = source, source.batch_rows

  def __len__(self) -> int:
    return len(self._source)

  def __getitem__(self, i: int) -> np.ndarray:
    try:
      return self._source[i]
    except UserError as error:
      if self._source.removed(i):  # by a budget: the position is wrong
        raise
      logging.warning('batch %d is skipped: %s', i, error)
      site = self._source.site
      return np.full((self._source.rows, site.width), np.nan, site.read_dtype)
