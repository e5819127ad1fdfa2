"""The run folder (--workdir): its config, and the SAE that came out of it."""

import json
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from sae_jax.config import Config
from sae_jax.errors import UserError
from sae_jax.models.sae import SAE
from sae_jax.paths import write_atomic
from sae_jax.train import checkpoints
from sae_jax.train.config import flatten
from sae_jax.train.state import State, abstract_state, final_sae

# Keys that may change between starts without asking: they alter neither the
# arrays nor the trajectory.
_FREE = (
  'mesh.', 'train.log_rows', 'train.save_rows', 'train.keep', 'train.eval_',
  'train.resume', 'store.path', 'store.threads',
)  # fmt: skip
# Keys that give the arrays their meaning or the batches their order: no
# running state fits other values.
_FIXED = ('seed', 'sae.', 'act.name', 'act.k', 'act.log_theta', 'store.',
          'train.batch_rows', 'optim.ema', 'optim.b1')  # fmt: skip


def open_run(run_dir: str | Path, config: Config) -> None:
  """Claims a run folder for `config`, or joins the run that lies there.

  A folder without config.json gets one. With the same config the run goes
  on. Another config is a UserError that names the keys, unless
  config.train.resume allows the changed values and the state still fits.
  """
  path = Path(run_dir) / 'config.json'
  new = config.to_dict()
  if path.exists():
    changed = changed_keys(read_config(run_dir).to_dict(), new)
    fixed = [key for key in changed if key.startswith(_FIXED)]
    names = ', '.join(f'{k} {a!r} -> {b!r}' for k, (a, b) in changed.items())
    if fixed or (changed and not config.train.resume):
      cure = (
        f'{", ".join(fixed)} cannot change within a run, take another folder'
        if fixed
        else 'add --config.train.resume to go on with the new values, or '
        'take another folder'
      )
      raise UserError(
        f'--workdir={run_dir} holds a run with another config ({names}): {cure}'
      )
  write_atomic(path, json.dumps(new, indent=2) + '\n')


def changed_keys(old: dict, new: dict) -> dict[str, tuple[Any, Any]]:
  """{dotted key: (old, new)} of the keys that matter and differ."""
  a, b = flatten(old), flatten(new)
  return {
    key: (a.get(key), b.get(key))
    for key in sorted(a.keys() | b.keys())
    if a.get(key) != b.get(key) and not key.startswith(_FREE)
  }


def read_config(run_dir: str | Path) -> Config:
  """The config of a run; UserError when the folder holds none."""
  path = Path(run_dir) / 'config.json'
  try:
    return ConfigDict(json.loads(path.read_text()))
  except FileNotFoundError:
    raise UserError(
      f'{path} does not exist: give the --workdir of a training run'
    ) from None
  except json.JSONDecodeError as error:
    raise UserError(f'{path} is not JSON ({error}): restore it') from None


def load(run_dir: str | Path, step: int | None = None) -> SAE:
  """The trained SAE of a run folder, in raw units.

  Takes the newest complete checkpoint, or the one of `step`. The arrays come
  sharded under a mesh (`jax.set_mesh`), on the first device without one.
  Raises UserError when there is no run or no checkpoint.
  """
  config = read_config(run_dir)
  if step is None:
    step = checkpoints.latest_step(run_dir)
  abstract: State = abstract_state(config)
  parts = {'sae': abstract.sae, 'ema': abstract.ema}
  wanted = {k: v for k, v in parts.items() if v is not None}
  state = checkpoints.restore_part(run_dir, step, wanted)
  return final_sae(state['sae'], state.get('ema'))
