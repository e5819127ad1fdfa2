"""Trains a sparse autoencoder on a store of activations.

python launch/train.py --workdir=runs/a --config=configs/jumprelu.py:demo
The same command goes on where an interrupted run stopped. Several processes
are one job: the same command for each, with --coordinator=HOST:PORT
--processes=N --process_id=0 to N-1, or --coordinator=auto on a cluster.
"""

from absl import flags
from ml_collections import config_flags

from sae_jax import cli
from sae_jax.parallel.processes import define_flags
from sae_jax.train.config import validate
from sae_jax.train.loop import train

_CONFIG = config_flags.DEFINE_config_file('config', None, 'Training config.')
_WORKDIR = flags.DEFINE_string('workdir', None, 'Folder of the run.')
_JOB = define_flags()
flags.mark_flag_as_required('config')
flags.register_validator('workdir', bool, 'give the folder of the run')


def main() -> None:
  config = _CONFIG.value
  validate(config)  # before waiting for other processes
  with _JOB(config):
    train(config, str(_WORKDIR.value))


if __name__ == '__main__':
  cli.run(main)
