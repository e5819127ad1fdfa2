"""A run folder, its store and its language model, all tiny."""

import hashlib
import json

import eval_fakes as fakes
import jax
import numpy as np
import pytest

from sae_jax.lm.model import forward
from sae_jax.lm.subject import Subject, tokenizer_sha256
from sae_jax.models.sae import Norm
from sae_jax.store.manifest import read_manifest, store_fingerprint
from sae_jax.train.checkpoints import Checkpoints
from sae_jax.train.config import base_config
from sae_jax.train.state import init_state


@pytest.fixture(scope='session')
def subject():
  """A random language model whose tokens are hard on a web page."""
  tokenizer = fakes.nasty_tokenizer()
  return Subject(
    name='tiny <b>',
    cfg=fakes.CFG,
    params=fakes.random_lm(),
    tokenizer=tokenizer,
    bos=fakes.BOS,
    eos=fakes.EOS,
    pad=None,
    special=frozenset({fakes.BOS, fakes.EOS}),
    weights_sha256=hashlib.sha256(b'weights').hexdigest(),
    tokenizer_sha256=tokenizer_sha256(tokenizer),
  )


@pytest.fixture(scope='session')
def store(tmp_path_factory, subject):
  """Its activations; the model's file is there, but empty."""
  root = tmp_path_factory.mktemp('run')
  model = root / 'model.gguf'
  model.write_bytes(b'')
  tokens, keep = fakes.random_tokens(40)
  out = forward(subject.params, subject.cfg, tokens, sites=(fakes.SITE,))
  rows = np.asarray(out.activations[fakes.SITE])[keep]
  fakes.write_store(
    root / 'store', tokens, keep, rows.astype(fakes.bfloat16), shard=160,
    **fakes.origin(subject, model),
  )  # fmt: skip
  return root / 'store'


@pytest.fixture
def run_dir(tmp_path, store):
  """A training run that stopped at step 3, with a few metrics."""
  c = base_config()
  c.store.path, c.store.site = str(store), fakes.SITE
  c.sae.d_in, c.sae.latents = fakes.CFG.d_model, 48
  c.act.name, c.act.k = 'topk', 4
  c.train.batch_rows = 32
  folder = tmp_path / 'run'
  folder.mkdir()
  (folder / 'config.json').write_text(json.dumps(c.to_dict()))
  norm = Norm(jax.numpy.zeros(c.sae.d_in), jax.numpy.float32(4))
  mark = store_fingerprint(read_manifest(store), fakes.SITE)
  with Checkpoints(folder, 1, 0) as checkpoints:
    checkpoints.save(3, init_state(c, norm), {'store': mark})
  lines = [
    {'step': 1, 'rows': 32, 'train/loss': 0.9, 'train/l0': 4.0},
    {'step': 1, 'rows': 32, 'eval/fvu': 0.8},
    {'step': 2, 'rows': 64, 'train/loss': None, 'train/l0': 4.0},
    {'step': 3, 'rows': 96, 'train/loss': 0.1, 'train/l0': 4.0},
  ]
  text = '\n'.join(map(json.dumps, lines)) + '\n{"step": 4, "ro'
  (folder / 'metrics.jsonl').write_text(text)
  return folder
