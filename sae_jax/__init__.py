"""Sparse dictionaries of language-model activations, distributed, on JAX."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
  from sae_jax.errors import UserError as UserError
  from sae_jax.models.sae import SAE as SAE
  from sae_jax.train.run import load as load

__version__ = '0.1.0'


def __getattr__(name: str):
  """Imports the public names when first used: jobs that only read a store
  need neither JAX nor Orbax."""
  if name == 'load':
    from sae_jax.train.run import load as found
  elif name == 'SAE':
    from sae_jax.models.sae import SAE as found
  elif name == 'UserError':
    from sae_jax.errors import UserError as found
  else:
    raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
  return found
