"""Rows of the store onto the devices: each process reads what it needs."""

import collections
import math
import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import jax
import numpy as np
from absl import logging
from jax.sharding import NamedSharding

from sae_jax.config import Config
from sae_jax.errors import UserError
from sae_jax.parallel import processes
from sae_jax.parallel.mesh import DATA
from sae_jax.parallel.mesh import P as Spec
from sae_jax.store import reader
from sae_jax.store.batches import BatchSource
from sae_jax.store.manifest import local_root, read_manifest
from sae_jax.train import growing
from sae_jax.train.config import member_configs, stream_seed
from sae_jax.train.progress import Progress

AHEAD = 2  # batches that lie on the devices before their step
LARGE = 1e4  # |number| of a row beyond which bfloat16 deserves a word


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
    parts=parts, of=of, max_norm=c.max_norm,
    check_sizes=config.train.on_bad_block == 'stop',
    multiple_of=config.mesh.data * config.train.micro_batches,
  )  # fmt: skip
  if source.site.width != config.sae.d_in:
    raise UserError(
      f'config.sae.d_in={config.sae.d_in}, but site {c.site} of the store '
      f'{c.path} is {source.site.width} wide: set '
      f'--config.sae.d_in={source.site.width}'
    )
  growing.check(config, source, source.manifest)
  return source


def warn_of_size(config: Config, source: BatchSource) -> None:
  """One line when rows are large for products in bfloat16.

  The normaliser shards must be there (UserError).
  """
  c, site = config.train, source.site.name
  if c.compute_dtype != 'bfloat16' or not processes.is_first():
    return
  found = reader.sizes(source.root, site)
  if found.largest > LARGE:
    logging.warning(
      'config.train.compute_dtype=bfloat16: numbers of %s in %s reach %s%.3g '
      '(largest mean of a column %.3g, root mean square of all %.3g), and each '
      'is rounded by up to 1/256 of itself: compare eval/fvu with a run in '
      'float32',
      site, source.root, '' if found.exact else 'at least ', found.largest,
      found.mean, found.rms,
    )  # fmt: skip


def warn_of_norms(source: BatchSource) -> None:
  """One line when rows have many times the others' norm, or are left out; the
  normaliser shards must be there (UserError)."""
  root, site = source.root, source.site.name
  if source.bound:
    logging.info('store: rows beyond a norm of %.4g are left out', source.bound)
  elif processes.is_first():
    try:
      found = reader.outliers(root, site)
    except UserError as error:  # a bad block: train.on_bad_block may skip it
      logging.warning('norms of rows are not looked at: %s', error)
      return
    largest = reader.sizes(root, site).largest
    if found['share'] > 0.01 or largest > found['limit']:
      said = f'{site}: {found["said"]}, numbers reach {largest:.3g}'
      logging.warning('store: %s: %s', said, reader.ADVICE)


def held_out_rows(config: Config, source: BatchSource) -> jax.Array | None:
  """The first config.train.eval_size held-out rows [n@data, D], or as many as
  there are; None when nothing needs them, or, without evaluations, there are
  none."""
  runs = member_configs(config) or [config]
  used = any(run.act.name == 'batchtopk' for run in runs)
  if not config.train.eval_rows and not used:
    return None
  c, taken = config.store, []
  unit, size = config.mesh.data, config.train.eval_size
  for rows, _ in reader.held_out(c.path, c.site, source.bound):
    taken.append(rows)
    if sum(map(len, taken)) >= size:
      break
  count = min(sum(map(len, taken)), size) // unit * unit
  if not count and not config.train.eval_rows:
    return None
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


class Ahead:
  """The next batches on the devices, put there while steps run.

  A thread pulls the host's batches in order and waits until each is on the
  devices: besides the batches in use AHEAD lie there, no more. What goes wrong
  in it comes out of `next` at the batch it belongs to. Nothing is read before
  the first `next`. close() returns when the thread has ended: where that may
  be reading what is not written yet, `source.close()` comes first.

  Plain device_put is right here: XLA's GPU client copies to its own pinned
  buffer on the way, so putting to `pinned_host` before would copy twice.
  """

  def __init__(self, batches: Any, source: BatchSource):
    self._batches, self._source = batches, source
    self._mesh = jax.sharding.get_mesh()  # a thread has none of its own
    self._thread = ThreadPoolExecutor(1, 'input')
    self._coming: collections.deque[Future[jax.Array]] = collections.deque()

  def next(self) -> jax.Array:
    """The next rows [B@data, D]."""
    while len(self._coming) <= AHEAD:
      self._coming.append(self._thread.submit(self._pull))
    return self._coming.popleft().result()

  def _pull(self) -> jax.Array:
    rows, source = next(self._batches), self._source
    # Each process puts its own parts: no collective, so a thread may.
    with jax.set_mesh(self._mesh), jax.transfer_guard('disallow'):
      x = put_rows(rows, source.parts, source.batch_rows)
    return x.block_until_ready()

  def close(self) -> None:
    """Ends the thread, drops what lies ready and closes the host's batches."""
    self._thread.shutdown(cancel_futures=True)
    self._coming.clear()
    self._batches.close()


def next_batch(batches: Ahead, progress: Progress) -> jax.Array:
  """The next rows [B@data, D] on the devices; the wait is metered."""
  began = time.perf_counter()
  x = batches.next()
  progress.waited += time.perf_counter() - began
  return x
