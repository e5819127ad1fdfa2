"""The harvest: texts through the subject model into an activation store.

Everything is tokenised and placed first; then batch after batch goes through
the model. Tasks, or processes of one job, write different shards of one store;
whoever is killed goes on at its first missing shard.
"""

import contextlib
import functools
import sys
import time
from collections.abc import Collection
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from jax.experimental import multihost_utils
from tqdm import tqdm

from sae_jax.config import Config
from sae_jax.errors import UserError
from sae_jax.harvest.config import check_config, task_of
from sae_jax.harvest.documents import scan
from sae_jax.harvest.files import Text
from sae_jax.harvest.planning import Forward, begin, existing
from sae_jax.harvest.positions import Filter
from sae_jax.lm import model
from sae_jax.lm.subject import Subject, load_subject, weights_sha256
from sae_jax.parallel.mesh import DATA, DICT, make_mesh
from sae_jax.parallel.mesh import P as Spec
from sae_jax.store.budget import check_budget
from sae_jax.store.finish import finalize, missing_shards
from sae_jax.store.folder import disk_errors_are_users
from sae_jax.store.manifest import (
  COMPLETE,
  DTYPES,
  Manifest,
  local_root,
  read_manifest,
  shard_bytes,
)
from sae_jax.store.sequences import Sequences
from sae_jax.store.writer import StoreWriter, open_writer


class Share(NamedTuple):
  """Which shards are whose: shard s belongs to writer s % writers.

  mine: this process's number; together: the numbers of all processes that
  compute one batch together, this one among them.
  """

  mine: int
  together: range
  writers: int

  @property
  def alone(self) -> bool:
    return len(self.together) == 1

  def shards(self, manifest: Manifest, writers: Collection[int]) -> list[int]:
    every = range(len(manifest.shards))
    return [s for s in every if s % self.writers in writers]


def harvest(
  config: Config,
  subject: Subject | None = None,
  keep: Filter | None = None,
) -> Manifest | None:
  """Makes the store at config.store.path, or what is missing of this task's
  share of it; a complete store of the same harvest is left as it is.

  Args:
    config: as harvest/config.py; configs/harvest.py has examples.
    subject: the model, when it is loaded already.
    keep: a filter of the user's own for the tokens that get a row, on top of
      the config's (harvest/positions.py).

  Returns the complete manifest, None while other tasks have shards to write.
  Raises UserError for anything the user can mend; before the first row is
  written nothing exists, after that the same call goes on.
  """
  check_config(config)
  config = config.copy_and_resolve_references()  # 'auto' is decided in it
  root = local_root(config.store.path)
  text = scan(config.text)
  if manifest := reusable(root, config, text, subject):
    logging.info('store: %s is complete, nothing to do', root)
    return manifest
  share = share_of(config)
  h = config.harvest
  if h.compute_dtype == 'auto' and not share.alone:
    h.compute_dtype = 'float32'  # one process alone cannot measure
  with model_mesh(config, share):
    loaded = 'float32' if h.compute_dtype == 'auto' else h.compute_dtype
    subject = subject or load_subject(config.model, jnp.dtype(loaded))
    model.check_sites(subject.cfg, config.harvest.sites)
    if not h.beyond_context:
      check_length(h.sequence_length, subject.cfg.context)
    make = functools.partial(make_forward, subject)
    run = begin(root, config, text, subject, make, keep, share.alone)
    del subject, make  # its weights are held by `run`
    with disk_errors_are_users(root):
      fill_share(root, config, run, share)
      return finish(root)


def check_length(length: int, context: int | None) -> None:
  """UserError for sequences longer than what the model was made for."""
  if context and length > context:
    raise UserError(
      f'harvest.sequence_length: {length:,}; the model was made for '
      f'{context:,}: use no more, or --config.harvest.beyond_context=true'
    )


def reusable(
  root: Path, config: Config, text: Text, subject: Subject | None
) -> Manifest | None:
  """The manifest of a complete store of this config, text and model.

  Raises UserError when the folder holds another harvest's store. Sizes and
  checksums of the checksums are looked at, not every row.
  """
  old = existing(root, config, text, subject)
  if old is None or old.state != COMPLETE or missing_shards(root, old):
    return None
  same = subject.weights_sha256 if subject else weights_sha256(config.model)
  return old if same == old.model['weights_sha256'] else None


def share_of(config: Config) -> Share:
  """This process's share: of config.task, or of all processes of all tasks.

  A mesh that fits a process's own devices is made by each process for itself;
  a larger one must take all devices of all processes.
  """
  (i, n), processes = task_of(config), jax.process_count()
  first = i * processes
  size = config.mesh.data * config.mesh.dict
  if processes == 1 or size <= jax.local_device_count():
    mine = first + jax.process_index()
    return Share(mine, range(mine, mine + 1), n * processes)
  if size != jax.device_count():
    raise UserError(
      f'mesh: {config.mesh.data} x {config.mesh.dict} devices are neither '
      f'within the {jax.local_device_count()} of one process nor all '
      f'{jax.device_count()} of {processes}: change mesh.data or mesh.dict'
    )
  together = range(first, first + processes)
  return Share(first + jax.process_index(), together, n * processes)


@contextlib.contextmanager
def model_mesh(config: Config, share: Share):
  """The model's mesh; none for a single device."""
  data, dict_ = config.mesh.data, config.mesh.dict
  if data * dict_ == 1:
    yield
    return
  devices = jax.local_devices() if share.alone else jax.devices()
  with jax.set_mesh(make_mesh(data, dict_, devices)):
    yield


def make_forward(subject: Subject, config: Config) -> Forward:
  """tokens [b, T] -> {site: rows [b * T, width], in the stored dtype}.

  int8 rows come in float32, the store encodes them. On a mesh that spans
  processes every process gets all rows.
  """
  sites = tuple(config.harvest.sites)
  stored = jnp.float32 if config.store.dtype == 'int8' else config.store.dtype
  mesh = jax.sharding.get_mesh()
  cfg, dtype = subject.cfg, jnp.dtype(config.harvest.compute_dtype)
  params = jax.tree.map(  # in case they were loaded before that was decided
    lambda w: w.astype(dtype) if w.ndim > 1 else w, subject.params
  )
  if not mesh.empty:
    specs = model.specs(cfg, mesh.shape[DICT])
    params = jax.tree.map(
      lambda w, spec: jax.device_put(w, jax.NamedSharding(mesh, spec)),
      params,
      specs,
    )

  @jax.jit
  def run(params: Any, tokens: jax.Array) -> dict[str, jax.Array]:
    out = model.forward(
      params,
      cfg,
      tokens,
      sites=sites,
      logits=False,
      dtype=dtype,
    )
    rows = {site: x.astype(stored) for site, x in out.activations.items()}
    if not mesh.empty:  # one all-gather of what is stored, to every process
      rows = {site: jax.reshard(x, Spec()) for site, x in rows.items()}
    return {site: x.reshape(-1, x.shape[-1]) for site, x in rows.items()}

  def place(tokens: np.ndarray) -> jax.Array:
    if mesh.empty:
      return jnp.asarray(tokens)
    sharding = jax.NamedSharding(mesh, Spec(DATA, None))
    return jax.make_array_from_callback(
      tokens.shape, sharding, lambda index: tokens[index]
    )

  return lambda tokens: run(params, place(tokens))


def fill_share(root: Path, config: Config, run: Forward, share: Share) -> None:
  """Writes the missing shards of this process's share."""
  m = read_manifest(root, complete=False)
  check_budget(m, window=1, checkpoint_rows=0)
  with open_writer(root, share.shards(m, [share.mine])) as writer:
    # What all that compute together miss, seen before anyone writes.
    missing = np.isin(
      np.arange(len(m.shards)), missing_shards(root, writer.manifest)
    )
    if not share.alone:  # what the first process sees: all must agree
      missing = multihost_utils.broadcast_one_to_all(missing)
    ours = {s for s in share.shards(m, share.together) if missing[s]}
    announce(writer)
    fill(writer, run, config.harvest.batch_sequences, ours)


def announce(writer: StoreWriter) -> None:
  """Says before the first row what will be written, and where."""
  m = writer.manifest
  done = len(m.shards) - len(missing_shards(writer.root, m))
  logging.info(
    'store: %s, %s rows in %d shards (%d held out), %d there already, %d to '
    'be written here',
    writer.root, f'{m.rows:,}', len(m.shards), m.held_out_shards, done,
    len(writer.missing),
  )  # fmt: skip
  for site in m.sites:
    size = m.rows * site.width * DTYPES[site.dtype].itemsize
    logging.info(
      'site %s: %d numbers a row in %s, %s bytes',
      site.name, site.width, site.dtype, f'{size:,}',
    )  # fmt: skip
  total = sum(shard_bytes(m, s) for s in range(len(m.shards)))
  bound = f', at most {m.keep_bytes:,} at a time' if m.keep_bytes else ''
  logging.info('all rows with their tokens: %s bytes%s', f'{total:,}', bound)


def fill(
  writer: StoreWriter, run: Forward, b: int, shards: Collection[int]
) -> None:
  """Computes the rows of `shards` and writes those that are the writer's.

  Batch j is always sequences [j b, (j + 1) b), the last one padded with
  repetitions, so that a row's bits do not depend on where a run begins. The
  next batch is on the device while the last one is written.
  """
  starts = writer.sequences.starts
  batches = batches_needed(writer.manifest, starts, b, shards)
  if not batches:
    return
  total = sum(writer.manifest.shards[s].rows for s in writer.missing)
  compute = lambda j: run(batch(writer.sequences, j, b))
  estimate(compute, batches, total)
  waited = wrote = 0.0
  began, pending = time.perf_counter(), None
  # Where there is no terminal a line now and then must do.
  interval = 0.5 if sys.stderr.isatty() else 15
  with tqdm(
    total=total, desc='harvest', unit=' rows', unit_scale=True,
    mininterval=interval,
  ) as bar:  # fmt: skip
    for j in [*batches, None]:
      ahead = None if j is None else (j, compute(j))
      if pending:
        tick = time.perf_counter()
        i, computed = pending
        rows = jax.device_get(computed)
        waited -= tick - (tick := time.perf_counter())
        first, last = starts[i * b], starts[min((i + 1) * b, len(starts) - 1)]
        keep = writer.sequences.keep(i * b, min((i + 1) * b, len(starts) - 1))
        kept = np.flatnonzero(keep)[: last - first]
        picked = {site: values[kept] for site, values in rows.items()}
        bar.update(writer.write(int(first), picked))
        wrote += time.perf_counter() - tick
      pending = ahead
  seconds = time.perf_counter() - began
  logging.info(
    'harvest: %s rows in %.1f s, %.0f rows/s; waited %.1f s for the model, '
    'wrote and checked for %.1f s',
    f'{total:,}', seconds, total / max(seconds, 1e-9), waited, wrote,
  )  # fmt: skip


def estimate(compute, batches: list[int], rows: int) -> None:
  """Says how long the rows will take: the first batch, compiled, once more."""
  jax.block_until_ready(compute(batches[0]))
  began = time.perf_counter()
  jax.block_until_ready(compute(batches[0]))
  seconds = (time.perf_counter() - began) * len(batches)
  logging.info(
    'harvest: %s rows in %d batches, about %s at %.0f rows/s',
    f'{rows:,}', len(batches), _duration(seconds), rows / seconds,
  )  # fmt: skip


def _duration(seconds: float) -> str:
  hours, minutes = seconds / 3600, seconds / 60
  if hours >= 2:
    return f'{hours:.1f} hours'
  return f'{minutes:.0f} minutes' if minutes >= 2 else f'{seconds:.0f} s'


def batches_needed(
  manifest: Manifest, starts: np.ndarray, b: int, shards: Collection[int]
) -> list[int]:
  """Batches that hold a row of one of the shards, ascending."""
  size, count = manifest.rows_per_shard, len(starts) - 1
  needed: list[int] = []
  for shard in sorted(shards):
    first = shard * size
    last = first + manifest.shards[shard].rows
    # Sequences that hold the shard's first and last row.
    begin = int(np.searchsorted(starts, first, side='right')) - 1
    end = int(np.searchsorted(starts, last, side='left'))
    needed += range(begin // b, -(-min(end, count) // b))
  return sorted(set(needed))


def batch(sequences: Sequences, j: int, b: int) -> np.ndarray:
  """Sequences [j b, (j + 1) b), repeated to fill a batch: any would do, the
  rows of repetitions are dropped."""
  last = len(sequences.starts) - 1
  tokens = sequences.tokens(j * b, min((j + 1) * b, last))
  return np.resize(tokens, (b, tokens.shape[1]))


def finish(root: Path) -> Manifest | None:
  """Completes the store if this was the last shard; None if it was not."""
  manifest = read_manifest(root, complete=False)
  if missing := missing_shards(root, manifest):
    logging.info(
      'store: this share is done; %d shards of other tasks are missing (%d is '
      'the first)', len(missing), missing[0],
    )  # fmt: skip
    return None
  manifest = finalize(root)
  logging.info('store: %s is complete', root)
  return manifest
