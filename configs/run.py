"""The config of a run folder: to go on with a run, or a member, as it is.

python launch/train.py --workdir=runs/a --config=configs/run.py:runs/a
"""

from sae_jax.config import Config
from sae_jax.errors import UserError
from sae_jax.train.run import read_config


def get_config(arg: str = '') -> Config:
  """arg: the folder of a training run."""
  if not arg:
    raise UserError('configs/run.py: give the folder, configs/run.py:runs/a')
  return read_config(arg)
