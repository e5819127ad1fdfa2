"""What the benchmarks say of the machine they run on."""

import contextlib
import os
import re
import shutil
import subprocess
from pathlib import Path

from sae_jax.memory import host_bytes

# An AMD processor gets MKL's slower kernels unless MKL's own question, whether
# this is an Intel one, is answered with yes.
MKL_SAYS_INTEL = 'int mkl_serv_intel_cpu_true(void) { return 1; }\n'


def fast_mkl(folder: Path) -> Path | None:
  """A library to preload that turns MKL's fast path on; None without cc."""
  compiler = shutil.which('cc') or shutil.which('gcc')
  if compiler is None:
    return None
  source, library = folder / 'intel.c', folder / 'intel.so'
  source.write_text(MKL_SAYS_INTEL)
  subprocess.run(
    [compiler, '-shared', '-fPIC', '-o', library, source], check=True
  )
  return library


def cpu() -> str:
  """The processor's name and how many cores this process may use."""
  found = None
  with contextlib.suppress(OSError):  # /proc is Linux's
    found = re.search(r'model name\s*: (.*)', Path('/proc/cpuinfo').read_text())
  name = found[1] if found else 'unknown processor'
  return f'{name}, {len(os.sched_getaffinity(0))} cores'


def memory_gib() -> float:
  """The machine's memory, or as much of it as this process may have."""
  return host_bytes() / 2**30
