"""Checkpoints: the only file that calls Orbax.

A checkpoint holds the whole training state and a JSON record of where the
data stream stands, the full config and the software versions.
"""

import functools
import importlib.metadata
import json
import platform
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

from sae_jax.errors import UserError
from sae_jax.train.state import State

_PACKAGES = ('jax', 'jaxlib', 'flax', 'optax', 'orbax-checkpoint', 'grain')


class Checkpoints:
  """The checkpoints of one run folder. Use as a context manager.

  Saves are asynchronous; leaving the context waits for them. A save that was
  cut off keeps a temporary name and is never chosen.
  """

  def __init__(self, run_dir: str | Path, keep: int, keep_every: int):
    policies: list[Any] = [ocp.checkpoint_managers.LatestN(keep)]
    if keep_every:
      policies.append(ocp.checkpoint_managers.EveryNSteps(keep_every))
    self._manager = ocp.CheckpointManager(
      folder(run_dir),
      item_names=('state', 'meta'),
      options=ocp.CheckpointManagerOptions(
        cleanup_tmp_directories=True,  # of killed runs: the folder is locked
        preservation_policy=ocp.checkpoint_managers.AnyPreservationPolicy(
          policies
        ),
      ),
    )

  def latest(self) -> int | None:
    """The step of the newest complete checkpoint."""
    return self._manager.latest_step()

  def save(self, step: int, state: State, meta: dict[str, Any]) -> None:
    """Starts writing; returns once the arrays are safe to donate."""
    self._manager.save(
      step,
      args=ocp.args.Composite(
        state=ocp.args.StandardSave(state),
        meta=ocp.args.JsonSave(meta | {'versions': versions()}),
      ),
      force=True,
    )

  def restore(self, step: int, abstract: State) -> tuple[State, dict[str, Any]]:
    """The state, laid out as `abstract` says, and the meta record."""
    out: Any = self._manager.restore(
      step,
      args=ocp.args.Composite(
        state=ocp.args.StandardRestore(abstract), meta=ocp.args.JsonRestore()
      ),
    )
    return out.state, out.meta

  def __enter__(self) -> 'Checkpoints':
    return self

  def __exit__(self, *_: object) -> None:
    try:
      self._manager.wait_until_finished()
    finally:
      self._manager.close()


def folder(run_dir: str | Path) -> Path:
  """Where a run keeps its checkpoints."""
  return Path(run_dir).absolute() / 'checkpoints'


def kept_steps(run_dir: str | Path) -> list[int]:
  """The steps of all complete checkpoints of a run, ascending."""
  there = folder(run_dir).is_dir()
  return sorted(ocp.utils.checkpoint_steps(folder(run_dir))) if there else []


def find_step(run_dir: str | Path, step: int | None = None) -> int:
  """The newest complete checkpoint's step, or `step` when it was kept.

  Raises UserError naming those there are.
  """
  steps = kept_steps(run_dir)
  if not steps:
    raise UserError(
      f'no checkpoint in {folder(run_dir)}: is {run_dir} the --workdir of a '
      'training run that saved at least once?'
    )
  if step is not None and step not in steps:
    kept = ', '.join(map(str, steps))
    raise UserError(f'no checkpoint of step {step} in {run_dir}; kept: {kept}')
  return steps[-1] if step is None else step


def read_meta(run_dir: str | Path, step: int) -> dict[str, Any]:
  """A checkpoint's record: position, config, versions."""
  path = folder(run_dir) / str(step) / 'meta' / 'metadata'
  return json.loads(path.read_text())


def oldest_position(run_dir: str | Path) -> int:
  """Data position of the oldest checkpoint that is kept, 0 without any."""
  steps, before = kept_steps(run_dir), None
  while steps != before:
    for step in steps:
      try:
        return read_meta(run_dir, step)['position']
      except FileNotFoundError:  # just being deleted: there is a newer one
        continue
    steps, before = kept_steps(run_dir), steps
  return 0


def restore_part(run_dir: str | Path, step: int, abstract: Any) -> Any:
  """Only the sub-trees that `abstract` (a dict of pytrees) names."""
  # As nested dicts of field names, which is how they lie on disk: Orbax's
  # partial restore trips over dataclasses without leaves (TopK).
  paths, treedef = jax.tree.flatten_with_path(abstract)
  nested: dict[str, Any] = {}
  names = [
    jax.tree_util.keystr(p, simple=True, separator='/') for p, _ in paths
  ]
  for name, (_, leaf) in zip(names, paths, strict=True):
    *parents, last = name.split('/')
    functools.reduce(lambda d, k: d.setdefault(k, {}), parents, nested)[
      last
    ] = leaf
  with ocp.PyTreeCheckpointer() as reader:
    restored = reader.restore(
      folder(run_dir) / str(step) / 'state',
      args=ocp.args.PyTreeRestore(
        item=nested,
        restore_args=ocp.checkpoint_utils.construct_restore_args(nested),
        partial_restore=True,
      ),
    )
  leaves = [
    functools.reduce(lambda d, k: d[k], name.split('/'), restored)
    for name in names
  ]
  return treedef.unflatten(leaves)


def versions() -> dict[str, str]:
  """What wrote a checkpoint."""
  found = {name: importlib.metadata.version(name) for name in _PACKAGES}
  device = jax.devices()[0]
  return found | {
    'python': platform.python_version(),
    'device': f'{device.platform}: {device.device_kind}',
  }
