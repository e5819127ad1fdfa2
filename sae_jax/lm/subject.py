"""A subject model with all that a harvest must know and record of it."""

import dataclasses
import hashlib

import jax
import jax.numpy as jnp
import ml_collections
import tokenizers

from sae_jax.errors import UserError
from sae_jax.lm.config import LMConfig
from sae_jax.lm.model import Params

KINDS = ('gguf',)


@dataclasses.dataclass(frozen=True)
class Subject:
  """A language model, its tokenizer, and the hashes that identify both."""

  name: str
  cfg: LMConfig
  params: Params
  tokenizer: tokenizers.Tokenizer  # adds no special tokens by itself
  bos: int
  eos: int
  pad: int | None
  special: frozenset[int]  # control tokens, never harvested
  weights_sha256: str  # of the weights' file
  tokenizer_sha256: str  # of tokenizer.to_str()


def tokenizer_sha256(tokenizer: tokenizers.Tokenizer) -> str:
  """Hex digest of the tokenizer's full JSON description."""
  return hashlib.sha256(tokenizer.to_str().encode()).hexdigest()


def load_subject(
  model: ml_collections.ConfigDict,
  dtype: jax.typing.DTypeLike = jnp.float32,
) -> Subject:
  """Loads what a config's `model` block names: `kind` and `path`.

  dtype is that of the weight matrices. Raises UserError for an unknown kind,
  a missing or damaged file, an architecture we do not know.
  """
  if model.kind == 'gguf':
    from sae_jax.lm import gguf  # here: its reader is an optional package

    return gguf.load(str(model.path), dtype)
  raise UserError(
    f'model.kind {model.kind!r} is not known; known: {", ".join(KINDS)}'
  )
