"""Compiled programs on disk: whose, how many, and what damage does to them."""

import os
import shutil
import warnings

import jax
import jax.numpy as jnp
import pytest
from absl import flags
from jax.experimental.compilation_cache import compilation_cache

from sae_jax import compile_cache
from sae_jax.compile_cache import use_cache

DIR = 'jax_compilation_cache_dir'
ON = 'jax_enable_compilation_cache'
LEAST = 'jax_persistent_cache_min_compile_time_secs'


@pytest.fixture
def cache(tmp_path, monkeypatch):
  """A cache folder for a program whose user said nothing of compiling."""
  before = {name: getattr(jax.config, name) for name in (DIR, LEAST, ON)}
  monkeypatch.setenv('SAE_JAX_CACHE', str(tmp_path))
  monkeypatch.setattr(warnings, 'showwarning', warnings.showwarning)
  jax.config.update(DIR, None)
  compilation_cache.reset_cache()
  yield tmp_path / 'compiled'
  for name, value in before.items():
    jax.config.update(name, value)
  compilation_cache.reset_cache()


def compiled(cache):
  """The entries after a program is compiled, or read."""
  jax.clear_caches()
  jax.jit(lambda x: x + 41)(jnp.zeros(3, jnp.int8)).block_until_ready()
  return {p: p.read_bytes() for p in cache.glob('*/jit__lambda*-cache')}


def test_a_second_start_finds_its_programs_and_mends_a_torn_one(cache, caplog):
  use_cache()
  [(entry, whole)] = compiled(cache).items()
  assert f'{len(os.sched_getaffinity(0))}cores' in str(entry)
  entry.write_bytes(whole[:50])  # as a full disk leaves it
  assert len(compiled(cache)[entry]) > 50
  assert 'Error reading' in caplog.text


def test_what_cannot_be_written_is_tried_once(cache, caplog):
  use_cache()
  compiled(cache)
  (folder,) = cache.iterdir()
  shutil.rmtree(folder)
  folder.write_text('')
  for _ in range(2):
    assert compiled(cache) == {}
  assert caplog.text.count('Error writing') == 1


@pytest.mark.parametrize('why', ['said', 'off', 'several', 'no folder'])
def test_no_folder_of_ours(cache, monkeypatch, why):
  own = '/elsewhere' if why == 'said' else None
  if own:
    jax.config.update(DIR, own)
  elif why == 'off':
    jax.config.update(ON, False)
  elif why == 'several':
    monkeypatch.setitem(vars(flags.FLAGS), 'coordinator', 'auto')
  else:
    cache.write_text('')
  use_cache()
  assert getattr(jax.config, DIR) == own


def test_the_folder_is_bounded(cache, monkeypatch):
  use_cache()
  (entry,) = compiled(cache)
  for most, there in ((10**6, True), (100, False)):
    monkeypatch.setattr(compile_cache, '_MAX_BYTES', most)
    jax.config.update(DIR, None)
    use_cache()
    assert entry.exists() == there
