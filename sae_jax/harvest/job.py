"""The harvest: texts through the subject model into an activation store.

Everything is tokenised and placed first; then batch after batch goes through
the model, and a killed harvest goes on at the first missing shard.
"""

import functools
import hashlib
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tokenizers
from absl import logging
from ml_collections import ConfigDict
from tqdm import tqdm

from sae_jax.config import Config
from sae_jax.errors import UserError
from sae_jax.harvest.config import check_config, recorded, sizes
from sae_jax.harvest.documents import scan
from sae_jax.harvest.files import Text
from sae_jax.harvest.packing import Packed, pack, pack_all
from sae_jax.harvest.positions import all_of, first, without
from sae_jax.lm.model import check_sites, forward, site_width
from sae_jax.lm.subject import Subject, load_subject
from sae_jax.store.folder import another_harvest
from sae_jax.store.manifest import (
  COMPLETE,
  DTYPES,
  FILE,
  Manifest,
  Site,
  local_root,
  read_manifest,
)
from sae_jax.store.plan import differing_keys, least_rows, plan, row_starts
from sae_jax.store.writer import StoreWriter, missing_shards, open_writer


def harvest(config: Config, subject: Subject | None = None) -> Manifest:
  """Makes the store at config.store.path, or what is missing of it.

  A complete store of the same config, text and model is left as it is.

  Args:
    config: as harvest/config.py; configs/harvest.py has examples.
    subject: the model, when it is loaded already.

  Raises UserError for anything the user can mend; before the first row is
  written nothing exists, after that the same call goes on.
  """
  check_config(config)
  root = local_root(config.store.path)
  text = scan(
    ConfigDict({
      'kind': '', 'column': 'text', 'chat': False, 'split': 'train', 'name': '',
    } | config.text.to_dict())
  )  # fmt: skip
  if manifest := reusable(root, config, text, subject):
    logging.info('store: %s is complete, nothing to do', root)
    return manifest
  subject = subject or load_subject(config.model)
  check_sites(subject.cfg, config.harvest.sites)
  packed = pack_text(config, text, subject)
  manifest = make_plan(config, text, subject, packed)
  with open_writer(root, manifest, packed.sequences, packed.keep) as writer:
    announce(writer)
    fill(writer, subject, packed, config)
    return writer.finish()


def reusable(
  root: Path, config: Config, text: Text, subject: Subject | None
) -> Manifest | None:
  """The manifest of a complete store of this config, text and model.

  Raises UserError when the folder holds another harvest's store. Sizes and
  checksums of the checksums are looked at, not every row.
  """
  if not (root / FILE).exists():
    return None
  old = read_manifest(root, complete=False)
  keys = differing_keys(old.config, recorded(config))
  if old.text.get('sha256') != text.sha256:
    keys.append('text (sha256)')
  if keys:
    raise another_harvest(root, keys)
  if old.state != COMPLETE or missing_shards(root, old):
    return None
  if subject is not None:
    weights = subject.weights_sha256
  elif Path(config.model.path).is_file():
    with open(config.model.path, 'rb') as file:
      weights = hashlib.file_digest(file, 'sha256').hexdigest()
  else:
    return None
  return old if weights == old.model['weights_sha256'] else None


def pack_text(config: Config, text: Text, subject: Subject) -> Packed:
  """Tokens and their places; UserError when there are too few."""
  pieces = pack(
    text,
    subject.tokenizer,
    length=config.harvest.sequence_length,
    bos=subject.bos,
    separator=subject.eos,
    keep=all_of(first(1), without(unstored(subject))),
    rows=config.harvest.rows,
    seed=config.harvest.seed,
  )
  packed = pack_all(pieces)
  needed = config.harvest.rows or least_rows(**sizes(config))
  if packed.rows < needed:
    size = text.bytes * needed / max(packed.rows, 1)
    key = 'harvest.rows' if config.harvest.rows else 'store.rows_per_shard'
    raise UserError(
      f'text.path: {text.bytes:,} bytes of text give {packed.rows:,} rows, '
      f'{needed:,} are needed: about {size:,.0f} bytes of text, or a lower '
      f'{key}'
    )
  logging.info(
    'text: %d of %d documents, %s sequences of %d tokens',
    packed.documents,
    text.documents,
    f'{len(packed.sequences):,}',
    config.harvest.sequence_length,
  )
  return packed


def unstored(subject: Subject) -> frozenset[int]:
  """Tokens that never get a row: control tokens, BOS and EOS."""
  return subject.special | {subject.bos, subject.eos}


def make_plan(
  config: Config, text: Text, subject: Subject, packed: Packed
) -> Manifest:
  """The manifest of the store to be made."""
  return plan(
    packed.sequences,
    packed.keep,
    [
      Site(site, site_width(subject.cfg, site), config.store.dtype)
      for site in config.harvest.sites
    ],
    rows=packed.rows,
    seed=config.harvest.seed,
    model={
      'name': subject.name,
      'weights_sha256': subject.weights_sha256,
      'tokenizer_sha256': subject.tokenizer_sha256,
    },
    text={
      'sha256': text.sha256,
      'files': text.files,
      'bytes': text.bytes,
      'documents_read': packed.documents,
    },
    policy={
      'first_token': subject.bos,
      'token_after_document': subject.eos,
      'padding_token': None,  # an incomplete last sequence is dropped
      'positions_without_rows': [0],
      'tokens_without_rows': sorted(unstored(subject)),
    },
    config=recorded(config),
    made_by=made_by(),
    **sizes(config),
  )


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


def announce(writer: StoreWriter) -> None:
  """Says before the first row what will be written, and where."""
  m = writer.manifest
  done = len(m.shards) - len(writer.missing)
  logging.info(
    'store: %s, %s rows in %d shards (%d held out), %d there already',
    writer.root, f'{m.rows:,}', len(m.shards), m.held_out_shards, done,
  )  # fmt: skip
  for site in m.sites:
    size = m.rows * site.width * DTYPES[site.dtype].itemsize
    logging.info(
      'site %s: %d numbers a row in %s, %s bytes',
      site.name, site.width, site.dtype, f'{size:,}',
    )  # fmt: skip


def make_forward(
  subject: Subject, config: Config
) -> Callable[[np.ndarray], dict[str, jax.Array]]:
  """tokens [b, T] -> {site: rows [b * T, width] in the stored dtype}."""
  sites = tuple(config.harvest.sites)
  stored = jnp.dtype(config.store.dtype)

  @jax.jit
  def run(params: Any, tokens: jax.Array) -> dict[str, jax.Array]:
    out = forward(
      params,
      subject.cfg,
      tokens,
      sites=sites,
      logits=False,
      dtype=jnp.dtype(config.harvest.compute_dtype),
    )
    return {
      site: x.reshape(-1, x.shape[-1]).astype(stored)
      for site, x in out.activations.items()
    }

  return functools.partial(run, subject.params)


def fill(
  writer: StoreWriter, subject: Subject, packed: Packed, config: Config
) -> None:
  """Computes and writes the rows of the missing shards.

  Batch j is always sequences [j b, (j + 1) b), the last one padded with
  repetitions, so that a row's bits do not depend on where a run begins. The
  next batch is on the device while the last one is written.
  """
  run, b = make_forward(subject, config), config.harvest.batch_sequences
  starts = row_starts(packed.keep, packed.rows)
  batches = batches_needed(writer, starts, b)
  total = sum(writer.manifest.shards[shard].rows for shard in writer.missing)
  waited = wrote = 0.0
  began, pending = time.perf_counter(), None
  # Where there is no terminal a line now and then must do.
  interval = 0.5 if sys.stderr.isatty() else 15
  with tqdm(
    total=total, desc='harvest', unit=' rows', unit_scale=True,
    mininterval=interval,
  ) as bar:  # fmt: skip
    for j in [*batches, None]:
      ahead = None if j is None else (j, run(_batch(packed.sequences, j, b)))
      if pending:
        tick = time.perf_counter()
        i, computed = pending
        rows = jax.device_get(computed)
        waited -= tick - (tick := time.perf_counter())
        first, last = starts[i * b], starts[min((i + 1) * b, len(starts) - 1)]
        kept = np.flatnonzero(packed.keep[i * b : (i + 1) * b])[: last - first]
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


def batches_needed(
  writer: StoreWriter, starts: np.ndarray, b: int
) -> list[int]:
  """Batches that hold a row of a missing shard, ascending."""
  size = writer.manifest.rows_per_shard
  count = len(starts) - 1
  needed = []
  for j in range(-(-count // b)):
    first, last = starts[j * b], starts[min((j + 1) * b, count)]
    shards = range(int(first) // size, -(-int(last) // size))
    if any(shard in writer.missing for shard in shards):
      needed.append(j)
  return needed


def _batch(sequences: np.ndarray, j: int, b: int) -> np.ndarray:
  """Sequences [j b, (j + 1) b), the last one repeated to fill a batch."""
  at = np.minimum(np.arange(j * b, (j + 1) * b), len(sequences) - 1)
  return sequences[at]
