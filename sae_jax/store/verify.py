"""Reads a whole store and says what in it cannot be trusted.

Readers check what they read, when they read it; this finds everything at once.
"""

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from sae_jax.errors import UserError
from sae_jax.store.files import ShardFile
from sae_jax.store.manifest import local_root, parts, read_manifest


def problems(root: str | Path) -> Iterator[str]:
  """One line for every file that is missing, cut off or damaged.

  A line names the first bad block of its file. Raises UserError where there is
  no complete store.
  """
  folder = local_root(root)
  manifest = read_manifest(folder)
  for shard in range(len(manifest.shards)):
    for part in parts(manifest):
      try:
        file = ShardFile(folder, manifest, part, shard)
        out = np.empty((file.block_rows, file.width), file.dtype)
        for block in range(file.blocks):
          file.read_into(block, out[: file.block_shape(block)[0]])
      except UserError as error:
        yield str(error)
