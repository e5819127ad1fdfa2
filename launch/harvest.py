"""Harvests activations of a language model into a store.

python launch/harvest.py --config=configs/harvest.py:smollm2
The same command goes on where an interrupted harvest stopped.
"""

from absl import flags
from ml_collections import config_flags

from sae_jax import cli
from sae_jax.harvest.job import harvest

_CONFIG = config_flags.DEFINE_config_file('config', None, 'Harvest config.')
flags.mark_flags_as_required(['config'])

if __name__ == '__main__':
  cli.run(lambda: harvest(_CONFIG.value) and None)
