"""Checkpoints of a job: of a plain run, or of all its members in rounds.

Each member has checkpoints of its own, in its own folder. A round is over when
all are written, and only then does the next one begin: a kill leaves members
one checkpoint apart at most, and the newest step that all have is taken.
"""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
from absl import logging
from jax.experimental import multihost_utils

from sae_jax.errors import UserError
from sae_jax.train import checkpoints as files
from sae_jax.train.checkpoints import Checkpoints
from sae_jax.train.integrity import Damaged
from sae_jax.train.members import Job, Member, States
from sae_jax.train.state import State, abstract_state


@contextlib.contextmanager
def opened(
  members: list[Member], keep: int, keep_every: int
) -> Iterator[list[Checkpoints]]:
  """The checkpoints of each member, see `Checkpoints`."""
  with contextlib.ExitStack() as stack:
    yield [
      stack.enter_context(Checkpoints(m.folder, keep, keep_every))
      for m in members
    ]


def save(
  every: list[Checkpoints],
  step: int,
  job: Job,
  states: States,
  records: list[dict[str, Any]],
) -> None:
  """Starts a round of saves; returns once the arrays are safe to donate."""
  if len(every) > 1:
    for checkpoints in every:
      checkpoints.wait()
  for i, (checkpoints, record) in enumerate(zip(every, records, strict=True)):
    if step != checkpoints.latest():
      checkpoints.save(step, job.part(states, i), record)


def restore_newest(
  every: list[Checkpoints], job: Job
) -> tuple[int, States, list[dict[str, Any]]] | None:
  """(step, states, records) of the newest step of which all members have a
  whole checkpoint; None when there is nothing to go on from.

  Newer ones keep their files under another name. Raises UserError as
  `Checkpoints.restore_newest` does, and when no step is common to all.
  """
  if not job.members[0].name:
    found = every[0].restore_newest(abstract_state(job.members[0].config))
    return found and (found[0], found[1], [found[2]])
  folders = [m.folder for m in job.members]
  kept = [files.agreed_steps(folder) for folder in folders]
  damaged: dict[tuple[int, Path], str] = {}
  for step in sorted(set.intersection(*map(set, kept)), reverse=True):
    records: list[dict[str, Any]] = []
    try:
      states = job.join(_restored(job, step, records))
    except Damaged as error:
      damaged[step, folders[len(records)]] = str(error)
      continue
    _put_aside(folders, step, damaged)
    for checkpoints in every:
      checkpoints.latest()  # its manager, made only now: see `Checkpoints`
    if len({str((r['position'], r.get('jumps'))) for r in records}) > 1:
      raise UserError(
        f'the members in {folders[0].parent} have not seen the same rows up '
        f'to step {step}: one went on by itself: take another --workdir'
      )
    return step, states, records
  if damaged or max(map(len, kept)) > 1 or min(map(len, kept)) > 0:
    there = '; '.join(
      f'{folder.name}: {", ".join(map(str, steps)) or "none"}'
      for folder, steps in zip(folders, kept, strict=True)
    )
    faults = ''.join(f'; {why}' for why in damaged.values())
    raise UserError(
      f'no step of which all members in {folders[0].parent} have a whole '
      f'checkpoint ({there}{faults}): put one back from a copy, or take '
      'another --workdir'
    )
  if any(kept):  # killed within the first round of saves
    _put_aside(folders, -1, {})
  return None


def _restored(
  job: Job, step: int, records: list[dict[str, Any]]
) -> Iterator[State]:
  """The members' states, one after the other; their records into the list."""
  for member in job.members:
    abstract = abstract_state(member.config)
    state, record = files.restore(member.folder, step, abstract)
    records.append(record)
    yield state


def _put_aside(
  folders: list[Path], step: int, damaged: dict[tuple[int, Path], str]
) -> None:
  """Renames what is newer than `step`, with a word on each."""
  for folder in folders:
    for newer in (s for s in files.agreed_steps(folder) if s > step):
      why = damaged.get((newer, folder))
      name = files.put_aside(folder, newer, 'damaged' if why else 'ahead')
      logging.warning(
        'checkpoint of step %d of member %s is %s: kept as %s',
        newer, folder.name,
        f'damaged ({why})' if why else 'ahead of other members', name,
      )  # fmt: skip
  if jax.process_count() > 1:
    multihost_utils.sync_global_devices('checkpoints put aside')
