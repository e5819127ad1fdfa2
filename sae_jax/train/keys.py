"""Dotted keys of configs: read flat, set by name, told from typing errors."""

import difflib
from collections.abc import Mapping, Sequence
from typing import Any

from ml_collections import ConfigDict

from sae_jax.config import Config
from sae_jax.errors import UserError


def set_keys(config: Config, changes: Mapping[str, Any], what: str) -> None:
  """Sets dotted keys. Raises UserError, beginning with `what`, for one that is
  not there and for a value of another type."""
  flat = flatten(config.to_dict())
  for key, value in changes.items():
    if key not in flat:
      near = difflib.get_close_matches(key, flat, 1, 0.3) or ['optim.lr']
      raise UserError(f'{what}.{key}: no such key, did you mean {near[0]}?')
    # ConfigDict takes None for anything, and True for 1.
    odd = isinstance(value, bool) != isinstance(flat[key], bool)
    if value is None or odd:
      raise UserError(
        f'{what}.{key}={value!r}: must be a {type(flat[key]).__name__}'
      )
    if type(flat[key]) is int and type(value) is float and value.is_integer():
      value = int(value)  # 1e6 for an integer
    *path, last = key.split('.')
    node = config
    for part in path:
      node = node[part]
    try:
      node[last] = value
    except TypeError:
      raise UserError(
        f'{what}.{key}={value!r}: must be a {type(flat[key]).__name__}'
      ) from None


def flatten(tree: dict, prefix: str = '') -> dict:
  """Nested dicts as one dict with dotted keys; `members` by their indices."""
  flat = {}
  for key, value in tree.items():
    if key == 'members' and not prefix:
      flat[key] = len(value)
      for i, member in enumerate(value):
        flat |= flatten(overrides_of(member), f'members[{i}].')
    elif isinstance(value, dict):
      flat |= flatten(value, f'{prefix}{key}.')
    else:
      flat[f'{prefix}{key}'] = value
  return flat


def overrides_of(member: Any) -> dict[str, Any]:
  """One of config.members as a dict of dotted keys."""
  if isinstance(member, ConfigDict):
    member = member.to_dict()
  if not isinstance(member, dict):
    raise UserError(
      f'config.members: {member!r} is not a dict of overrides, such as '
      "{'optim.lr': 1e-3}"
    )
  return flatten(member)


def known(what: str, name: str, names: Sequence[str]) -> None:
  """Raises UserError, with the nearest right name, unless name is known."""
  if name not in names:
    near = difflib.get_close_matches(name, names, 1, 0.3) or list(names)[:1]
    raise UserError(
      f'{what}={name!r} is not one of {", ".join(names)}: did you mean '
      f'{near[0]!r}?'
    )
