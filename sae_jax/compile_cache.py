"""Compiled programs on disk: the second start of a job compiles nothing.

JAX keeps them, and knows them by program, versions, flags and instruction set.
JAX_COMPILATION_CACHE_DIR takes another folder,
JAX_ENABLE_COMPILATION_CACHE=false none.
"""

import contextlib
import os
import re
import warnings
from pathlib import Path

from absl import flags, logging

from sae_jax.paths import cache_dir

# A run of the demo leaves 0.3 MB, so a thousand of them.
_MAX_BYTES = 300_000_000
_LEAST = 'jax_persistent_cache_min_compile_time_secs'


def use_cache() -> None:
  """Lets JAX keep compiled programs, unless the user said where, or not to.

  Several processes as one job need a folder that all of them see: where only
  some compile, those wait for the others (GPUs tune kernels together). So there
  it is used when the user names one.
  """
  import jax  # not before --help

  config = jax.config
  said = config.jax_compilation_cache_dir is not None
  several = getattr(flags.FLAGS, 'coordinator', '')
  if said or several or not config.jax_enable_compilation_cache:
    return
  try:
    folder = _folder()
    _prune(folder)
  except (OSError, RuntimeError) as error:
    return logging.info('compiled programs are not kept: %s', error)
  config.update('jax_compilation_cache_dir', str(folder))
  # What is already there is read from a folder that cannot be written.
  least = 0.0 if os.access(folder, os.W_OK) else float('inf')
  config.update(_LEAST, least)
  _mend(folder)


def _folder() -> Path:
  """Of this user (whoever writes there has code run) and number of cores,
  which XLA's programs for CPUs are cut for and JAX does not look at."""
  known = hasattr(os, 'sched_getaffinity')  # not on macOS
  cores = len(os.sched_getaffinity(0)) if known else os.cpu_count()
  folder = Path(cache_dir('compiled', f'user{os.getuid()}-{cores}cores'))
  folder.mkdir(0o700, parents=True, exist_ok=True)
  if folder.stat().st_uid != os.getuid():
    raise PermissionError(f'{folder} is of another user')
  return folder


def _prune(folder: Path) -> None:
  """Removes what was used longest ago, above the bound. (JAX's own bound needs
  locks that some file systems lack, and a folder that can be written.)"""
  files = [(p.stat(), p) for p in folder.glob('*-cache')]
  files.sort(key=lambda f: max(f[0].st_atime, f[0].st_mtime), reverse=True)
  room = _MAX_BYTES
  for stat, path in files:
    room -= stat.st_size
    if room < 0:
      path.unlink(missing_ok=True)


def _mend(folder: Path) -> None:
  """Removes what JAX says it cannot read or could not write: it writes in
  place, and never again what a full disk or a kill left of an entry."""
  import jax

  show = warnings.showwarning

  def shown(message, *rest, **more) -> None:
    line = ' '.join(str(message).split())
    found = re.search(r"(\w+) persistent compilation cache .*? '(.*?)'", line)
    if not found:
      return show(message, *rest, **more)
    logging.warning('%s (%s)', line, folder)
    if found[1] == 'writing':  # once is enough
      jax.config.update(_LEAST, float('inf'))
    with contextlib.suppress(OSError):
      for path in folder.glob(f'{found[2]}-*-cache'):
        path.unlink(missing_ok=True)

  warnings.showwarning = shown
