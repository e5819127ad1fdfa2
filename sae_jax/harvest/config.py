"""The harvest config: every key with its unit, and the checks of values."""

from typing import Any

from ml_collections import ConfigDict

from sae_jax.config import Config
from sae_jax.errors import UserError
from sae_jax.store.plan import check_dtype, check_rows, check_sizes


def base_config() -> Config:
  """All keys a harvest reads."""
  c = ConfigDict()
  c.model = ConfigDict()
  c.model.kind = 'gguf'  # how lm/subject.py loads it
  c.model.path = ''

  c.text = ConfigDict()
  c.text.path = ''  # a .txt file, or a folder: every .txt is a document

  c.harvest = ConfigDict()
  c.harvest.sites = ('layer_9.resid_post',)  # all from one forward pass
  c.harvest.rows = 0  # rows to write, 0 for all the text gives
  c.harvest.sequence_length = 128  # T, BOS included
  c.harvest.batch_sequences = 16  # sequences in one forward pass
  c.harvest.compute_dtype = 'float32'  # or 'bfloat16': the model's arithmetic
  c.harvest.seed = 0  # order of the documents, and of the rows in a shard

  c.store = ConfigDict()
  c.store.path = ''  # folder to write
  c.store.dtype = 'float32'  # or 'bfloat16': the rows on disk
  c.store.rows_per_shard = 2**20  # rows shuffled together
  c.store.rows_per_block = 256  # rows read in one piece
  c.store.held_out_shards = 1  # the first shards, never trained on
  c.store.norm_shards = 1  # training shards that give mean and scale
  return c


def check_config(config: Config) -> None:
  """Raises UserError for values that cannot work, before anything is read."""
  h, s = config.harvest, config.store
  if isinstance(h.sites, str):
    raise UserError(
      f'harvest.sites: write a tuple: --config.harvest.sites="({h.sites!r},)"'
    )
  sites = list(h.sites)
  if not sites or len(set(sites)) < len(sites):
    raise UserError(f'harvest.sites: {sites}; name one or more, each once')
  for key in ('model', 'text', 'store'):
    if not config[key].path:
      raise UserError(f'{key}.path: empty; give --config.{key}.path')
  if h.sequence_length < 2:
    raise UserError(
      f'harvest.sequence_length: {h.sequence_length}; use 2 or more, the '
      'first position is not stored'
    )
  if h.batch_sequences < 1:
    raise UserError(
      f'harvest.batch_sequences: {h.batch_sequences}; use 1 or more'
    )
  if h.rows < 0:
    raise UserError(f'harvest.rows: {h.rows}; use 0 for all rows, or more')
  if not 0 <= h.seed < 2**63:
    raise UserError(f'harvest.seed: {h.seed}; use 0 to 2^63 - 1')
  check_dtype('harvest.compute_dtype', h.compute_dtype)
  check_dtype('store.dtype', s.dtype)
  check_sizes(**sizes(config))
  if h.rows:
    check_rows(h.rows, **sizes(config))


def sizes(config: Config) -> dict[str, int]:
  """The four numbers that cut rows into shards, as arguments of `plan`."""
  s = config.store
  return {
    'rows_per_shard': s.rows_per_shard,
    'rows_per_block': s.rows_per_block,
    'held_out_shards': s.held_out_shards,
    'norm_shards': s.norm_shards,
  }


def recorded(config: Config) -> dict[str, Any]:
  """The config as the manifest keeps it: JSON, without the store's folder."""
  data = config.to_dict()
  data['harvest']['sites'] = list(data['harvest']['sites'])
  del data['store']['path']
  return data
