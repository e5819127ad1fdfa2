"""The run folder (--workdir): its config, its lock, and the SAE in it."""

import contextlib
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from absl import logging

from sae_jax import locks
from sae_jax.config import Config
from sae_jax.errors import UserError
from sae_jax.models.sae import SAE
from sae_jax.paths import write_atomic
from sae_jax.train import checkpoints
from sae_jax.train.config import base_config
from sae_jax.train.keys import flatten
from sae_jax.train.state import State, abstract_state, final_sae

LOCK = 'lock'  # a file, empty
# Keys that may change between starts without asking: they alter neither the
# arrays nor the trajectory.
_FREE = (
  'mesh.', 'train.log_rows', 'train.save_rows', 'train.keep', 'train.eval_',
  'train.resume', 'train.codes', 'train.budget', 'store.path', 'distributed.',
)  # fmt: skip
# Keys that give the arrays their meaning or the batches their order, or whose
# values live on in the state: no running state fits other values.
_FIXED = (
  'seed', 'store.', 'sae.', 'act.', 'train.batch_rows', 'optim.ema', 'optim.b1',
  'optim.b2', 'members', 'name',
)  # fmt: skip


def run_folder(run_dir: str | Path) -> Path:
  """The folder of a run; UserError for what cannot be one."""
  if '://' in str(run_dir):
    raise UserError(
      f'--workdir={run_dir} is a URL: give a folder, mount the bucket'
    )
  folder = Path(run_dir).expanduser().absolute()
  if folder.exists() and not folder.is_dir():
    raise UserError(f'--workdir={run_dir} is a file: give a folder')
  return folder


def check_run(folder: Path, config: Config) -> None:
  """UserError when the folder holds a run that `config` cannot go on with.

  With the same config a run goes on. With another one the error names the
  keys, unless config.train.resume allows the new values and the running state
  fits them.
  """
  if (folder / 'config.json').exists():
    _check_change(folder, read_config(folder).to_dict(), config)


def check_restored(run_dir: str | Path, old: dict, config: Config) -> None:
  """The same with the config in a checkpoint, where config.json is gone."""
  if not (run_folder(run_dir) / 'config.json').exists():
    _check_change(run_folder(run_dir), old, config)


def _check_change(folder: Path, old: dict, config: Config) -> None:
  changed = changed_keys(old, config.to_dict())
  rule = lambda key: re.sub(r'^members\[\d+\]\.', '', key)
  fixed = [key for key in changed if rule(key).startswith(_FIXED)]
  names = ', '.join(f'{k} {a!r} -> {b!r}' for k, (a, b) in changed.items())
  if fixed:
    cure = f'{", ".join(fixed)} cannot change within a run, take another folder'
  elif changed and not config.train.resume:
    cure = (
      'add --config.train.resume to go on with the new values, or take another '
      'folder'
    )
  else:
    return
  raise UserError(
    f'--workdir={folder} holds a run with another config ({names}): {cure}'
  )


@contextlib.contextmanager
def lock(folder: Path) -> Iterator[None]:
  """Keeps a second trainer out of the folder, which is made if need be."""
  try:
    descriptor = take_lock(folder, LOCK)
  except BlockingIOError as error:
    raise UserError(
      f'--workdir={folder} is in use by another process{error.strerror}: wait '
      'for it, or give another folder'
    ) from None
  try:
    yield
  finally:
    locks.release(descriptor)


def take_lock(folder: Path, name: str, wait: bool = False) -> int:
  """`locks.take` of a file in a folder, which is made if need be; UserError for
  one that cannot be."""
  try:
    # A file: locks of folders do not reach other hosts over NFS.
    return locks.take(folder / name, wait)
  except BlockingIOError:
    raise
  except OSError as error:
    raise UserError(
      f'--workdir={folder} cannot be used ({error.strerror}): give a folder '
      'that can be written'
    ) from error


def write_config(folder: Path, config: Config) -> None:
  """Records the config of a run: once everything that can refuse it has not."""
  text = json.dumps(config.to_dict(), indent=2) + '\n'
  write_atomic(folder / 'config.json', text)


def changed_keys(old: dict, new: dict) -> dict[str, tuple[Any, Any]]:
  """{dotted key: (old, new)} of the keys that matter and differ."""
  a, b = trajectory(old), trajectory(new)
  return {
    key: (a.get(key), b.get(key))
    for key in sorted(a.keys() | b.keys())
    if a.get(key) != b.get(key)
  }


def trajectory(config: dict) -> dict[str, Any]:
  """{dotted key: value} of all that decides what a run ends with."""
  flat = flatten(config)
  return {k: v for k, v in flat.items() if not k.startswith(_FREE)}


def read_config(run_dir: str | Path) -> Config:
  """The config of a run; keys younger than the run have their defaults.

  Raises UserError when the folder holds none.
  """
  path = run_folder(run_dir) / 'config.json'
  config: Config = base_config()
  try:
    config.update(json.loads(path.read_text()))
  except FileNotFoundError:
    raise UserError(
      f'{path} does not exist: give the --workdir of a training run'
    ) from None
  except (ValueError, TypeError) as error:
    raise UserError(
      f'{path} is not the JSON of a training config ({error}): restore it'
    ) from None
  return config


def load(run_dir: str | Path, step: int | None = None) -> SAE:
  """The trained SAE of a run folder, in raw units.

  Takes the newest whole checkpoint, with a warning when there is a newer one
  that is damaged, or the one of `step`. The arrays come sharded under a mesh
  (`jax.set_mesh`), on the first device without one. Raises UserError when
  there is no run or no such checkpoint, or when `step` is damaged.
  """
  folder, config = run_folder(run_dir), read_config(run_dir)
  checkpoints.find_step(folder, step)  # there is one
  config.mesh.zero1 = False  # whatever mesh there is now
  abstract: State = abstract_state(config)
  wanted = {'sae': abstract.sae, 'ema': abstract.ema}
  if step is not None:
    state, _ = checkpoints.restore(folder, step, wanted)
  else:
    newest: Any = checkpoints.newest(folder, wanted)
    used, state, _, damaged = newest
    for bad, why in damaged.items():
      logging.warning(
        'checkpoint of step %d in %s is damaged (%s): taking that of step %d',
        bad, folder, why, used,
      )  # fmt: skip
  return final_sae(state['sae'], state['ema'])
