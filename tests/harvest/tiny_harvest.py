"""A harvest of seconds: a random model, a tokenizer of words, a small text.

As a program: `python tiny_harvest.py TEXT DIE [KEY=VALUE...] STORE...` harvests
into each store; DIE is 'never', or 'rename:N' / 'write:N' to kill -9 itself
there; KEY=VALUE changes the config, processes=ADDRESS,N,I joins a job.
`python tiny_harvest.py --config=... [FLAGS]` is launch/harvest.py itself, with
the random model.
"""

import os
import runpy
import signal
import sys
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
import tokenizers
from ml_collections import ConfigDict

from sae_jax.harvest import job, planning
from sae_jax.harvest.config import base_config
from sae_jax.lm.config import LMConfig
from sae_jax.lm.model import init
from sae_jax.lm.subject import Subject, tokenizer_sha256
from sae_jax.parallel.processes import start_processes
from sae_jax.store.writer import StoreWriter

CFG = LMConfig(
  vocab=40, d_model=16, layers=3, heads=2, kv_heads=1, head_dim=8, d_mlp=24
)
SITES = ('layer_1.resid_post', 'layer_0.attn_z')


def tiny_subject() -> Subject:
  words = ['<s>', '</s>', '<unk>', *(f'w{i}' for i in range(37))]
  tokenizer = tokenizers.Tokenizer(
    tokenizers.models.WordLevel(
      {word: i for i, word in enumerate(words)}, unk_token='<unk>'
    )
  )
  tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
  return Subject(
    name='tiny',
    cfg=CFG,
    params=init(jax.random.key(0), CFG),
    tokenizer=tokenizer,
    bos=0,
    eos=1,
    pad=None,
    special=frozenset([0, 1, 2]),
    weights_sha256='weights',
    tokenizer_sha256=tokenizer_sha256(tokenizer),
  )


def write_text(folder, documents=12, words=50) -> None:
  """Documents of random words; a word in twenty is unknown to the model."""
  rng = np.random.default_rng(0)
  for i in range(documents):
    numbers = rng.integers(0, 37, words)
    text = ' '.join('new' if n % 20 == 0 else f'w{n}' for n in numbers)
    (folder / f'{i:03d}.txt').write_text(text)


def text_config(path, **values) -> ConfigDict:
  """A config's `text` block."""
  defaults = {
    'kind': '', 'column': 'text', 'chat': False, 'split': 'train', 'name': '',
  }  # fmt: skip
  return ConfigDict({'path': str(path)} | defaults | values)


class Packed(NamedTuple):
  """All pieces in one: arrays as in Piece; rows and documents in all."""

  sequences: np.ndarray
  keep: np.ndarray
  places: np.ndarray
  rows: int
  documents: int


def pack_all(pieces) -> Packed:
  """The pieces of `pack` as one."""
  all_ = list(pieces)
  return Packed(
    np.concatenate([piece.sequences for piece in all_]),
    np.concatenate([piece.keep for piece in all_]),
    np.concatenate([piece.documents for piece in all_]),
    all_[-1].rows_so_far,
    all_[-1].documents_so_far,
  )


def tiny_config(text, store) -> ConfigDict:
  c = base_config()
  c.model.path = 'tiny'
  c.text.path, c.store.path = str(text), str(store)
  c.harvest.sites = SITES
  # 10 tokens a sequence, 3 sequences a batch, shards of 64, 64, ... rows:
  # batches end within shards, and the last shard is short.
  c.harvest.rows = 300
  c.harvest.sequence_length = 10
  c.harvest.batch_sequences = 3
  c.store.rows_per_shard = 64
  c.store.rows_per_block = 16
  return c


def die_at(place: str) -> None:
  """Has this process killed at the N-th rename, or write of a batch."""
  kind, _, number = place.partition(':')
  owner, name = {
    'rename': (os, 'replace'),
    'write': (StoreWriter, 'write'),
    'never': (None, ''),
  }[kind]
  if owner is None:
    return
  original, calls = getattr(owner, name), []

  def counted(*args):
    calls.append(args)
    if len(calls) == int(number):
      os.kill(os.getpid(), signal.SIGKILL)
    return original(*args)

  setattr(owner, name, counted)


def launch() -> None:
  """launch/harvest.py with the tiny model, which needs no files."""
  harvest = job.harvest
  job.harvest = lambda config: harvest(config, tiny_subject())  # type: ignore
  root = Path(__file__).parents[2]
  runpy.run_path(str(root / 'launch' / 'harvest.py'), run_name='__main__')


def main() -> None:
  if sys.argv[1].startswith('--'):
    return launch()
  _, text_folder, death, *rest = sys.argv
  # The manifest keeps the revision; a commit may happen during the test.
  planning.git_revision = lambda: 'test'
  die_at(death)
  changes = dict(word.split('=') for word in rest if '=' in word)
  stores = rest[len(changes) :]
  if job_of := changes.pop('processes', ''):
    address, count, number = job_of.split(',')
    start_processes(address, int(count), int(number))
  for folder in stores:
    config = tiny_config(text_folder, folder)
    for key, value in changes.items():
      group, name = key.rpartition('.')[::2]
      block = config[group] if group else config
      block[name] = type(block[name])(value)
    job.harvest(config, tiny_subject())


if __name__ == '__main__':
  main()
