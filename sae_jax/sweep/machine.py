"""What the devices of this machine are, asked by a process of its own.

The program that only starts others must not hold the devices itself.
"""

import json
import subprocess
import sys
from typing import NamedTuple

from sae_jax.errors import UserError
from sae_jax.memory import host_bytes


class Machine(NamedTuple):
  """Where points are trained; 0 for what is not known."""

  platform: str  # 'cpu', 'gpu', 'tpu'
  devices: int
  device_bytes: float  # memory of one; on a CPU all of it
  tflops: float = 0.0  # of a large matrix product in float32 (CPU), or peak
  host_bytes: float = 0.0  # memory beside that of the devices; 0 on a CPU


UNKNOWN = Machine('accelerator', 0, 0.0)


def here(*, speed: bool = False) -> Machine:
  """This machine. speed: measure, or look up, its TFLOP/s too (a second)."""
  command = [sys.executable, '-m', 'sae_jax.sweep.machine', str(int(speed))]
  done = subprocess.run(command, capture_output=True, text=True)
  if done.returncode:
    last = done.stderr.strip().splitlines()[-1:] or ['no message']
    raise UserError(f'the devices of this machine: {last[0]}')
  return Machine(*json.loads(done.stdout.splitlines()[-1]))


def _found(speed: bool) -> Machine:
  import jax

  from sae_jax.train import perf

  first = jax.devices()[0]
  memory = (first.memory_stats() or {}).get('bytes_limit', 0)
  host = host_bytes()
  if first.platform == 'cpu':
    memory, host = host, 0
  rate = perf.peak_tflops() if speed else 0.0
  return Machine(first.platform, jax.device_count(), memory, rate, host)


if __name__ == '__main__':
  print(json.dumps(_found(sys.argv[1] == '1')))
