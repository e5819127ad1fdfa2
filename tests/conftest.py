"""Eight virtual CPU devices and a compile cache for the whole suite."""

import os
import tempfile
from pathlib import Path

# Subprocesses inherit these; the cache cuts the sharded tests' time to a
# quarter. Its folder is the user's own: compiled code is executed.
os.environ.setdefault('JAX_PLATFORMS', 'cpu')
os.environ.setdefault(
  'JAX_COMPILATION_CACHE_DIR',
  str(Path(tempfile.gettempdir()) / f'sae_jax_tests_{os.getuid()}'),
)
os.environ.setdefault('JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS', '0')
os.environ.setdefault('JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES', '-1')

import jax  # noqa: E402
import pytest  # noqa: E402
from absl import flags  # noqa: E402

jax.config.update('jax_num_cpu_devices', 8)
flags.FLAGS.mark_as_parsed()

MESHES = [(1, 1), (1, 8), (8, 1), (2, 4)]


@pytest.fixture(params=MESHES, ids=lambda m: f'{m[0]}x{m[1]}')
def mesh(request):
  """Every mesh of the contract, set for the test."""
  from sae_jax.parallel.mesh import make_mesh

  m = make_mesh(*request.param)
  with jax.set_mesh(m):
    yield m
