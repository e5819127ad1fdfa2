"""Small stores of the tiny model, and looks at them."""

import damage
import numpy as np
from tiny_harvest import SITES, tiny_config, tiny_subject

from sae_jax.harvest.job import harvest
from sae_jax.harvest.repair import repair
from sae_jax.harvest.verify import verify_store

SUBJECT = tiny_subject()
SITE = f'sites/{SITES[0]}'


def made(text, root, **values):
  config = tiny_config(text, root)
  for key, value in values.items():
    config.store[key] = value
  harvest(config, SUBJECT)
  return root


def look(root, rows=None, **kwargs):
  return verify_store(root, rows=rows, **({'subject': SUBJECT} | kwargs))


def found_by(root, **kwargs):
  """{check: its problems' lines} of those that have any."""
  return {
    check.name: [problem.text for problem in check.problems]
    for check in look(root, **kwargs)
    if check.problems
  }


def mend(root, checks=None, **kwargs):
  kwargs = {'subject': SUBJECT} | kwargs
  return repair(root, checks or look(root), **kwargs)


def move(amount):
  """Moves row 7 by a part of its norm."""

  def change(rows):
    step = np.zeros(rows.shape[1])
    step[2] = amount * np.linalg.norm(rows[7].astype(float))
    rows[7] = (rows[7] + step).astype(rows.dtype)

  return change


def flipped(part, shard):
  """Flips a byte of a file."""
  return lambda root: damage.flip(damage.path_of(root, part, shard))
