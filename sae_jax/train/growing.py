"""Training on a store that is still being written, within a disk budget.

A run tells the store which shards its oldest checkpoint may still ask for, so
that the harvest can remove those before and go on.
"""

import contextlib
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from absl import logging

from sae_jax.config import Config
from sae_jax.errors import UserError
from sae_jax.store import budget
from sae_jax.store.batches import BatchSource
from sae_jax.store.reader import waiting_for
from sae_jax.train import checkpoints


class Claim:
  """What a run may still need of a store with a budget; nothing otherwise."""

  def __init__(self, source: BatchSource, folder: Path):
    self._source, self._folder = source, folder
    self._told = -1

  def tell(self) -> None:
    """Tells the store from which shard on the run may need its rows."""
    if not self._source.manifest.keep_bytes:
      return
    position = checkpoints.oldest_position(self._folder)
    self._tell(self._source.first_shard(position))

  def done(self) -> None:
    """Tells the store that the run needs nothing any more."""
    if self._source.manifest.keep_bytes:
      self._tell(len(self._source.manifest.shards))

  def _tell(self, shard: int) -> None:
    if shard != self._told:
      trainer = budget.Trainer(str(self._folder), shard)
      budget.register(self._source.root, trainer)
      self._told = shard


def check(config: Config, source: BatchSource) -> None:
  """UserError when the run and the store's budget do not fit together."""
  m, c = source.manifest, config.train
  if not m.keep_bytes:
    return
  if c.rows > source.rows_per_epoch:
    raise UserError(
      f'config.train.rows={c.rows}: the store {source.root} is read once, its '
      f'shards are removed on the way: give {source.rows_per_epoch} at most'
    )
  if c.keep_rows:
    raise UserError(
      f'config.train.keep_rows={c.keep_rows}: rows after a checkpoint that is '
      f'kept for good could never be removed from {source.root}: set it to 0'
    )
  budget.check_budget(
    m, window=config.store.window, checkpoint_rows=c.keep * c.save_rows
  )


def await_batch(
  source: BatchSource, i: int, claim: Claim, stop_asked: Callable[[], int]
) -> None:
  """Returns when batch i can be read, or when a stop is asked for."""
  spoken, began = -60.0, time.monotonic()
  while (shard := source.missing(i)) is not None and not stop_asked():
    claim.tell()  # the checkpoint just saved may be complete by now
    if time.monotonic() - spoken > 30:
      spoken = time.monotonic()
      logging.info(
        '%s', waiting_for(source.root, shard, len(source.manifest.shards))
      )
    time.sleep(0.1)
  logging.info('waited %.1f s for the harvest', time.monotonic() - began)


@contextlib.contextmanager
def claimed(source: BatchSource, folder: Path) -> Iterator[Claim]:
  """The run's claim on its store, renewed at the end, when all is saved."""
  claim = Claim(source, folder)
  claim.tell()
  yield claim
  claim.tell()
