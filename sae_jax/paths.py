"""Where downloaded and derived files live by default, and atomic writes."""

import os
from pathlib import Path


def cache_dir(*parts: str) -> str:
  """`$SAE_JAX_CACHE/parts`, by default under `~/.cache/sae_jax`."""
  root = os.environ.get('SAE_JAX_CACHE') or '~/.cache/sae_jax'
  return str(Path(root).expanduser().joinpath(*parts))


def write_atomic(path: str | os.PathLike, data: str | bytes) -> None:
  """Writes a whole file or nothing: temporary file, fsync, rename."""
  path = Path(path)
  path.parent.mkdir(parents=True, exist_ok=True)
  temporary = path.with_name(f'{path.name}.{os.getpid()}.tmp')
  raw = data.encode() if isinstance(data, str) else data
  try:
    with open(temporary, 'wb') as file:
      file.write(raw)
      file.flush()
      os.fsync(file.fileno())
    os.replace(temporary, path)
  finally:
    temporary.unlink(missing_ok=True)
