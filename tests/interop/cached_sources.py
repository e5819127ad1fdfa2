"""Small folders of activations as other programs write them.

As a program: `python cached_sources.py DIE FROM SOURCE STORE` imports; DIE is
'never', or 'rename:N' / 'write:N' to kill -9 itself there.
"""

import json
import os
import signal
import sys
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from sae_jax.interop import llamascopium, npy, saelens, source
from sae_jax.interop.importing import Options, import_rows
from sae_jax.store.files import ShardFile, site_file
from sae_jax.store.manifest import TOKENS
from sae_jax.store.writer import StoreWriter

HOOK, OTHER = 'blocks.1.hook_resid_post', 'blocks.0.hook_mlp_out'
SITE, SECOND = 'layer_1.resid_post', 'layer_0.mlp_out'
Q, T, D = 30, 8, 6
SIZES = dict(rows_per_shard=64, rows_per_block=16)


def activations(dtype=np.float32, q=Q, t=T, d=D, seed=0):
  """(rows [q, t, d], tokens [q, t])."""
  rng = np.random.default_rng(seed)
  rows = rng.normal(1, 2, (q, t, d)).astype(dtype)
  return rows, rng.integers(3, 50, (q, t)).astype(np.int32)


def write_saelens(root, hooks, tokens, files=3):
  """A folder as CacheActivationsRunner consolidates it."""
  import datasets

  features = {
    name: datasets.Array2D(shape=rows.shape[1:], dtype=rows.dtype.name)
    for name, rows in hooks.items()
  }
  columns = dict(hooks)
  if tokens is not None:
    features['token_ids'] = datasets.Sequence(
      datasets.Value('int32'), length=tokens.shape[1]
    )
    columns['token_ids'] = tokens
  data = datasets.Dataset.from_dict(
    columns, features=datasets.Features(features)
  )
  data.save_to_disk(str(root), num_shards=files)
  return root


def write_llamascopium(root, hooks, tokens, mask=None, chunk=7, shard=None):
  """Chunks as ActivationWriter names and fills them, safetensors."""
  for hook, rows in hooks.items():
    folder = Path(root) / hook
    folder.mkdir(parents=True, exist_ok=True)
    for i, at in enumerate(range(0, len(rows), chunk)):
      part = slice(at, at + chunk)
      tensors = {
        'activation': np.ascontiguousarray(rows[part]),
        'tokens': tokens[part].astype(np.int64),
      }
      if mask is not None:
        tensors['mask'] = mask[part].astype(np.int32)
        tensors['attention_mask'] = tensors['mask']
      name = (
        f'chunk-{i:08d}' if shard is None else f'shard-{shard}-chunk-{i:08d}'
      )
      save_file(tensors, folder / f'{name}.safetensors')
      meta = [{'model_name': 'pythia-70m'}] * len(rows[part])
      (folder / f'{name}.meta.json').write_text(json.dumps(meta))
  return Path(root)


def write_npy(root, rows, tokens, cuts=(50, 60)):
  """Rows [n, d] over files part-0.npy, ..., and tokens.npy."""
  root = Path(root)
  root.mkdir(parents=True, exist_ok=True)
  for i, part in enumerate(np.split(rows, cuts)):
    np.save(root / f'part-{i * 5}.npy', part)  # part-10 comes after part-5
  np.save(root / 'tokens.npy', tokens)
  return root


def store_rows(root, manifest, site=SITE):
  """(tokens [rows, 3], rows [rows, d]) of a store, all shards, file order."""
  shards = range(len(manifest.shards))
  tokens = [ShardFile(root, manifest, TOKENS, s).read_all() for s in shards]
  rows = [site_file(root, manifest, site, s).read_all() for s in shards]
  return np.concatenate(tokens), np.concatenate(rows)


def contents(root):
  return {
    path.relative_to(root).as_posix(): path.read_bytes()
    for path in Path(root).rglob('*')
    if path.is_file()
  }


def die(where):
  """Makes this process kill itself at the n-th rename or written piece."""
  kind, n = where.split(':')
  owner, name = (os, 'replace') if kind == 'rename' else (StoreWriter, 'write')
  real, left = getattr(owner, name), int(n)

  def counted(*args):
    nonlocal left
    left -= 1
    if left < 0:
      os.kill(os.getpid(), signal.SIGKILL)
    return real(*args)

  setattr(owner, name, counted)


def main(where, importer, folder, store):
  source.PIECE_BYTES = 5 * T * D * 4
  if where != 'never':
    die(where)
  module = {'saelens': saelens, 'llamascopium': llamascopium, 'npy': npy}
  opened = module[importer].open_source(Path(folder), {'': SITE})
  import_rows(store, importer, opened, Options(dtype='int8', **SIZES))


if __name__ == '__main__':
  main(*sys.argv[1:])
