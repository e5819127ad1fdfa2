"""Says what a training run takes on TPUs or GPUs that are not here.

python launch/plan.py --config=configs/jumprelu.py:gemma_scope \
    --topology=v5e:2x2 --config.mesh.dict=4
Compiles the real step ahead of time; needs pip install 'sae_jax[plan]'.
"""

from sae_jax.scaling import topology

topology.set_environment()  # before JAX looks for devices

import json  # noqa: E402

from absl import flags, logging  # noqa: E402
from ml_collections import config_flags  # noqa: E402

from sae_jax import cli  # noqa: E402
from sae_jax.errors import UserError  # noqa: E402
from sae_jax.paths import write_atomic  # noqa: E402
from sae_jax.scaling import plan, report, search  # noqa: E402
from sae_jax.scaling.rows import rows_of  # noqa: E402

_CONFIG = config_flags.DEFINE_config_file('config', None, 'Training config.')
_TOPOLOGY = flags.DEFINE_string(
  'topology', '', 'Chips to plan for, such as v5p:2x2x4, v5e:4x4 or h100:8.'
)
_SEARCH = flags.DEFINE_bool(
  'search', False, 'Try meshes and micro-batches, recommend one.'
)
_CANDIDATES = flags.DEFINE_integer(
  'candidates', 6, 'How many a search compiles.', lower_bound=1
)
_CHIPS = flags.DEFINE_bool(
  'chips', False, 'List the families, and the chips each needs by arithmetic.'
)
_STORE_DTYPE = flags.DEFINE_string(
  'store_dtype',
  None,
  "Type of the store's rows: bfloat16, float32 or int8; "
  'else that of config.store if it is here, else bfloat16.',
)
_JSON = flags.DEFINE_string(
  'json', None, 'File for all numbers as JSON, - for the output.'
)
flags.mark_flag_as_required('config')


def main() -> None:
  """The work of the program."""
  rows = rows_of(_CONFIG.value, _STORE_DTYPE.value)
  if _CHIPS.value:
    found = plan.families(_CONFIG.value, rows)
    return _show(found, report.chips(found))
  if not _TOPOLOGY.value:
    raise UserError('--topology: give chips such as v5p:2x2x4, or --chips')
  if not _SEARCH.value:
    found = plan.plan(_CONFIG.value, _TOPOLOGY.value, rows)
    return _show(found, report.text(found))
  plans = search.search(_CONFIG.value, _TOPOLOGY.value, _CANDIDATES.value, rows)
  _show(plans, report.text(plans[0]) + '\n\n' + report.table(plans))


def _show(found: dict | list, text: str) -> None:
  data = json.dumps(found, indent=2) + '\n'
  if _JSON.value != '-':
    print(text)
    if _JSON.value:
      write_atomic(_JSON.value, data)
  else:
    print(data, end='')


if __name__ == '__main__':
  logging.use_absl_handler()
  cli.run(main)
