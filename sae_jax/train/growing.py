"""Training on a store that is still being written, within a disk budget.

A run tells the store which shards its oldest checkpoint may still ask for, so
that the harvest can remove those before and go on.
"""

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeAlias

import numpy as np
from absl import logging

from sae_jax.config import Config
from sae_jax.errors import UserError
from sae_jax.parallel.processes import from_first, is_first, several
from sae_jax.store import budget
from sae_jax.store.batches import BatchSource
from sae_jax.store.manifest import COMPLETE, Manifest, read_manifest
from sae_jax.store.reader import waiting_for
from sae_jax.train import checkpoints
from sae_jax.train.state import steps_of

# Whether a shard is there is asked for so many batches at a time.
_LOOK_AHEAD = 64

# Batch -> the shard it waits for, None if all are there.
Missing: TypeAlias = Callable[[int], int | None]


def open_claim(
  config: Config,
  source: BatchSource,
  folder: Path,
  runs: Sequence[Path],
  jumped: int,
) -> tuple['Claim', Missing]:
  """The job's claim on the store, and what its batches wait for.

  runs: the folders with its checkpoints; jumped: rows that it has gone around.
  """
  claim = Claim(config, source, folder, runs, jumped)
  return claim, _agreed_missing(source) if several() else source.missing


def _agreed_missing(source: BatchSource) -> Missing:
  """`source.missing` as process 0 sees it, for all that call it together.

  The others' file systems may show a shard later: their readers wait for it.
  """
  ready = 0  # batches known to be there: asked for once, they cost nothing

  def missing(i: int) -> int | None:
    nonlocal ready
    if i < ready:
      return None
    found = np.zeros(2, np.int32)
    if is_first():
      found[:] = _look_ahead(source, i)
    ready, shard = (int(v) for v in from_first(found))
    return None if i < ready else shard

  return missing


def _look_ahead(source: BatchSource, i: int) -> tuple[int, int]:
  """(batches that are there, from i on; the shard the next one waits for)."""
  if source.manifest.state == COMPLETE:
    return np.iinfo(np.int32).max, 0
  for batch in range(i, i + _LOOK_AHEAD):
    if (shard := source.missing(batch)) is not None:
      return batch, shard
  return i + _LOOK_AHEAD, 0


class Claim:
  """What a run may still need of a store with a budget; nothing otherwise."""

  def __init__(
    self,
    config: Config,
    source: BatchSource,
    folder: Path,
    runs: Sequence[Path],
    jumped: int,
  ):
    self._config, self._source, self._folder = config, source, folder
    self._runs, self._jumped = runs, jumped
    check(config, source, source.manifest, jumped)
    self._budget, self._told = source.manifest.keep_bytes, -1

  def tell(self) -> None:
    """Tells the store from which shard on the run may need its rows.

    Raises UserError when they are gone, or the budget does not fit the run.
    """
    if is_first() and self._has_budget():
      position = min(map(checkpoints.oldest_position, self._runs))
      self._tell(self._source.first_shard(position))

  def done(self) -> None:
    """Tells the store that the run needs nothing any more."""
    if is_first() and self._has_budget():
      self._tell(len(self._source.manifest.shards))

  def _has_budget(self) -> bool:
    """A harvest that goes on may have been given a budget meanwhile."""
    if not self._budget and self._source.manifest.state != COMPLETE:
      now = read_manifest(self._source.root, complete=False)
      self._budget = now.keep_bytes
      check(self._config, self._source, now, self._jumped)
    return self._budget > 0

  def _tell(self, shard: int) -> None:
    if shard != self._told:
      trainer = budget.Trainer(str(self._folder), shard)
      budget.register(self._source.root, trainer)
      self._told = shard


def check(
  config: Config, source: BatchSource, m: Manifest, jumped: int = 0
) -> None:
  """UserError when the run and the budget of the store do not fit together.

  jumped: rows that the run has gone around.
  """
  c = config.train
  if not m.keep_bytes:
    return
  B, epoch = c.batch_rows, source.rows_per_epoch - jumped
  if steps_of(c.rows, B) * B > epoch:
    raise UserError(
      f'config.train.rows={c.rows}: the store {source.root} is read once, its '
      'shards are removed on the way'
      + (f', and {jumped} rows were gone around' * (jumped > 0))
      + f': give {epoch // B * B} at most'
    )
  if c.keep_rows:
    raise UserError(
      f'config.train.keep_rows={c.keep_rows}: rows after a checkpoint that is '
      f'kept for good could never be removed from {source.root}: set it to 0'
    )
  between = c.keep * max(c.save_rows, B)
  budget.check_budget(m, window=config.store.window, checkpoint_rows=between)


def await_batch(
  source: BatchSource,
  missing: Missing,
  i: int,
  claim: Claim,
  stop_asked: Callable[[], int],
) -> None:
  """Returns when batch i can be read, or when a stop is asked for."""
  spoken, began = -60.0, time.monotonic()
  while (shard := missing(i)) is not None and not stop_asked():
    claim.tell()  # the checkpoint just saved may be complete by now
    if time.monotonic() - spoken > 30:
      spoken = time.monotonic()
      logging.info(
        '%s', waiting_for(source.root, shard, len(source.manifest.shards))
      )
    time.sleep(0.1)
  logging.info('waited %.1f s for the harvest', time.monotonic() - began)
