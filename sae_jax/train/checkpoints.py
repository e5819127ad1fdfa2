"""Checkpoints: saved while the loop goes on, compared when they are read.

A checkpoint holds the whole training state and a JSON record of where the
data stream stands, the full config, the software versions, and what its
arrays must be (integrity.py). What comes back is compared with the record; a
checkpoint that differs is never used. docs/checkpoints.md has the contract.
"""

import contextlib
import errno
import functools
import importlib.metadata
import os
import platform
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import logging
from jax.experimental import multihost_utils

from sae_jax.errors import UserError
from sae_jax.train import integrity, orbax_io
from sae_jax.train.integrity import Damaged
from sae_jax.train.state import State

_PACKAGES = ('jax', 'jaxlib', 'flax', 'optax', 'orbax-checkpoint', 'grain')
# What a disk does to a save, as far as its owner can mend it.
_DISK = tuple(
  os.strerror(number)
  for number in (
    errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES,
    errno.EPERM, errno.EIO,
  )
)  # fmt: skip
# Failures to read that say nothing about the bytes on disk.
_ELSEWHERE = (
  'PERMISSION_DENIED', 'RESOURCE_EXHAUSTED', os.strerror(errno.EACCES),
  os.strerror(errno.EMFILE), os.strerror(errno.ENOMEM),
)  # fmt: skip


class Checkpoints:
  """The checkpoints of one run folder. Use as a context manager, under the
  folder's lock; in a job of several processes, in all of them.

  Saves are asynchronous; leaving the context waits for them. A save that was
  cut off keeps a temporary name and is never chosen.
  """

  def __init__(self, run_dir: str | Path, keep: int, keep_every: int):
    self.run_dir, self._keep, self._keep_every = run_dir, keep, keep_every
    self._saving, self._began, self._bytes = 0, 0.0, 0
    self._timings: dict[str, float] = {}

  @functools.cached_property
  def _manager(self) -> Any:
    """Made after the restore: it removes what it takes for unfinished, and
    nothing may be removed that was not looked at."""
    return orbax_io.make_manager(
      folder(self.run_dir), self._keep, self._keep_every, self._written
    )

  def latest(self) -> int | None:
    """The step of the newest checkpoint."""
    return self._manager.latest_step()

  def prepare(self, state: State) -> None:
    """Does once what takes a while once (0.3 s), so that the first save does
    not: the manager, the compilation of the sums. A restore does the same."""
    _ = self._manager, versions()
    jax.block_until_ready(integrity.sums(integrity.named(state)))

  def save(self, step: int, state: State, meta: dict[str, Any]) -> None:
    """Starts writing; returns once the arrays are safe to donate.

    Waits for the save before, if that is still under way. Raises UserError
    when the disk refused that one.
    """
    with self._disk_errors():
      manager, began = self._manager, time.perf_counter()
      leaves = integrity.named(state)
      record = dict(
        meta, shapes=integrity.shapes(leaves), step=step, versions=versions()
      )
      manager.wait_until_finished()
      self._saving, self._began = step, time.perf_counter()
      self._bytes = sum(x.nbytes for x in leaves.values())
      orbax_io.start_save(manager, step, leaves, record)
    block = 1e3 * (time.perf_counter() - began)
    self._timings['perf/save_block_ms'] = block

  def wait(self) -> None:
    """Until the save under way is written; raises UserError as `save` does."""
    with self._disk_errors():
      self._manager.wait_until_finished()

  def timings(self) -> dict[str, float]:
    """Of the saves since the last call: milliseconds the loop was kept
    waiting, and seconds until all was written, for the one that is.

    Raises UserError when the disk refused a save meanwhile.
    """
    # Only when it is over: Orbax tells an error once, and its own thread must
    # hear it first, or it removes old checkpoints as if all had gone well.
    if not self._manager.is_saving_in_progress():
      with self._disk_errors():
        self._manager.wait_until_finished()
    taken, self._timings = self._timings, {}
    return taken

  def restore_newest(
    self, abstract: State
  ) -> tuple[int, State, dict[str, Any]] | None:
    """(step, state, record) of the newest whole checkpoint, None without any.

    Damaged ones that are newer keep their files under another name. All
    processes take the same. Raises UserError as `restore` does, and when
    there are checkpoints but none is whole.
    """
    found = newest(self.run_dir, abstract)
    if found is None:
      return None
    step, state, record, damaged = found
    for bad, why in damaged.items():
      logging.warning(
        'checkpoint of step %d is damaged (%s): kept as %s; taking that of '
        'step %d, %d steps are trained again',
        bad, why, put_aside(self.run_dir, bad, 'damaged'), step, bad - step,
      )  # fmt: skip
    if damaged and jax.process_count() > 1:
      multihost_utils.sync_global_devices('damaged checkpoints put aside')
    _ = self._manager
    return step, state, record

  def __enter__(self) -> 'Checkpoints':
    return self

  def __exit__(self, *_: object) -> None:
    if '_manager' not in self.__dict__:
      return
    with self._disk_errors(), contextlib.closing(self._manager):
      self._manager.wait_until_finished()

  def _written(self) -> None:
    """Called by Orbax's thread when all is written, before the final name."""
    self._timings['perf/save_s'] = time.perf_counter() - self._began

  @contextlib.contextmanager
  def _disk_errors(self) -> Iterator[None]:
    """Turns what the disk did to the save under way into a UserError."""
    try:
      yield
    except (OSError, ValueError, RuntimeError) as error:
      reason = next((r for r in _DISK if r in str(error)), None)
      if reason is None or isinstance(error, UserError):
        raise
      if jax.process_index() == 0:  # what there is of it takes room
        _remove_halves(folder(self.run_dir))
      there = kept_steps(self.run_dir)
      raise UserError(
        f'the checkpoint of step {self._saving} could not be written to '
        f'{folder(self.run_dir)} ({reason}): mend that (it takes up to '
        f'{self._bytes / 1e6:,.1f} MB) and run the same command again, which '
        + (f'goes on from step {there[-1]}' if there else 'starts anew')
      ) from error


def _remove_halves(folder: Path) -> None:
  """Removes saves that were cut off; their writers may go on for a moment."""
  for _ in range(10):
    halves = list(folder.glob('*.orbax-checkpoint-tmp*'))
    if not halves:
      return
    for half in halves:
      shutil.rmtree(half, ignore_errors=True)
    time.sleep(0.2)


def folder(run_dir: str | Path) -> Path:
  """Where a run keeps its checkpoints."""
  return Path(run_dir).absolute() / 'checkpoints'


def kept_steps(run_dir: str | Path) -> list[int]:
  """The steps of all checkpoints that were written to their end, ascending."""
  there = folder(run_dir)
  names = os.listdir(there) if there.is_dir() else []
  return sorted(int(name) for name in names if name.isdecimal())


def find_step(run_dir: str | Path, step: int | None = None) -> int:
  """The newest checkpoint's step, or `step` when it was kept.

  Raises UserError naming those there are.
  """
  steps = kept_steps(run_dir)
  if not steps:
    if (members := Path(run_dir) / 'members').is_dir():
      raise UserError(f'{run_dir} holds members: give one of {members}')
    raise UserError(
      f'no checkpoint in {folder(run_dir)}: is {run_dir} the --workdir of a '
      'training run that saved at least once?'
    )
  if step is not None and step not in steps:
    kept = ', '.join(map(str, steps))
    raise UserError(f'no checkpoint of step {step} in {run_dir}; kept: {kept}')
  return steps[-1] if step is None else step


def read_meta(run_dir: str | Path, step: int) -> dict[str, Any]:
  """A checkpoint's record: position, config, versions, sums.

  Raises Damaged unless it is what was written.
  """
  path = folder(run_dir) / str(step) / 'meta' / 'record.json'
  try:
    return integrity.unseal(path.read_text())
  except FileNotFoundError:
    raise Damaged(f'{path} is missing') from None
  except ValueError as error:
    raise Damaged(f'{path}: {error}') from None


def oldest_position(run_dir: str | Path) -> int:
  """Data position of the oldest checkpoint that is kept, 0 without any."""
  steps, before = kept_steps(run_dir), None
  while steps != before:
    for step in steps:
      try:
        return read_meta(run_dir, step)['position']
      except Damaged:  # or just being deleted: there is a newer one
        continue
    steps, before = kept_steps(run_dir), steps
  return 0


def restore(
  run_dir: str | Path, step: int, abstract: Any
) -> tuple[Any, dict[str, Any]]:
  """The arrays, laid out as `abstract` says, and the record.

  `abstract` is a State, or a dict of parts of one. All processes call this.
  Raises Damaged, and UserError when the arrays are not those of `abstract`.
  """
  path, fault, record = folder(run_dir) / str(step), '', {}
  try:
    record = read_meta(run_dir, step)
    if not orbax_io.is_finished(path):
      fault = f'{path} has no mark of being finished'
  except Damaged as error:
    fault = str(error)
  _agree(fault)
  here, there = integrity.named(abstract), record['shapes']
  if isinstance(abstract, dict):  # some parts, whole
    there = {k: v for k, v in there.items() if k.split('.')[0] in abstract}
  names, young = list(here), None
  if 'touched' not in there:
    young = here.pop('touched', None)
  what = f'the checkpoint of step {step} in {run_dir}'
  integrity.check_shapes(there, integrity.shapes(here), what)
  leaves: dict[str, jax.Array] = {}
  try:
    leaves = orbax_io.read(path / 'state', here)
  except Exception as error:
    # Bytes that are off surface as any type of error, from three libraries.
    if isinstance(error, MemoryError) or any(
      words in str(error) for words in _ELSEWHERE
    ):
      raise
    text = ' '.join(str(error).split())
    fault = f'{type(error).__name__}: {text[:200]}'
  _agree(fault)
  off = integrity.differing(leaves, record['sums'])
  if off:
    raise Damaged(f'{", ".join(off)}: not the values that were saved')
  if young is not None:
    leaves['touched'] = _all_up_to_date(leaves, young)
  tree = jax.tree.structure(abstract).unflatten(leaves[n] for n in names)
  return tree, record


def newest(
  run_dir: str | Path, abstract: Any
) -> tuple[int, Any, dict[str, Any], dict[int, str]] | None:
  """(step, arrays, record, {newer step: what is wrong with it}), or None.

  `abstract` is a State, or a dict of parts of one. Raises UserError when
  there are checkpoints but none is whole.
  """
  damaged: dict[int, str] = {}
  for step in agreed_steps(run_dir)[::-1]:
    try:
      return step, *restore(run_dir, step, abstract), damaged
    except Damaged as error:
      damaged[step] = str(error)
  if damaged:
    faults = '; '.join(f'step {step}: {why}' for step, why in damaged.items())
    raise UserError(
      f'no checkpoint in {folder(run_dir)} is whole ({faults}): put one back '
      'from a copy, or remove them to start anew'
    )
  return None


def _all_up_to_date(leaves: dict[str, jax.Array], like: Any) -> jax.Array:
  """`State.touched` for a checkpoint of before there was one: the moments of
  all rows had decayed up to the last update."""
  (count,) = (x for name, x in leaves.items() if name.endswith('.count'))
  value = np.asarray(jax.device_get(count))
  part = lambda index: np.broadcast_to(value, like.shape)[index]
  return jax.make_array_from_callback(like.shape, like.sharding, part)


def _agree(fault: str) -> None:
  """Raises Damaged in all processes if there is a fault in any."""
  if jax.process_count() > 1:
    mine = np.zeros(512, np.uint8)
    raw = fault.encode()[:512]
    mine[: len(raw)] = list(raw)
    rows = np.asarray(multihost_utils.process_allgather(mine))
    texts = [bytes(r).rstrip(b'\0').decode(errors='replace') for r in rows]
    fault = next(filter(None, texts), '')
  if fault:
    raise Damaged(fault)


def agreed_steps(run_dir: str | Path) -> list[int]:
  """The steps that process 0 sees: others' views of a network disk are late."""
  steps = kept_steps(run_dir)
  if jax.process_count() == 1:
    return steps
  share = multihost_utils.broadcast_one_to_all
  seen = np.zeros(int(share(np.int32(len(steps)))), np.int32)
  few = min(len(seen), len(steps))
  seen[:few] = steps[:few]
  return np.asarray(share(seen)).tolist() if len(seen) else []


def put_aside(run_dir: str | Path, step: int, why: str) -> str:
  """Renames a checkpoint to WHY-STEP, process 0 alone; its new name."""
  there, n = folder(run_dir), 0
  while (there / (name := f'{why}-{step}' + (f'.{n}' if n else ''))).exists():
    n += 1
  if jax.process_index() == 0:
    os.rename(there / str(step), there / name)
  return name


@functools.cache
def versions() -> dict[str, str]:
  """What wrote a checkpoint."""
  found = {name: importlib.metadata.version(name) for name in _PACKAGES}
  device = jax.devices()[0]
  return found | {
    'python': platform.python_version(),
    'device': f'{device.platform}: {device.device_kind}',
  }
