"""A store that is smaller than what passes through it, and who reads it.

Trainers register in <root>/trainers/ from which shard on they may still need
the rows; the harvest removes what lies before all of them and goes on. Which
shard may be written depends on shard numbers alone, never on what happens to
lie on the disk, so that no order of events can block the next shard needed.
"""

import dataclasses
import hashlib
import json
import time
from collections.abc import Callable, Iterable
from pathlib import Path

from absl import logging

from sae_jax.errors import UserError
from sae_jax.paths import write_atomic
from sae_jax.store.folder import locked
from sae_jax.store.manifest import (
  Manifest,
  bin_path,
  blocks_path,
  planned_parts,
  read_manifest,
  row_parts,
  shard_bytes,
  write_manifest,
)

FOLDER = 'trainers'


@dataclasses.dataclass(frozen=True)
class Trainer:
  """A run that reads the store: the first shard that its oldest checkpoint
  may still ask for; the number of shards when it is done."""

  run: str
  first_shard: int


def register(root: Path, trainer: Trainer) -> None:
  """Says which shards a run may still need, at its start and when that moves.

  Raises UserError, and leaves what was said before, when one of them is gone.
  """
  path = root / FOLDER / f'{_name(trainer.run)}.json'
  with locked(root):  # no shard is removed between the look and the entry
    manifest = read_manifest(root, complete=False)
    gone = [s for s, entry in enumerate(manifest.shards) if entry.removed]
    needed = [s for s in gone if s >= trainer.first_shard]
    if needed:
      raise UserError(
        f'store.path: shards {needed[0]} to {needed[-1]} of {root}, which '
        f'{trainer.run} needs, were removed after all registered runs had read '
        'them: start all runs before the harvest passes its budget (harvest '
        'with --config.store.trainers=N)'
      )
    write_atomic(path, json.dumps(dataclasses.asdict(trainer)) + '\n')


def read_trainers(root: Path) -> list[Trainer]:
  """All registered runs; UserError for an entry that is none."""
  trainers = []
  for path in sorted((root / FOLDER).glob('*.json')):
    try:
      trainers.append(Trainer(**json.loads(path.read_text())))
    except (ValueError, TypeError) as error:
      raise UserError(
        f'{path}: not the entry of a trainer ({error}): start that run again, '
        'or delete the file'
      ) from error
  return trainers


def _name(run: str) -> str:
  """A file name for a run's folder."""
  digest = hashlib.sha256(run.encode()).hexdigest()[:8]
  return f'{Path(run).name}-{digest}'


def first_needed(root: Path, manifest: Manifest) -> int:
  """The first shard that a trainer, present or to come, may ask for."""
  trainers = read_trainers(root)
  if len(trainers) < manifest.trainers:
    return 0
  return min(trainer.first_shard for trainer in trainers)


def reach(manifest: Manifest, first: int) -> int:
  """The end of the shards that fit the budget when `first` is the first one
  still needed: shards below it may be written."""
  if not manifest.keep_bytes:
    return len(manifest.shards)
  used = planned_bytes(manifest)
  for shard in range(len(manifest.shards)):
    if shard < manifest.pinned_shards or shard >= first:
      used += shard_bytes(manifest, shard)
      if used > manifest.keep_bytes:
        return shard
  return len(manifest.shards)


def planned_bytes(manifest: Manifest) -> int:
  """What stays on the disk besides rows: sequences and their masks."""
  count = len(manifest.shards)
  return sum(
    entry.files[bin_path(part, s, count)].bytes
    for s, entry in enumerate(manifest.shards)
    for part in planned_parts()
  )


def check_budget(
  manifest: Manifest, *, window: int, checkpoint_rows: int
) -> None:
  """UserError when a run could wait for a shard that can never be written.

  window: shards permuted together; checkpoint_rows: rows between the oldest
  checkpoint kept and the newest at most. Needed are the pinned shards, two
  windows (the one read and the next) and the rows between the checkpoints.
  """
  if not manifest.keep_bytes:
    return
  between = -(-checkpoint_rows // manifest.rows_per_shard)
  shards = min(
    manifest.pinned_shards + 2 * window + between, len(manifest.shards)
  )
  needed = planned_bytes(manifest)
  needed += sum(shard_bytes(manifest, s) for s in range(shards))
  if needed > manifest.keep_bytes:
    raise UserError(
      f'store.keep_bytes={manifest.keep_bytes:,} of the store is too small for '
      f'this run: {manifest.pinned_shards} held-out and normaliser shards, two '
      f'windows of {window} (store.window) and {between} shards between the '
      f'checkpoints kept (train.keep x train.save_rows) are {needed:,} bytes: '
      'raise the one or lower the others'
    )


def remove_read_shards(root: Path) -> int:
  """Removes the shards no trainer needs any more; returns the first needed.

  They are marked in the manifest before their files go.
  """
  with locked(root):
    manifest = read_manifest(root, complete=False)
    first = first_needed(root, manifest)
    shards = list(manifest.shards)
    going = [
      s
      for s in range(manifest.pinned_shards, min(first, len(shards)))
      if not shards[s].removed
    ]
    if going:
      for s in going:
        shards[s] = dataclasses.replace(shards[s], removed=True)
      manifest = dataclasses.replace(manifest, shards=tuple(shards))
      write_manifest(root, manifest)
      delete_rows(root, manifest, going)
      logging.info('store: removed shards %d to %d, read by all runs',
                   going[0], going[-1])  # fmt: skip
    return first


def delete_rows(root: Path, manifest: Manifest, shards: Iterable[int]) -> None:
  """Deletes the files of removed shards, those that a kill has left too."""
  for s in shards:
    for part in row_parts(manifest):
      name = bin_path(part, s, len(manifest.shards))
      (root / name).unlink(missing_ok=True)
      (root / blocks_path(name)).unlink(missing_ok=True)


def await_room(
  root: Path, manifest: Manifest, shard: int, sleep: Callable = time.sleep
) -> None:
  """Returns when the budget has room for a shard; frees what it can."""
  if not manifest.keep_bytes:
    return
  spoken = -60.0
  while shard >= reach(manifest, first := remove_read_shards(root)):
    if time.monotonic() - spoken > 30:
      spoken = time.monotonic()
      logging.info('store: the budget of %s bytes is full at shard %d: waiting '
                   'for %s', f'{manifest.keep_bytes:,}', shard,
                   _awaited(root, manifest, first))  # fmt: skip
    sleep(1)


def _awaited(root: Path, manifest: Manifest, first: int) -> str:
  """Who keeps the harvest waiting, in words."""
  trainers = read_trainers(root)
  if len(trainers) < manifest.trainers:
    return f'{manifest.trainers - len(trainers)} more trainer(s) to register'
  slowest = [t.run for t in trainers if t.first_shard == first]
  return f'{", ".join(slowest)}, which may still need shard {first}'
