"""Harvests of activations.

python launch/harvest.py --config=configs/harvest.py:smollm2
':smollm2' fills the quickstart's store, ':tiny' the same at a glance.
':gemma_scope' is Gemma Scope's: three sites of a layer of Gemma 2 2B; one of
eight tasks on a host with four chips, reading a data set of the hub:

python launch/harvest.py --config=configs/harvest.py:gemma_scope \
    --config.store.path=/mnt/stores/gemma2_2b --config.task=0/8
"""

from sae_jax.config import Config
from sae_jax.errors import UserError
from sae_jax.harvest.config import base_config
from sae_jax.paths import cache_dir


def get_config(arg: str = 'smollm2') -> Config:
  """arg: 'smollm2', 'tiny' or 'gemma_scope'."""
  c = base_config()
  if arg == 'gemma_scope':
    return gemma_scope(c)
  c.model.path = cache_dir('demo', 'SmolLM2-135M-Instruct.Q4_1.gguf')
  c.text.path = cache_dir('demo', 'sotu')
  c.store.path = cache_dir('stores', 'smollm2')
  c.store.rows_per_shard = 2**16
  c.harvest.compute_dtype = 'auto'  # bfloat16 where there is AMX
  c.store.dtype = 'bfloat16'
  if arg == 'smollm2':
    c.harvest.rows = 500_000  # a fifth of the text; 0 would take all of it
    return c
  if arg == 'tiny':
    c.store.path = cache_dir('stores', 'tiny')
    c.harvest.sites = ('layer_0.resid_post', 'layer_1.mlp_out')
    c.harvest.rows = 1000
    c.harvest.compute_dtype = 'float32'
    c.harvest.sequence_length = 32
    c.harvest.batch_sequences = 4
    c.store.rows_per_shard = 256
    c.store.rows_per_block = 32
    return c
  raise UserError(f'configs/harvest.py:{arg}: use smollm2, tiny or gemma_scope')


def gemma_scope(c: Config) -> Config:
  """Gemma Scope (arXiv 2408.05147) section 3: sequences of 1,024, one shuffle
  bucket of 10^6 rows a file, no rows for BOS, EOS and padding. Its text is not
  public; rows are float32 there."""
  c.model.path = 'google/gemma-2-2b'
  c.text.path, c.text.name = 'HuggingFaceFW/fineweb-edu', 'sample-10BT'
  c.harvest.sites = (
    'layer_12.attn_z', 'layer_12.mlp_out', 'layer_12.resid_post',
  )  # fmt: skip
  c.harvest.rows = 4_000_000_000
  c.harvest.sequence_length = 1024
  c.harvest.batch_sequences = 16
  c.harvest.compute_dtype = 'bfloat16'
  c.store.dtype = 'bfloat16'
  c.mesh.data = 4
  return c
