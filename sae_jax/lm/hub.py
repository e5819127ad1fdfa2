"""Models by name from the Hugging Face hub, through its local cache."""

from pathlib import Path

import huggingface_hub
from huggingface_hub import errors

from sae_jax.errors import UserError

# What a load reads, nothing else: repositories hold the same weights in up to
# four formats.
_PATTERNS = ['*.json', 'tokenizer.model', 'merges.txt', '*.jinja']
_IGNORED = ['*/*']  # subfolders: other formats

# The hub's answers are OSErrors too; its client's broken connections are not,
# and which client it is changes.
_HTTP_ERROR: type[Exception] = errors.HTTPError  # pyright: ignore


def fetch(name: str, cached_only: bool = False, weights: str = '') -> Path:
  """The folder of a model `org/name`, downloaded where it is not cached.

  weights: the file or index of weights that is wanted, 'model...' without.
  Raises UserError, in one line with what to do: no such model, a licence to
  accept, no network.
  """
  stem = weights.split('.')[0] or 'model'
  try:
    return Path(
      huggingface_hub.snapshot_download(
        name,
        allow_patterns=[*_PATTERNS, f'{stem}*.safetensors'],
        ignore_patterns=_IGNORED,
        local_files_only=cached_only,
      )
    )
  except errors.GatedRepoError as error:
    raise UserError(
      f'model.path: {name} asks for consent: accept its licence at '
      f'https://huggingface.co/{name}, then `hf auth login` (or set HF_TOKEN)'
    ) from error
  except errors.RepositoryNotFoundError as error:
    raise UserError(
      f'model.path: the hub has no model {name!r} that you may read: check the '
      'name, or `hf auth login` if it is private'
    ) from error
  except errors.HFValidationError as error:
    raise UserError(
      f'model.path: {name!r} is neither here nor a name on the hub (org/name)'
    ) from error
  except (_HTTP_ERROR, OSError) as error:
    # No network, HF_HUB_OFFLINE=1, a full disk: the latter
    reason = ' '.join(str(error).split())[:160]
    raise UserError(
      f'model.path: cannot fetch {name} from the hub, and the cache has no '
      f'whole copy: download it where there is a network, then give its folder '
      f'({type(error).__name__}: {reason})'
    ) from error
