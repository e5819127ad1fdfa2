"""Writes the JobSet of a run on TPU slices of GKE, for kubectl.

python launch/gke/render.py --name=sae-a --image=REGISTRY/sae_jax:TAG \
  --accelerator=tpu-v5p-slice --topology=2x2x4 --claim=runs \
  --command='python launch/train.py --coordinator=auto --workdir=/data/runs/a
  --config=configs/topk.py:demo' | kubectl apply -f -
"""

import json
import math
import re
import shlex
import string
from pathlib import Path

from absl import flags

from sae_jax import cli
from sae_jax.errors import UserError

TEMPLATE = Path(__file__).parent / 'jobset.yaml'

_NAME = flags.DEFINE_string('name', None, 'Name of the JobSet.')
_IMAGE = flags.DEFINE_string('image', None, 'As launch/gke/Dockerfile makes.')
_COMMAND = flags.DEFINE_string('command', None, 'What every host runs.')
_ACCELERATOR = flags.DEFINE_string(
  'accelerator', None, 'tpu-v5p-slice, tpu-v5-lite-podslice, tpu-v6e-slice...'
)
_TOPOLOGY = flags.DEFINE_string('topology', None, 'Of a slice: 2x2x4, 4x4.')
_CHIPS = flags.DEFINE_integer('chips_per_host', 4, 'Of the node pool.')
_SLICES = flags.DEFINE_integer('slices', 1, 'How many slices.')
_CLAIM = flags.DEFINE_string(
  'claim', None, 'PersistentVolumeClaim (ReadWriteMany) of stores and runs.'
)
_MOUNT = flags.DEFINE_string('mount', '/data', 'Where the command sees it.')
_RESTARTS = flags.DEFINE_integer('max_restarts', 100, 'Of the whole JobSet.')
_GRACE = flags.DEFINE_integer('grace_seconds', 300, 'From SIGTERM to SIGKILL.')
_LIBTPU = flags.DEFINE_string(
  'libtpu_init_args', '', 'XLA flags for TPUs: docs/clusters.md.'
)
flags.mark_flags_as_required(
  ['name', 'image', 'command', 'accelerator', 'topology', 'claim']
)


def main() -> None:
  name, chips = str(_NAME.value), _CHIPS.value
  # Pods are called NAME-slice-0-0-abcde, in at most 63 letters.
  if not re.fullmatch(r'[a-z]([a-z0-9-]{0,38}[a-z0-9])?', name):
    raise UserError(
      f'--name={name}: use up to 40 small letters, digits and -, beginning '
      'with a letter'
    )
  topology = str(_TOPOLOGY.value)
  if not re.fullmatch(r'[1-9]\d*(x[1-9]\d*){1,2}', topology):
    raise UserError(f'--topology={topology}: write it as 4x4 or 2x2x4')
  total = math.prod(map(int, topology.split('x')))
  if chips < 1 or total % chips:
    raise UserError(
      f'--topology={topology} has {total} chips, not a multiple of '
      f'--chips_per_host={chips}: give the chips of one node'
    )
  for flag, least in ((_SLICES, 1), (_GRACE, 1), (_RESTARTS, 0)):
    if flag.value < least:
      raise UserError(f'--{flag.name}={flag.value}: give {least} or more')
  if not re.fullmatch(r'(/[\w.-]+)+', str(_MOUNT.value)):
    raise UserError(f'--mount={_MOUNT.value}: give a path like /data')
  try:
    command = shlex.split(str(_COMMAND.value))
  except ValueError as error:
    raise UserError(f'--command: {error}: mend its quotes') from error
  values = {
    'NAME': name,
    'IMAGE': _IMAGE.value,
    'COMMAND': command,
    'ACCELERATOR': _ACCELERATOR.value,
    'TOPOLOGY': topology,
    'HOSTS': total // chips,
    'CHIPS': chips,
    'SLICES': _SLICES.value,
    'CLAIM': _CLAIM.value,
    'MOUNT': _MOUNT.value,
    'MAX_RESTARTS': _RESTARTS.value,
    'GRACE_SECONDS': _GRACE.value,
    'LIBTPU_INIT_ARGS': _LIBTPU.value,
  }
  print(render(values), end='')


def render(values: dict) -> str:
  """jobset.yaml with its ${NAME}s replaced; lists and texts in JSON, which is
  YAML, so that no value can change the structure."""
  text = {
    key: value if key == 'MOUNT' else json.dumps(value)
    for key, value in values.items()
  }
  # Comments may speak of ${...}.
  lines = TEMPLATE.read_text('utf-8').splitlines(keepends=True)
  body = ''.join(line for line in lines if not line.lstrip().startswith('#'))
  return string.Template(body).substitute(text)


if __name__ == '__main__':
  cli.run(main)
