"""The type of configs: ml_collections' ConfigDict, as type checkers must see
it, whose attributes may have any type."""

from typing import Any, TypeAlias

from ml_collections import ConfigDict

Config: TypeAlias = Any
_set = ConfigDict.__setitem__


def _set_whole(self, key, value) -> None:
  """Takes 1e6 for an integer, in config files, members and sweeps."""
  if type(value) is float and value.is_integer():
    value = int(value) if type(self.get(key)) is int else value
  _set(self, key, value)


ConfigDict.__setitem__ = _set_whole
