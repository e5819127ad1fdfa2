"""What it takes to harvest a store again: its config, its model, its text."""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from sae_jax.config import Config
from sae_jax.errors import UserError
from sae_jax.harvest.config import base_config
from sae_jax.lm.subject import Subject, load_subject, weights_sha256
from sae_jax.store.manifest import Manifest


def from_harvest(manifest: Manifest) -> bool:
  """Whether a store is a harvest's, which can be done again."""
  config = manifest.config
  blocks = [config.get(key) or {} for key in ('model', 'text', 'harvest')]
  return bool(blocks[0].get('path') and blocks[1].get('path') and blocks[2])


def stored_config(
  root: Path, manifest: Manifest, model_path: str = '', text_path: str = ''
) -> Config:
  """The config of the harvest that made a store, to do it again there.

  Keys that came later have their defaults. Raises UserError for a key that
  this program does not know.
  """
  config = base_config()
  _update(config, manifest.config, '')
  config.store.path = str(root)
  config.store.keep_bytes = manifest.keep_bytes
  config.store.trainers = manifest.trainers
  config.model.path = model_path or config.model.path
  config.text.path = text_path or config.text.path
  return config


def _update(config: Config, values: dict[str, Any], prefix: str) -> None:
  for key, value in values.items():
    if key not in config:
      raise UserError(
        f'store.path: the store was harvested with {prefix}{key}, which this '
        'program does not know: update sae_jax'
      )
    if isinstance(value, dict):
      _update(config[key], value, f'{prefix}{key}.')
    else:
      config[key] = tuple(value) if isinstance(value, list) else value


def find_subject(
  config: Config, manifest: Manifest, subject: Subject | None = None
) -> Subject:
  """The store's own model, loaded; UserError when it is not to be had."""
  path, said = config.model.path, manifest.model
  here = subject.weights_sha256 if subject else weights_sha256(config.model)
  if here and here != said['weights_sha256']:
    raise UserError(
      f'model_path: {path!r} is another model than the one the store was '
      f'harvested from, {said["name"]!r} (sha256 {said["weights_sha256"][:8]}, '
      f'here {here[:8]}): give --model_path'
    )
  if subject is None and here is None:
    raise UserError(
      f'model_path: {path!r}, the model of the store, is not here: give '
      '--model_path'
    )
  dtype = jnp.dtype(config.harvest.compute_dtype)
  return subject or load_subject(config.model, dtype)


def devices_for(config: Config) -> str:
  """Takes the mesh out of a config that this machine has not the devices for;
  returns a line that says so, or ''."""
  size, there = config.mesh.data * config.mesh.dict, jax.local_device_count()
  if size <= there:
    return ''
  line = (
    f'harvested on a mesh of {config.mesh.data} x {config.mesh.dict} devices, '
    f'computed without one: {there} here'
  )
  config.mesh.data = config.mesh.dict = 1
  return line


def origin(manifest: Manifest) -> str:
  """Where the rows of a store that is no harvest's come from, in words."""
  for block in (manifest.config, manifest.text, manifest.model):
    if path := _path_in(block):
      return repr(path)
  return repr(manifest.model.get('name', 'arrays'))


def _path_in(block: dict[str, Any]) -> str:
  """The first value of a key `path` in nested dicts, '' for none."""
  for key, value in block.items():
    if key == 'path' and isinstance(value, str) and value:
      return value
    if isinstance(value, dict) and (found := _path_in(value)):
      return found
  return ''
