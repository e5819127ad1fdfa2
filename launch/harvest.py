"""Harvests activations of a language model into a store.

python launch/harvest.py --config=configs/harvest.py:smollm2
The same command goes on where an interrupted harvest stopped. Many at once
write one store: --config.task=0/8 to 7/8, or processes that know each other
(--coordinator). --finalize completes a store whose shards are all there.
"""

from absl import flags
from ml_collections import config_flags

from sae_jax import cli
from sae_jax.harvest.job import harvest
from sae_jax.parallel.processes import define_flags
from sae_jax.store.finish import finalize
from sae_jax.store.manifest import local_root

_CONFIG = config_flags.DEFINE_config_file('config', None, 'Harvest config.')
_FINALIZE = flags.DEFINE_bool(
  'finalize', False, 'Only complete the manifest of a store without gaps.'
)
_JOB = define_flags()
flags.mark_flags_as_required(['config'])


def main() -> None:
  if _FINALIZE.value:
    root = local_root(_CONFIG.value.store.path)
    print(f'{root}: {finalize(root).rows:,} rows, complete')
    return
  with _JOB(_CONFIG.value):
    harvest(_CONFIG.value)


if __name__ == '__main__':
  cli.run(main)
