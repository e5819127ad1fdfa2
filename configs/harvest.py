"""Harvests of activations.

python launch/harvest.py --config=configs/harvest.py:smollm2
':smollm2' fills the quickstart's store, ':tiny' the same at a glance.
"""

from sae_jax.config import Config
from sae_jax.errors import UserError
from sae_jax.harvest.config import base_config
from sae_jax.paths import cache_dir


def get_config(arg: str = 'smollm2') -> Config:
  """arg: 'smollm2' or 'tiny'."""
  c = base_config()
  c.model.path = cache_dir('demo', 'SmolLM2-135M-Instruct.Q4_1.gguf')
  c.text.path = cache_dir('demo', 'sotu')
  c.store.path = cache_dir('stores', 'smollm2')
  c.store.rows_per_shard = 2**16
  c.harvest.compute_dtype = 'bfloat16'  # 3 times faster where there is AMX
  c.store.dtype = 'bfloat16'
  if arg == 'smollm2':
    c.harvest.rows = 500_000  # a fifth of the text; 0 would take all of it
    return c
  if arg == 'tiny':
    c.store.path = cache_dir('stores', 'tiny')
    c.harvest.sites = ('layer_0.resid_post', 'layer_1.mlp_out')
    c.harvest.rows = 1000
    c.harvest.sequence_length = 32
    c.harvest.batch_sequences = 4
    c.store.rows_per_shard = 256
    c.store.rows_per_block = 32
    return c
  raise UserError(f'configs/harvest.py:{arg}: use smollm2 or tiny')
