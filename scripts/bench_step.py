"""Times our training step, beside the least that this machine could take.

GLIBC_TUNABLES=glibc.malloc.hugetlb=1 python scripts/bench_step.py \\
  --activation=topk --latents=16384 --k=32
One line of JSON, with peer_step.py's keys and the same rows in the same order:
bench_vs_peers.py reads both. Besides, measured in turn with the steps:
  product_ms  the encoder's product alone, [B, D] x [F, D]: all at once or in
              chunks of rows of which only a maximum is kept, the better one
  stream_ms   what a step must read and write in any case (both matrices, one
              moment of each, the rows), at the rate of a copy on all threads
  ratio       step_ms over the sum of both
  peak_mib    most memory in a step over what was resident before the state;
              state_mib is that of the parameters and one moment
JumpReLU starts at an L0 of --k: see `calibrated`.
"""

import argparse
import concurrent.futures
import json
import math
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import step_clock
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from step_clock import MIB, Rows, Side

import sae_jax
from sae_jax import cli
from sae_jax.config import Config
from sae_jax.errors import UserError
from sae_jax.models.sae import Norm
from sae_jax.parallel.mesh import DATA, make_mesh
from sae_jax.train.config import base_config, validate
from sae_jax.train.rows import put_rows
from sae_jax.train.state import abstract_state, init_state, learned
from sae_jax.train.step import make_step

NORM_ROWS = 2**18  # of which mean and scale are taken, at most
CHUNK = 512  # rows of a product that is not kept
KEPT = 2**32  # bytes of [B, F] up to which the whole product is measured
AT_ONCE = 2**25  # pre-activations that `calibrated` looks at
COPY = 2**28  # bytes of the array that is copied: beyond any cache


def main() -> None:
  p = step_clock.options(__doc__)
  p.add_argument(
    '--compute_dtype', default='float32', help='factors of the products'
  )
  p.add_argument('--dtype', choices=['float32', 'bfloat16'], default='float32',
                 help='the rows, as the step gets them')  # fmt: skip
  p.add_argument('--micro_batches', type=int, default=1)
  p.add_argument('--b1', type=float, default=0.0, help="Adam's first moment")
  p.add_argument(
    '--calibrate', action=argparse.BooleanOptionalAction, default=True,
    help='jumprelu: thresholds for an L0 of --k at the start',
  )  # fmt: skip
  p.add_argument('--bandwidth', type=float, default=0.1,
                 help='jumprelu: of the kernel, a share of theta')  # fmt: skip
  p.add_argument(
    '--bounds', action=argparse.BooleanOptionalAction, default=True,
    help='measures product_ms and stream_ms between the steps',
  )  # fmt: skip
  a, rows = step_clock.begin(p)
  try:
    print(json.dumps(bench(a, rows)))
  except UserError as error:
    cli.stop(error)


def bench(a: argparse.Namespace, rows: Rows) -> dict:
  """The figures of the JSON line."""
  config = make_config(a)
  validate(config)
  norm = norm_of(rows)
  # The penalty weighs the same beside the squared error of raw rows.
  config.loss.l0_coef = a.l0_coefficient / float(norm.scale) ** 2
  with jax.set_mesh(make_mesh(1, 1)):
    if a.activation == 'jumprelu' and a.calibrate:
      calibrated(config, norm, step_clock.batch(a, rows, 0), a.bandwidth)
    compiled = compile_step(config, jnp.dtype(a.dtype))
    now: dict[str, Any] = {}
    bounds = Bounds(a) if a.bounds else None

    def after(i, x):
      if i == 0:
        now['l0_start'] = float(now['metrics']['train/l0'])
      if bounds:
        bounds.measure(x, now['state'].sae.W_enc, i >= a.skip)

    figures = step_clock.run(
      a, rows, lambda: start(a, config, norm, compiled, now), after
    )
    state = now['state']
    if now['metrics']['train/skipped']:
      raise UserError('the last update was not finite: lower --lr')
    size = sum(x.nbytes for x in jax.tree.leaves(learned(state.sae)))
    figures['state_mib'] = round(2 * size / MIB)
  if bounds:
    figures |= bounds.figures(figures['step_ms'])
  about = {
    'peer': 'sae_jax', 'version': sae_jax.__version__, 'jax': jax.__version__
  }  # fmt: skip
  memory: Any = compiled.memory_analysis()
  extra = {
    'compiled_temporary_mib': round(memory.temp_size_in_bytes / MIB),
    'l0_start': round(now['l0_start'], 1), 'theta': config.act.theta,
    'compute_dtype': a.compute_dtype, 'dtype': a.dtype, 'b1': a.b1,
    'micro_batches': a.micro_batches,
  }  # fmt: skip
  return about | figures | extra


def make_config(a: argparse.Namespace) -> Config:
  c = base_config()
  c.sae.d_in, c.sae.latents = a.d, a.latents
  c.act.name, c.act.k = a.activation, a.k
  if a.activation != 'jumprelu':
    c.sae.encoder_norm = (
      0.45  # as configs/topk.py:demo; sparsify starts at 0.58
    )
  c.loss.aux_coef = a.auxk
  c.loss.aux_k = min(c.loss.aux_k, a.latents)
  c.optim.lr, c.optim.b1 = a.lr, a.b1  # no warm-up, no decay: constant
  c.train.batch_rows = a.batch
  c.train.rows = (a.skip + a.steps) * a.batch
  c.train.compute_dtype = a.compute_dtype
  c.train.micro_batches = a.micro_batches
  return c


def norm_of(rows: Rows) -> Norm:
  """Mean and scale of the training rows."""
  total, power, n = 0.0, 0.0, min(rows.train, NORM_ROWS)
  for first in range(0, n, 8192):
    x = rows[first : min(first + 8192, n)].astype(np.float64)
    total, power = total + x.sum(0), power + np.square(x).sum()
  mean = total / n
  scale = math.sqrt(power / n - np.square(mean).sum())
  return Norm(jnp.asarray(mean, jnp.float32), jnp.float32(scale))


def calibrated(config: Config, norm: Norm, x: np.ndarray, share: float) -> None:
  """Sets config.act.theta and bandwidth so that in the first step k latents of
  a row are active at most, on average over its batch x [B, D].

  theta is one quantile of all pre-activations at initialisation. The kernel
  reaches half a bandwidth to both sides of it: with a share of 0.1 it holds
  about as many pre-activations as are active, with one of 1, as in Gemma
  Scope's theta = bandwidth = 0.001, several percent of all.
  """
  F, k = config.sae.latents, config.act.k
  sae = jax.jit(lambda norm: init_state(config, norm).sae)(norm)
  pre = jax.jit(lambda sae, x: sae.pre(sae.norm_in(x)))
  size = max(AT_ONCE // F, 1)
  highest = np.zeros(0, np.float32)  # so far
  for first in range(0, len(x), size):
    part = x[first : first + size]
    z = np.asarray(pre(sae, put_rows(part, [0], len(part))))
    least = highest.min() if len(highest) == k * len(x) else 0
    highest = np.concatenate([highest, z[z > least]])
    if len(highest) > k * len(x):
      highest = np.partition(highest, -k * len(x))[-k * len(x) :]
  if len(highest) < k * len(x):
    raise UserError(
      f'--k={k}: at the start fewer than that of the {F} latents are positive, '
      'so that no threshold gives this L0: lower it, or use --no-calibrate'
    )
  theta = float(highest.min())
  config.act.theta, config.act.bandwidth = theta, share * theta


def compile_step(config: Config, dtype: Any) -> Any:
  """The step of a training job for rows of this dtype, compiled."""
  where = NamedSharding(jax.sharding.get_mesh(), P(DATA, None))
  shape = (config.train.batch_rows, config.sae.d_in)
  x = jax.ShapeDtypeStruct(shape, dtype, sharding=where)
  return make_step(config).lower(abstract_state(config), x).compile()


def start(a, config: Config, norm: Norm, compiled: Any, now: dict) -> Side:
  """Our side; the latest state and metrics are in `now`."""
  now['state'] = jax.block_until_ready(
    jax.jit(lambda norm: init_state(config, norm))(norm)
  )

  def put(x):
    return jax.block_until_ready(put_rows(x.astype(a.dtype), [0], len(x)))

  def step(i, x):
    state, now['metrics'] = compiled(now.pop('state'), x)
    now['state'] = jax.block_until_ready(state)

  @jax.jit
  def codes(sae, x):
    f = sae.encode(x)
    return f, sae.decode(f)

  return Side(put, step, lambda x: jax.device_get(codes(now['state'].sae, x)))


class Bounds:
  """Times the encoder's product and the machine's copy rate between steps."""

  def __init__(self, a: argparse.Namespace):
    self.a, self.times = a, {}
    self.dtype = jnp.dtype(a.compute_dtype)
    self.pool = concurrent.futures.ThreadPoolExecutor(a.threads)
    # Written here: resident before the state is.
    pair = np.ones((2, a.threads, COPY // a.threads), np.uint8)
    self.copies = list(zip(*pair, strict=True))
    rows = math.gcd(CHUNK, a.batch)

    def whole(x, W):
      return jnp.einsum('bd,fd->bf', x, W, preferred_element_type=jnp.float32)

    def most(x, W):
      part = lambda c: whole(c, W).max(-1)
      return jax.lax.map(part, x.reshape(-1, rows, a.d))

    self.products: dict[str, Callable] = {'chunked': jax.jit(most)}
    if 4 * a.batch * a.latents <= KEPT:
      self.products['whole'] = jax.jit(whole)

  def measure(self, x: jax.Array, W: jax.Array, counts: bool) -> None:
    """After a step on x [B, D] that left W [F, D]; kept if it counts."""
    # Without the mesh: what one device has of them, which is all.
    x, W = (v.addressable_data(0).astype(self.dtype) for v in (x, W))
    jax.block_until_ready((x, W))
    for name, product in self.products.items():
      began = time.perf_counter()
      jax.block_until_ready(product(x, W))
      self._keep(name, began, counts)
    began = time.perf_counter()
    list(self.pool.map(lambda pair: np.copyto(*pair), self.copies))
    self._keep('copy', began, counts)

  def _keep(self, name: str, began: float, counts: bool) -> None:
    seconds = time.perf_counter() - began
    if counts:
      self.times.setdefault(name, []).append(seconds)

  def figures(self, step_ms: float) -> dict:
    a = self.a
    found = {name: step_clock.median(s) for name, s in self.times.items()}
    best = min(self.products, key=lambda name: found[name])
    rate = 2 * COPY / found['copy']  # bytes read and written, a second
    arrays = 2 * 4 * a.latents * a.d  # of float32, both matrices
    rows = a.batch * a.d * jnp.dtype(a.dtype).itemsize
    product_ms = 1e3 * found[best]
    stream_ms = 1e3 * (2 * 2 * arrays + rows) / rate
    return {
      'product_ms': round(product_ms, 1), 'product': best,
      'stream_ms': round(stream_ms, 1), 'copy_gb_per_s': round(rate / 1e9, 1),
      'ratio': round(step_ms / (product_ms + stream_ms), 3),
    }  # fmt: skip


if __name__ == '__main__':
  main()
