"""What a harvest decides before its first row, and what it finds decided.

One process packs the text and writes the plan; the others of the same harvest
wait for it and take it as it is.
"""

import contextlib
import dataclasses
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import jax
import numpy as np
import tokenizers
from absl import logging
from jax.experimental import multihost_utils

from sae_jax.config import Config
from sae_jax.errors import UserError
from sae_jax.harvest.arithmetic import faster, speeds
from sae_jax.harvest.config import recorded, sizes
from sae_jax.harvest.files import Text
from sae_jax.harvest.packing import pack
from sae_jax.harvest.positions import Filter, choose
from sae_jax.lm.model import site_width
from sae_jax.lm.subject import Subject
from sae_jax.store import quantise
from sae_jax.store.create import create, new_folder
from sae_jax.store.finish import removed_shards
from sae_jax.store.folder import another_harvest
from sae_jax.store.manifest import (
  FILE,
  Manifest,
  Site,
  read_manifest,
  write_manifest,
)
from sae_jax.store.plan import differing_keys, least_rows, plan
from sae_jax.store.sequences import Spool, spool
from sae_jax.store.statistics import Moments, merge_all, moments, norms, within

# Tokens run through the model to find the median norm, and the columns' offsets
# and scales of int8 rows: the standard deviation is then known to a percent.
_SAMPLE = 16_384

R = TypeVar('R')
# tokens [b, T] -> {site: rows [b * T, width]}
Forward = Callable[[np.ndarray], dict[str, jax.Array]]


class Packed(NamedTuple):
  """The text as sequences [Q, T] int32 and keep (packed bits), on the disk.

  places: where documents begin, int64 [m, 2]; rows and documents in all;
  policy: what the manifest says of the tokens without a row.
  """

  sequences: np.ndarray
  keep: np.ndarray
  places: np.ndarray
  rows: int
  documents: int
  policy: dict[str, Any]


def begin(
  root: Path,
  config: Config,
  text: Text,
  subject: Subject,
  make: Callable[[Config], Forward],
  keep: Filter | None,
  alone: bool,
) -> Forward:
  """Leaves the plan of the store at `root`, made now or found there, and in
  `config` the compute_dtype that the plan has; returns make(config).

  alone: whether this process acts alone; else all processes call this
  together, and the first one reads and writes.

  Raises UserError when the folder holds another harvest's store, and for text
  that gives too few rows.
  """
  with contextlib.ExitStack() as stack:

    def pack_text() -> Packed | None:
      """The packed text; None when there is a plan already."""
      stack.enter_context(new_folder(root))
      if old := existing(root, config, text, subject):
        with_budget(root, old, config)
        return None
      if config.harvest.compute_dtype == 'auto':
        config.harvest.compute_dtype = faster(speeds(config, make))
      length = config.harvest.sequence_length
      pieces = stack.enter_context(spool(root, length))
      return fill_spool(pieces, config, text, subject, keep)

    packed, due = first_process(pack_text, alone)
    run = make(config)
    if not due:
      return run
    sites = [
      Site(site, site_width(subject.cfg, site), config.store.dtype)
      for site in config.harvest.sites
    ]
    if config.store.dtype == 'int8' or config.harvest.max_norm:
      sites = measured(sites, config, run, packed, alone)  # by all together
    first_process(
      lambda: packed and write_plan(root, config, text, subject, sites, packed),
      alone,
    )
    return run


def first_process(
  work: Callable[[], R | None], alone: bool
) -> tuple[R | None, bool]:
  """What `work` gives on the first process, and whether it gave anything.

  Others get (None, the same). Its UserError ends all of them.
  """
  result, error = None, None
  if alone or jax.process_index() == 0:
    try:
      result = work()
    except UserError as mistake:
      error = mistake
  if alone and error is None:
    return result, result is not None
  state = np.array([error is not None, result is not None])
  failed, some = state if alone else multihost_utils.broadcast_one_to_all(state)
  if error is not None:
    raise error
  if failed:
    raise UserError('process 0 of this job could not plan the store: see there')
  return result, bool(some)


def existing(
  root: Path, config: Config, text: Text, subject: Subject | None
) -> Manifest | None:
  """The manifest in the folder, if there is one.

  A compute_dtype 'auto' in `config` becomes the plan's. Raises UserError when
  it is of another config, text or model.
  """
  if not (root / FILE).exists():
    return None
  old = read_manifest(root, complete=False)
  if config.harvest.compute_dtype == 'auto' and 'harvest' in old.config:
    config.harvest.compute_dtype = old.config['harvest']['compute_dtype']
  keys = differing_keys(old.config, recorded(config))
  if old.text.get('sha256') != text.sha256:
    keys.append('text (sha256)')
  if subject is not None:
    model = identity(subject)
    keys += [f'model ({key})' for key in differing_keys(old.model, model)]
  if keys:
    raise another_harvest(root, keys)
  return old


def with_budget(root: Path, manifest: Manifest, config: Config) -> None:
  """Lets a harvest that goes on have another budget than when it began."""
  c, m = config.store, manifest
  if (m.keep_bytes, m.trainers) == (c.keep_bytes, c.trainers):
    return
  if not c.keep_bytes and removed_shards(m):
    raise UserError(
      f'store.keep_bytes: 0, but shards of {root} were removed under its '
      f'budget already: give --config.store.keep_bytes={m.keep_bytes}'
    )
  logging.info(
    'store: keep_bytes %d -> %d, trainers %d -> %d, for all tasks from their '
    'next start', m.keep_bytes, c.keep_bytes, m.trainers, c.trainers,
  )  # fmt: skip
  budget = dict(keep_bytes=c.keep_bytes, trainers=c.trainers)
  write_manifest(root, dataclasses.replace(m, **budget))


def fill_spool(
  pieces: Spool,
  config: Config,
  text: Text,
  subject: Subject,
  keep: Filter | None,
) -> Packed:
  """Packs the text into files. UserError when there are too few rows."""
  filter_, policy = choose(
    config.harvest,
    bos=subject.bos,
    eos=subject.eos,
    special=subject.special,
    vocab=subject.cfg.vocab,
    extra=keep,
  )
  piece, sequences = None, 0
  for piece in pack(
    text,
    subject.tokenizer,
    bos=subject.bos,
    separator=subject.eos,
    length=config.harvest.sequence_length,
    rows=config.harvest.rows,
    seed=config.harvest.seed,
    keep=filter_,
    chat_template=subject.chat_template,
  ):
    pieces.add(piece.sequences, piece.keep, piece.documents)
    sequences += len(piece.sequences)
  rows = piece.rows_so_far if piece else 0
  needed = config.harvest.rows or least_rows(**sizes(config))
  if rows < needed:
    size = text.bytes * needed / max(rows, 1)
    key = 'harvest.rows' if config.harvest.rows else 'store.rows_per_shard'
    raise UserError(
      f'text.path: {text.bytes:,} bytes of text give {rows:,} rows, '
      f'{needed:,} are needed: about {size:,.0f} bytes of text, or a lower '
      f'{key}'
    )
  documents = piece.documents_so_far if piece else 0
  logging.info(
    'text: %s of %s documents, %s sequences of %d tokens',
    f'{documents:,}', f'{text.documents:,}', f'{sequences:,}',
    config.harvest.sequence_length,
  )  # fmt: skip
  return Packed(*pieces.arrays(), pieces.documents(), rows, documents, policy)


def write_plan(
  root: Path,
  config: Config,
  text: Text,
  subject: Subject,
  sites: list[Site],
  packed: Packed,
) -> Manifest:
  """Writes the manifest of the rows to come, and what they are made from."""
  manifest = plan(
    packed.sequences,
    packed.keep,
    sites,
    rows=packed.rows,
    seed=config.harvest.seed,
    model=identity(subject),
    text={
      'sha256': text.sha256,
      'files': text.files,
      'bytes': text.bytes,
      'documents': text.documents,
      'documents_read': packed.documents,
    },
    policy=packed.policy,
    config=recorded(config),
    made_by=made_by(),
    keep_bytes=config.store.keep_bytes,
    trainers=config.store.trainers,
    **sizes(config),
  )
  return create(root, manifest, packed.sequences, packed.keep, packed.places)


def measured(
  sites: list[Site],
  config: Config,
  run: Forward,
  packed: Packed | None,
  alone: bool,
) -> list[Site]:
  """The sites with the norm beyond which rows are left out, and with the offset
  and scale of every column for int8 rows.

  From the first sequences of the store without position 0, whose norm is up
  to 100 times the others', and without what is beyond a bound of the batch.
  """
  times = config.harvest.max_norm
  b, T = config.harvest.batch_sequences, config.harvest.sequence_length
  count, skip = -(-_SAMPLE // (b * T)) * b, max(config.harvest.skip_first, 1)
  tokens = np.zeros((count, T), np.int32)
  if packed is not None:  # a short text is repeated
    tokens = np.resize(packed.sequences[:count], (count, T))
  if not alone:
    tokens = np.asarray(multihost_utils.broadcast_one_to_all(tokens))
  found: dict[str, list[Moments]] = {site.name: [] for site in sites}
  sizes: dict[str, list[np.ndarray]] = {site.name: [] for site in sites}
  for at in range(0, count, b):  # one at a time: they hold collectives
    for name, rows in jax.device_get(run(tokens[at : at + b])).items():
      kept = rows.reshape(b, T, -1)[:, skip:].reshape(b * (T - skip), -1)
      sizes[name].append(norms(kept))
      kept = within(kept, times * np.median(sizes[name][-1]))
      found[name].append(moments(kept))
  medians = {k: float(np.median(np.concatenate(v))) for k, v in sizes.items()}
  sites = [
    dataclasses.replace(s, max_norm=times * medians[s.name]) for s in sites
  ]
  if config.store.dtype != 'int8':
    return sites
  return [
    dataclasses.replace(site, offset=offset, scale=scale)
    for site in sites
    for offset, scale in [quantise.columns(merge_all(found[site.name]))]
  ]


def identity(subject: Subject) -> dict[str, str]:
  """What the manifest says of the model."""
  return {
    'name': subject.name,
    'weights_sha256': subject.weights_sha256,
    'tokenizer_sha256': subject.tokenizer_sha256,
  }


def made_by() -> dict[str, str]:
  """What computed the rows: another of these may change their last bits."""
  revision = git_revision()
  if revision == 'unknown':
    logging.info('git revision unknown: no git, or not a checkout with commits')
  return {
    'git_revision': revision,
    'jax': jax.__version__,
    'device': jax.devices()[0].device_kind,
    'tokenizers': tokenizers.__version__,
  }


def git_revision() -> str:
  """Commit of this source tree, '-dirty' if changed; 'unknown' outside git."""
  source = Path(__file__).resolve().parents[2]
  if not (source / '.git').exists():
    return 'unknown'  # an enclosing repository would not be ours
  command = ['git', '-C', str(source), 'describe', '--always', '--dirty']
  try:
    result = subprocess.run(
      [*command, '--abbrev=40', '--exclude=*'],
      capture_output=True,
      text=True,
      check=True,
    )
  except (OSError, subprocess.CalledProcessError):
    return 'unknown'
  return result.stdout.strip()
