"""Compiled programs on disk: a second start compiles nothing.

JAX keeps them, by program, versions, flags and instruction set. Elsewhere with
JAX_COMPILATION_CACHE_DIR, nowhere with JAX_ENABLE_COMPILATION_CACHE=false.
"""

import contextlib
import os
import re
import warnings
from pathlib import Path

from absl import flags, logging

from sae_jax.paths import cache_dir

_MAX_BYTES = 300_000_000  # then all go; a run of the demo leaves 300,000
_LEAST = 'jax_persistent_cache_min_compile_time_secs'


def use_cache() -> None:
  """Lets JAX keep compiled programs, unless the user said where, or not to.

  For several processes as one job the user must: the first writes, and where
  GPUs tune kernels together those that do not find it would wait for it.
  """
  from jax import config  # not before --help

  said = config.values['jax_compilation_cache_dir'] is not None
  several = getattr(flags.FLAGS, 'coordinator', '')
  if said or several or not config.values['jax_enable_compilation_cache']:
    return
  # XLA cuts programs for CPUs to the number of cores, and JAX asks not for it.
  linux = hasattr(os, 'sched_getaffinity')
  cores = len(os.sched_getaffinity(0)) if linux else os.cpu_count()
  # Compiled code is run: nobody else may write there.
  folder = Path(cache_dir('compiled', f'user{os.getuid()}-{cores}cores'))
  try:
    folder.mkdir(0o700, parents=True, exist_ok=True)
    files = list(folder.glob('*-cache'))
    if sum(path.stat().st_size for path in files) > _MAX_BYTES:
      for path in files:  # (JAX's own bound fails for good after a kill.)
        path.unlink(missing_ok=True)
  except OSError as error:
    return logging.info('compiled programs are not kept: %s', error)
  config.update('jax_compilation_cache_dir', str(folder))
  config.update(_LEAST, 0.0 if os.access(folder, os.W_OK) else float('inf'))
  show = warnings.showwarning

  def shown(message, *rest, **more) -> None:
    """JAX writes in place, and never again what a full disk or a kill left."""
    line = ' '.join(str(message).split())
    found = re.search(r"(\w+) persistent compilation cache .*? '(.*?)'", line)
    if not found:
      return show(message, *rest, **more)
    logging.warning('%s (%s)', line, folder)
    if found[1] == 'writing':  # once is enough
      config.update(_LEAST, float('inf'))
    with contextlib.suppress(OSError):
      for path in folder.glob(f'{found[2]}-*-cache'):
        path.unlink(missing_ok=True)

  warnings.showwarning = shown
