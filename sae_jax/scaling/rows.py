"""The type of a store's rows: on the disk, and as devices receive them."""

from typing import NamedTuple

import numpy as np

from sae_jax.config import Config
from sae_jax.store.manifest import DTYPES, FILE, Site, local_root, read_manifest
from sae_jax.store.plan import check_dtype


class Rows(NamedTuple):
  """Rows are sent as they are read; the step makes float32 of them."""

  stored: str  # 'float32', 'bfloat16' or 'int8'
  source: str  # how it is known

  @property
  def dtype(self) -> np.dtype:
    """On the devices: int8 is decoded to float32 where it is read."""
    return Site('', 0, self.stored).read_dtype

  def on_disk(self, width: int) -> int:
    """Bytes of one row; of int8 with its float32 scale."""
    scale = 4 if self.stored == 'int8' else 0
    return width * DTYPES[self.stored].itemsize + scale


# What configs/harvest.py writes.
ASSUMED = Rows('bfloat16', 'assumed, else --store_dtype')


def rows_of(config: Config, dtype: str | None) -> Rows:
  """`dtype` if given, else what config.store says if it is here, else ASSUMED.

  Raises UserError for an unknown type, or a store that cannot be read.
  """
  if dtype:
    check_dtype('--store_dtype', dtype)
    return Rows(dtype, 'by --store_dtype')
  path = config.store.path
  if not path or not (local_root(path) / FILE).exists():
    return ASSUMED
  site = read_manifest(path, complete=False).site(config.store.site)
  return Rows(site.dtype, f'of the store {path}')
