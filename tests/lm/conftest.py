"""Fixtures of the subject model's tests: the demo assets, fetched if absent."""

import importlib.util
from pathlib import Path

import pytest
from ml_collections import ConfigDict

from sae_jax import paths
from sae_jax.lm.subject import load_subject

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope='session')
def demo():
  """(model file, folder of texts), in the cache folder the user also has."""
  path = ROOT / 'scripts' / 'fetch_demo.py'
  spec = importlib.util.spec_from_file_location('fetch_demo', path)
  assert spec and spec.loader
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module.fetch_all(paths.cache_dir('demo'))


@pytest.fixture(scope='session')
def subject(demo):
  """SmolLM2-135M-Instruct in float32."""
  return load_subject(ConfigDict({'kind': 'gguf', 'path': str(demo[0])}))


@pytest.fixture
def llama(tmp_path):
  """The folder of a tiny Llama as transformers saves it."""
  import tiny_hf as tiny  # here: needs torch

  return tiny.save(tmp_path / 'tiny-3.2', tiny.model_of('llama'))
