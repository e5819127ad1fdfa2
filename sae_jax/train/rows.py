"""Rows of the store onto the devices: each process reads what it needs."""

import math
import time
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding

from sae_jax.config import Config
from sae_jax.errors import UserError
from sae_jax.parallel.mesh import DATA
from sae_jax.parallel.mesh import P as Spec
from sae_jax.store import reader
from sae_jax.store.batches import BatchSource
from sae_jax.store.manifest import local_root, read_manifest
from sae_jax.train import growing
from sae_jax.train.config import stream_seed
from sae_jax.train.progress import Progress


def open_source(
  config: Config, parts: Sequence[int] = (0,), of: int = 1
) -> BatchSource:
  """The store's batches; UserError unless store and config fit together.

  parts: of a batch cut into `of`, those that this process needs. It reads more
  where a part is not made of whole blocks.
  """
  c, batch = config.store, config.train.batch_rows
  if of > 1:
    manifest = read_manifest(local_root(c.path), complete=False)
    readable = math.gcd(of, batch // manifest.rows_per_block)
    parts, of = sorted({p * readable // of for p in parts}), readable
  source = BatchSource(
    c.path, c.site, batch, seed=stream_seed(config), window=c.window,
    parts=parts, of=of,
    check_sizes=config.train.on_bad_block == 'stop',
  )  # fmt: skip
  if source.site.width != config.sae.d_in:
    raise UserError(
      f'config.sae.d_in={config.sae.d_in}, but site {c.site} of the store '
      f'{c.path} is {source.site.width} wide: set '
      f'--config.sae.d_in={source.site.width}'
    )
  growing.check(config, source, source.manifest)
  return source


def held_out_rows(config: Config) -> jax.Array | None:
  """The first config.train.eval_size held-out rows [n@data, D], or as many as
  there are; None when no evaluation is asked for."""
  if not config.train.eval_rows:
    return None
  c, taken = config.store, []
  unit, size = config.mesh.data, config.train.eval_size
  for rows, _ in reader.held_out(c.path, c.site):
    taken.append(rows)
    if sum(map(len, taken)) >= size:
      break
  count = min(sum(map(len, taken)), size) // unit * unit
  if not count:
    raise UserError(
      f'config.train.eval_rows={config.train.eval_rows} asks for evaluations, '
      f'but there are fewer than config.mesh.data={unit} held-out rows in '
      f'{c.path} or config.train.eval_size={size}: set it to 0, or harvest '
      'with store.held_out_shards=1'
    )
  return put_rows(np.concatenate(taken)[:count], [0], count)


def put_rows(rows: np.ndarray, parts: Sequence[int], total: int) -> jax.Array:
  """[total@data, D] on the devices, of which `rows` are these parts, one after
  the other: at least what this process's devices have."""
  sharding = NamedSharding(jax.sharding.get_mesh(), Spec(DATA, None))
  shape, taken = (total, rows.shape[1]), []
  places: Any = sharding.addressable_devices_indices_map(shape)
  for device, index in places.items():
    start, end, _ = index[0].indices(total)
    there = part_rows(rows, parts, start, end)
    taken.append(jax.device_put(there, device))
  return jax.make_array_from_single_device_arrays(shape, sharding, taken)


def part_rows(
  rows: np.ndarray, parts: Sequence[int], start: int, end: int
) -> np.ndarray:
  """The rows [start, end) of a batch of which `rows` are some equal parts, one
  after the other; they lie within one of them."""
  size = len(rows) // len(parts)
  first = start + (parts.index(start // size) - start // size) * size
  return rows[first : first + end - start]


def next_batch(
  batches: Iterator[np.ndarray], source: BatchSource, progress: Progress
) -> jax.Array:
  """The next rows [B@data, D] on the devices; the wait is metered."""
  began = time.perf_counter()
  rows = next(batches)
  x = put_rows(rows, source.parts, source.batch_rows)
  progress.waited += time.perf_counter() - began
  return x
