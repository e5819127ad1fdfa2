"""The type of configs: ml_collections' ConfigDict, as type checkers must see
it, whose attributes may have any type."""

from typing import Any, TypeAlias

from ml_collections import ConfigDict

Config: TypeAlias = Any
_set = ConfigDict.__setitem__


def _set_whole(self, key, value):  # 1e6 may stand for an integer
  whole = type(value) is float and value.is_integer()
  _set(self, key, int(value) if whole and type(self.get(key)) is int else value)


ConfigDict.__setitem__ = _set_whole
