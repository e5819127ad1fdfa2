"""Times checkpoints: what a save keeps the loop from, what it takes in all.

python scripts/bench_checkpoint.py --latents=24576 --width=2048
JAX_NUM_CPU_DEVICES=8 python scripts/bench_checkpoint.py --dict=8
The rate of the bare disk is dd's, with as many bytes.
"""

import argparse
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from sae_jax.models.sae import Norm
from sae_jax.parallel.mesh import make_mesh
from sae_jax.train import integrity
from sae_jax.train.checkpoints import Checkpoints, folder, newest
from sae_jax.train.config import base_config
from sae_jax.train.state import abstract_state, init_state


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument('--latents', type=int, default=24576)
  parser.add_argument('--width', type=int, default=2048)
  parser.add_argument('--data', type=int, default=1)
  parser.add_argument('--dict', type=int, default=1)
  parser.add_argument('--saves', type=int, default=5)
  parser.add_argument('--folder', default=tempfile.gettempdir())
  parser.add_argument('--restore', action='store_true', help='only read')
  args = parser.parse_args()
  config = base_config()
  config.sae.latents, config.sae.d_in = args.latents, args.width
  run = Path(args.folder) / 'bench_checkpoint'
  with jax.set_mesh(make_mesh(args.data, args.dict)):
    if args.restore:
      restore(config, run)
      return
    shutil.rmtree(run, ignore_errors=True)
    try:
      size = save(config, run, args.saves)
      again = [sys.executable, __file__, *sys.argv[1:], '--restore']
      subprocess.run(again, check=True)
      bare_disk(run, size)
    finally:
      shutil.rmtree(run, ignore_errors=True)


def save(config, run: Path, saves: int) -> int:
  """Saves with training going on meanwhile; the bytes of the state."""
  norm = Norm(jnp.zeros(config.sae.d_in), jnp.float32(1))
  state = jax.jit(lambda norm: init_state(config, norm))(norm)
  # Stands for a step: writes every leaf, into donated buffers.
  one = lambda x: x + jnp.ones((), x.dtype)
  step = jax.jit(lambda s: jax.tree.map(one, s), donate_argnums=0)
  size = sum(x.nbytes for x in jax.tree.leaves(state))
  print(f'state: {size / 1e6:.0f} MB, {jax.device_count()} device(s)')
  time_sums(integrity.named(state), size)
  blocks, totals = [], []
  with Checkpoints(run, 2, 0) as checkpoints:
    checkpoints.prepare(state)
    for i in range(saves):
      state = jax.block_until_ready(step(state))
      own = time.thread_time()
      checkpoints.save(i, state, {})
      own = 1e3 * (time.thread_time() - own)
      taken = checkpoints.timings()
      while 'perf/save_s' not in taken:
        state = jax.block_until_ready(step(state))
        taken |= checkpoints.timings()
      blocks.append(taken['perf/save_block_ms'])
      totals.append(taken['perf/save_s'])
      print(
        f'save {i}: blocks {blocks[-1]:.1f} ms ({own:.1f} ms of CPU), '
        f'{totals[-1]:.2f} s in all'
      )
  middle = statistics.median
  stored = sum(
    f.stat().st_size
    for f in (folder(run) / str(saves - 1)).rglob('*') if f.is_file()
  )  # fmt: skip
  print(
    f'median of {saves}: blocks {middle(blocks):.1f} ms, '
    f'{middle(totals):.2f} s in all, {size / middle(totals) / 1e9:.2f} GB/s; '
    f'{stored / 1e6:.0f} MB on disk'
  )
  return size


def time_sums(leaves, size: int) -> None:
  sums = lambda: jax.block_until_ready(integrity.sums(leaves))
  sums()
  best = min(timed(sums) for _ in range(3))
  temporary: Any = integrity.sums.lower(leaves).compile().memory_analysis()
  print(
    f'sums: {1e3 * best:.0f} ms, {size / best / 1e9:.1f} GB/s, '
    f'{temporary.temp_size_in_bytes / 1e6:.0f} MB of temporaries a device'
  )


def restore(config, run: Path) -> None:
  """In a process of its own, so that its peak memory is the restore's."""
  abstract = abstract_state(config)
  jax.block_until_ready(jnp.zeros(1))
  before = peak()
  seconds = timed(lambda: kept.append(newest(run, abstract)))
  size = sum(x.nbytes for x in jax.tree.leaves(kept[0][1]))
  print(
    f'restore with its sums: {seconds:.2f} s, {size / seconds / 1e9:.2f} GB/s, '
    f'host memory rose by {(peak() - before) / 1e6:.0f} MB at most'
  )


def bare_disk(run: Path, size: int) -> None:
  target = f'of={run / "dd"}'
  command = ['dd', 'if=/dev/zero', target, 'bs=1M', f'count={size >> 20}']
  seconds = timed(
    lambda: subprocess.run(
      [*command, 'conv=fdatasync'], check=True, capture_output=True
    )
  )
  print(f'dd: {seconds:.2f} s, {size / seconds / 1e9:.2f} GB/s')


def timed(call) -> float:
  began = time.perf_counter()
  call()
  return time.perf_counter() - began


def peak() -> int:
  """Most bytes this process ever had in memory (Linux)."""
  status = Path('/proc/self/status').read_text()
  return int(status.split('VmHWM:')[1].split()[0]) * 1024


kept: list = []

if __name__ == '__main__':
  main()
