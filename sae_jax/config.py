"""The type of configs: ml_collections' ConfigDict, as type checkers must see
it, whose attributes may have any type."""

from typing import Any, TypeAlias

Config: TypeAlias = Any
