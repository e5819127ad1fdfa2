"""Trains a sparse autoencoder on a store of activations.

python launch/train.py --workdir=runs/a --config=configs/jumprelu.py:demo
The same command goes on where an interrupted run stopped.
"""

from absl import flags
from ml_collections import config_flags

from sae_jax import cli
from sae_jax.train.loop import train

_CONFIG = config_flags.DEFINE_config_file('config', None, 'Training config.')
_WORKDIR = flags.DEFINE_string('workdir', None, 'Folder of the run.')
flags.mark_flag_as_required('config')
flags.register_validator('workdir', bool, 'give the folder of the run')

if __name__ == '__main__':
  cli.run(lambda: train(_CONFIG.value, str(_WORKDIR.value)) and None)
