"""Times members of one job against the same runs one after the other.

python scripts/bench_members.py --members=8 --steps=100 --pairs=3
First the steps alone, on one batch; then whole jobs of `train` in this process,
with compilation, input, evaluation and the last save. Medians of paired runs.
"""

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import jax
import numpy as np

from sae_jax.parallel.mesh import DATA, make_mesh, spec
from sae_jax.store.create import write_arrays
from sae_jax.train import members
from sae_jax.train.config import base_config, member_configs
from sae_jax.train.loop import train
from sae_jax.train.step import make_step

SITE = 'layer_0.resid_post'


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument('--act', default='topk')
  parser.add_argument('--members', type=int, default=8)
  parser.add_argument('--latents', type=int, default=2048)
  parser.add_argument('--width', type=int, default=576)
  parser.add_argument('--batch', type=int, default=2048)
  parser.add_argument('--steps', type=int, default=100)
  parser.add_argument('--pairs', type=int, default=3)
  parser.add_argument('--turns', type=int, default=5, help='of the bare steps')
  args = parser.parse_args()
  with tempfile.TemporaryDirectory() as folder:
    config = config_of(args, Path(folder) / 'store')
    write_store(args, Path(config.store.path))
    with jax.set_mesh(make_mesh(1, 1)):
      steps(args, config)
    jobs(args, config, Path(folder))


def config_of(args, store: Path):
  c = base_config()
  c.store.path, c.store.site = str(store), SITE
  c.sae.d_in, c.sae.latents, c.act.name = args.width, args.latents, args.act
  c.act.theta = c.act.bandwidth = 0.1
  c.train.batch_rows, c.train.rows = args.batch, args.steps * args.batch
  c.train.eval_rows = max(args.steps // 4, 1) * args.batch
  c.train.log_rows = c.train.eval_rows
  c.members = tuple(
    {'seed': i, 'optim.lr': 1e-4 * (1 + i)} for i in range(args.members)
  )
  return c


def write_store(args, root: Path) -> None:
  """20 batches of rows: sums of a few directions, and noise."""
  rng = np.random.default_rng(0)
  atoms = rng.normal(size=(4 * args.width, args.width)).astype(np.float32)
  n = 21 * args.batch
  f = np.where(rng.random((n, len(atoms))) < 0.01, 1, 0).astype(np.float32)
  rows = f @ atoms + 0.1 * rng.normal(size=(n, args.width)).astype(np.float32)
  write_arrays(
    root,
    {SITE: rows},
    rows_per_shard=args.batch,
    rows_per_block=64,
    held_out_shards=1,
  )


def steps(args, config) -> None:
  """Milliseconds a step of all members."""
  rows = np.random.default_rng(1).normal(size=(args.batch, args.width))
  x = jax.device_put(rows.astype(np.float32), spec(DATA, None))
  mean, scale = np.zeros(args.width, np.float32), np.float32(args.width**0.5)
  job = members.make_job(config, Path(), make_step)
  start = lambda: [members.initial(m, mean, scale) for m in job.members]
  single = [make_step(m.config) for m in job.members]
  apart, together = start(), job.join(iter(start()))

  def one_by_one():
    for i, step in enumerate(single):
      apart[i], metrics = step(apart[i], x)
    return metrics

  def stacked():
    nonlocal together
    together, metrics = job.step(together, x)
    return metrics

  times: dict[str, list[float]] = {'one by one': [], 'stacked': []}
  for turn in range(args.turns + 1):
    for name, run in zip(times, (one_by_one, stacked), strict=True):
      seconds = timed(lambda run=run: jax.block_until_ready(run()))
      if turn:
        times[name].append(1e3 * seconds)
  report('steps of all members, ms', times)


def jobs(args, config, folder: Path) -> None:
  """Seconds from start to end."""
  times: dict[str, list[float]] = {'one by one': [], 'stacked': []}
  for pair in range(args.pairs):
    single = member_configs(config)

    def one_by_one(pair=pair, single=single):
      for i, member in enumerate(single):
        train(member, str(folder / f'{pair}_{i}'))

    stacked = lambda pair=pair: train(config, str(folder / f'{pair}'))
    times['one by one'].append(timed(one_by_one))
    times['stacked'].append(timed(stacked))
  report('whole jobs, s', times)


def timed(call) -> float:
  began = time.perf_counter()
  call()
  return time.perf_counter() - began


def report(what: str, times: dict[str, list[float]]) -> None:
  middle = {name: statistics.median(t) for name, t in times.items()}
  apart, together = times.values()
  ratio = statistics.median(a / b for a, b in zip(apart, together, strict=True))
  each = ', '.join(f'{name} {t:.4g}' for name, t in middle.items())
  print(f'{what}: {each}; ratio of the pairs {ratio:.2f}', flush=True)


if __name__ == '__main__':
  main()
