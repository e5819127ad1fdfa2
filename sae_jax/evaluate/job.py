"""Evaluates a training run on the held-out split of its store.

Everything but a few numbers comes from the run's config.json and the store's
manifest; evaluation.json and report.html are left in the run folder.
"""

import contextlib
import datetime
import logging
import math
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from ml_collections import ConfigDict

import sae_jax
from sae_jax.config import Config
from sae_jax.errors import UserError
from sae_jax.evaluate import figures, report
from sae_jax.evaluate.contexts import top_contexts
from sae_jax.evaluate.held_out import HeldOut, read_held_out, spread
from sae_jax.evaluate.reconstruction import Reconstruction, reconstruction
from sae_jax.evaluate.rows import first
from sae_jax.evaluate.splice import Splice, splice_loss
from sae_jax.lm.model import check_head
from sae_jax.lm.subject import Subject, load_subject, weights_sha256
from sae_jax.models.sae import SAE
from sae_jax.paths import write_atomic
from sae_jax.store import reader
from sae_jax.store.manifest import (
  Manifest,
  read_manifest,
  store_fingerprint,
)
from sae_jax.train import checkpoints
from sae_jax.train.run import read_config, run_folder

log = logging.getLogger('absl')
FORMAT, VERSION = 'sae_jax.evaluation', 1


class Run(NamedTuple):
  """A trained SAE and the store it is evaluated on."""

  folder: Path
  config: Config
  step: int
  sae: SAE
  store: str
  manifest: Manifest
  held_out: HeldOut


def evaluate(
  run_dir: str | Path,
  *,
  rows: int = 65_536,
  sequences: int = 64,
  contexts: int = 20,
  language_model: bool = True,
  model_path: str = '',
  store_path: str = '',
  load: Callable[[Config], Subject] | None = None,
  out: str = '',
) -> dict[str, Any]:
  """Evaluates the newest checkpoint of a run; returns evaluation.json.

  Args:
    run_dir: folder of a training run.
    out: folder for the two files, if not that of the run.
    rows: at most so many held-out rows, in file order (random in a shard).
    sequences: at most so many held-out sequences for the language model.
    contexts: features shown in the report.
    language_model: False leaves out the figures of the model's loss.
    model_path: the subject model's file, where it has moved.
    store_path: the store's folder, where it has moved.
    load: reads the subject model, if not `load_subject`: of several evaluations
      one may keep it.

  Raises UserError for a missing run, store or model, for another model than
  the one that was harvested, and for counts below 1. Nothing is written then.
  """
  run_dir = run_folder(run_dir)
  for name, value in [('rows', rows), ('sequences', sequences)]:
    if value < 1:
      raise UserError(f'--{name}={value}: must be at least 1')
  if contexts < 0:
    raise UserError(f'--contexts={contexts}: must not be negative')
  read_config(run_dir)  # there is a run
  place = Path(out).expanduser() if out else run_dir
  try:
    write_atomic(place / 'evaluation.probe', '')  # before the work
    (place / 'evaluation.probe').unlink()
  except OSError as error:
    raise UserError(
      f'{place}: no file can be written ({error.strerror}): give --out=DIR'
    ) from None
  seconds: dict[str, float] = {}
  with _timed(seconds, 'total'):
    with _timed(seconds, 'load'):
      run = open_run(run_dir, store_path)
      subject = open_model(run.manifest, model_path, language_model, load)
      tokenizer = subject and subject.tokenizer
      subject = subject if language_model else None  # its weights go here
    log.info('run: %s at step %d, store: %s', run_dir, run.step, run.store)
    site, width = run.config.store.site, run.config.sae.d_in
    bound = reader.bound_of(run.store, site, run.config.store.max_norm)
    read = lambda bound=bound: reader.held_out(run.store, site, bound)
    with _timed(seconds, 'reconstruction'):
      limit = min(rows, run.held_out.rows)
      rebuilt = reconstruction(run.sae, read(), width=width, limit=limit)
      every = (x for x, _ in first(read(0), limit))
      outliers = reader.outliers(run.store, site, every)
    if outliers['share'] > 0.01 and not bound:
      log.warning('held out: %s: %s', outliers['said'], reader.ADVICE)
    spliced = None
    if subject:
      with _timed(seconds, 'language_model'):
        spliced = splice(run, subject, sequences, bound)
    del subject  # the rest does not need its weights
    with _timed(seconds, 'contexts'):
      features = top_contexts(
        run.sae, read, lambda i: run.held_out.tokens[i], rebuilt.fired,
        rows=rebuilt.rows, width=width, latents=contexts,
      )  # fmt: skip
  result = record(run, rebuilt, outliers, spliced, seconds)
  report.write(run_dir, result, features, tokenizer, place)
  return result


def open_run(run_dir: Path, store_path: str) -> Run:
  """The newest checkpoint of a run, and its store."""
  config = read_config(run_dir)
  root = store_path or config.store.path
  manifest = read_manifest(root, complete=False)  # held-out rows suffice
  width = manifest.site(config.store.site).width
  if width != config.sae.d_in:
    raise UserError(
      f'store.path: {config.store.site} is {width} wide at {root}, the SAE '
      f'of {run_dir} takes {config.sae.d_in}: give the store it was trained on'
    )
  held_out = read_held_out(root, manifest)
  step = checkpoints.find_step(run_dir)
  trained_on = checkpoints.read_meta(run_dir, step)['store']
  if trained_on != store_fingerprint(manifest, config.store.site):
    if not store_path:
      raise UserError(
        f'store.path: the store at {root} is not the one {run_dir} was trained '
        'on: give that one, or another one on purpose, with --store_path'
      )
    log.warning('store: %s is not the one %s was trained on', root, run_dir)
  sae = sae_jax.load(run_dir, step)
  return Run(run_dir, config, step, sae, root, manifest, held_out)


def open_model(
  manifest: Manifest,
  path: str,
  needed: bool,
  load: Callable[[Config], Subject] | None = None,
) -> Subject | None:
  """The subject model of a store, checked by its hashes.

  None where it is not `needed` and its file is missing: the report then shows
  token ids.
  """
  origin = manifest.config.get('model') or {'path': ''}
  path = path or origin['path']
  model = ConfigDict(origin | {'path': path})
  if not path or weights_sha256(model) is None:
    if needed:
      raise UserError(
        f'language model: no file {path!r}, no folder, no cached model of the '
        'hub: give --model_path, or --lm=false for no figures of its loss'
      )
    log.warning('no file %r: the report shows token ids', path)
    return None
  subject = (load or load_subject)(model)
  for name in ('weights_sha256', 'tokenizer_sha256'):
    found, expected = getattr(subject, name), manifest.model.get(name)
    if found != expected:
      raise UserError(
        f'language model: {path} is not the model that was harvested '
        f'({name} {found[:12]}..., in the store {str(expected)[:12]}...): '
        'give --model_path'
      )
  if needed:
    check_head(subject.cfg)
  return subject


def splice(run: Run, subject: Subject, sequences: int, bound: float) -> Splice:
  """Delta loss on sequences spread over the held-out split."""
  held_out = run.held_out
  if not held_out.whole:
    raise UserError(
      f'store.path: {run.store} has no whole held-out sequence: harvest with '
      'larger shards, or give --lm=false'
    )
  chosen = spread(sequences, held_out.whole)
  return splice_loss(
    subject.params,
    subject.cfg,
    run.sae,
    run.config.store.site,
    held_out.tokens[chosen],
    held_out.stored[chosen],
    pad=run.manifest.policy.get('padding_token'),
    latents=run.config.sae.latents,
    bound=bound or math.inf,
  )


def record(
  run: Run,
  rebuilt: Reconstruction,
  outliers: dict[str, Any],
  spliced: Splice | None,
  seconds: dict[str, float],
) -> dict[str, Any]:
  """evaluation.json: every figure with its unit, and what it was made from."""
  config, manifest = run.config, run.manifest
  values = figures.collect(rebuilt, spliced)
  edges, counts = frequency_bins(rebuilt)
  living = rebuilt.frequency[rebuilt.fired > 0]
  now = datetime.datetime.now(datetime.UTC)
  return {
    'format': FORMAT,
    'version': VERSION,
    'created': now.isoformat(timespec='seconds'),
    'run': str(run.folder),
    'config': str(run.folder / 'config.json'),
    'checkpoint_step': run.step,
    'training_rows': run.step * config.train.batch_rows,
    'store': str(run.store),
    'site': config.store.site,
    'subject': manifest.model,
    'text': manifest.text | {'name': _text_name(manifest)},
    'dictionary': {
      'activation': config.act.name,
      'width': config.sae.d_in,
      'latents': config.sae.latents,
    },
    'rows': rebuilt.rows,
    'outliers': outliers,
    'sequences': spliced.sequences if spliced else 0,
    'held_out_sequences': run.held_out.whole,
    'predictions': spliced.predictions if spliced else 0,
    'figures': values,
    'units': figures.units(values),
    'firing_frequency': {
      'log10_edges': edges.tolist(),
      'latents': counts.tolist(),
      'dead': int((rebuilt.fired == 0).sum()),
      'median_of_living': float(np.median(living)) if len(living) else None,
    },
    'seconds': {name: round(value, 1) for name, value in seconds.items()},
    'versions': checkpoints.versions(),
  }


def _text_name(manifest: Manifest) -> str:
  """What the file or folder of the texts is called; '' where there is none."""
  return Path(manifest.config.get('text', {}).get('path', '')).name


def frequency_bins(r: Reconstruction) -> tuple[np.ndarray, np.ndarray]:
  """(edges [n + 1], latents [n]) over log10 firing frequency, four a decade.

  The lowest edge is below 1 / rows, so that every latent that fired counts.
  """
  decades = min(-1, int(np.floor(np.log10(0.99 / r.rows))))
  edges = np.linspace(decades, 0, 1 - 4 * decades)
  alive = r.frequency[r.fired > 0]
  counts, _ = np.histogram(np.log10(alive), edges)
  return edges, counts


@contextlib.contextmanager
def _timed(seconds: dict[str, float], stage: str) -> Iterator[None]:
  """Writes how long a stage took."""
  began = time.perf_counter()
  yield
  seconds[stage] = time.perf_counter() - began
