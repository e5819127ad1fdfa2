"""Studies: grids of dictionaries, and what to learn from them.

python launch/sweep.py --config=configs/scaling.py:demo --workdir=studies/demo
python launch/fit_laws.py --study=studies/demo
':demo' fits the quickstart's model and two CPU cores, ':demo_jumprelu' looks
for equal L0 first, ':gemma2_2b' is of the size of Gemma Scope's.
"""

from collections.abc import Iterator
from typing import Any

from sae_jax.config import Config
from sae_jax.errors import UserError
from sae_jax.paths import cache_dir
from sae_jax.sweep.search import Halving, TargetL0
from sae_jax.train.config import base_config

NAMES = ('demo', 'demo_jumprelu', 'gemma2_2b')


def get_config(arg: str = 'demo') -> Config:
  """What all points have in common."""
  c = base_config()
  # Seeds differ in the weights, not in the order of the batches: points that
  # differ in them still share a batch stream.
  c.store.seed = 0
  match arg:
    case 'demo':
      return demo(c)
    case 'demo_jumprelu':
      return demo_jumprelu(demo(c))
    case 'gemma2_2b':
      return gemma2_2b(c)
  raise UserError(f'configs/scaling.py:{arg}: use one of {", ".join(NAMES)}')


def sweep(arg: str = 'demo') -> Iterator[dict[str, Any]]:
  """What the points differ in."""
  match arg:
    case 'demo':
      widths = [2**i for i in range(9, 15)]
      for latents in widths:
        for k in (16, 32, 64):
          yield {'sae.latents': latents, 'act.k': k}
      for latents in widths[::2]:
        for lr in (3e-4, 3e-3):
          yield {'sae.latents': latents, 'act.k': 32, 'optim.lr': lr}
      for latents in widths[:2]:
        yield {'sae.latents': latents, 'act.k': 32, 'seed': 1}
      # Narrow ones for as long as wide ones take: the best width at a compute
      # lies between widths that were tried.
      for latents in widths[:3]:
        yield {'sae.latents': latents, 'act.k': 32, 'train.rows': 2_400_000}
    case 'demo_jumprelu':
      for latents in (512, 1024, 2048):
        for l0 in (16, 32):
          # L0 last, and on all rows: it moves with the rate and the rows.
          yield {
            'sae.latents': latents,
            'optim.lr': Halving((3e-4, 1e-3, 3e-3), rows=50_000),
            'loss.l0_coef': TargetL0(l0, low=3e-4, high=1e-2),
          }
    case 'gemma2_2b':
      for i in range(14, 21):
        rows = {14: 4_000_000_000, 20: 16_000_000_000}.get(i, 8_000_000_000)
        for target in (20, 50, 100):
          yield {
            'sae.latents': 2**i, 'loss.target_l0': float(target),
            'train.rows': rows,
          }  # fmt: skip
        for lr in (3.5e-5, 1.4e-4):
          yield {
            'sae.latents': 2**i, 'loss.target_l0': 50.0, 'train.rows': rows,
            'optim.lr': lr,
          }  # fmt: skip


def demo(c: Config) -> Config:
  """TopK on SmolLM2. The learning rate is constant after its warm-up: the loss
  on the way is what a shorter run would have ended with."""
  c.store.path = cache_dir('stores', 'smollm2')
  c.act.name = 'topk'
  c.sae.encoder_norm = 0.45  # as configs/topk.py:demo
  c.loss.dead_rows = 100_000
  # As soon as one latent is dead AuxK takes as long as all else, and few are.
  c.loss.aux_coef = 0.0
  c.optim.lr = 1e-3
  c.train.rows = 600_000
  c.train.batch_rows = 2048
  c.optim.warmup_rows = 30_000
  rows = c.train.get_ref('rows')
  c.train.log_rows = rows // 64
  c.train.eval_rows = rows // 16
  c.train.eval_size = 4096
  c.train.save_rows = rows // 4
  return c


def demo_jumprelu(c: Config) -> Config:
  """JumpReLU as in configs/jumprelu.py:demo, for 200,000 rows."""
  c.act.name = 'jumprelu'
  c.sae.encoder_norm = 1.0
  c.act.theta = c.act.bandwidth = 0.1
  c.train.rows = 200_000
  c.optim.warmup_rows = c.train.get_ref('rows') // 20
  c.loss.l0_warmup_rows = c.train.get_ref('rows') // 4
  return c


def gemma2_2b(c: Config) -> Config:
  """Gemma Scope's optimiser (arXiv 2408.05147, section 3) on its widths, with
  the quadratic penalty of Gemma Scope 2 so that points have equal L0. A host of
  eight accelerators: the dictionary is split over them."""
  c.store.path = cache_dir('stores', 'gemma2_2b')
  c.store.site = 'layer_12.resid_post'
  c.sae.d_in = 2304
  c.act.theta = c.act.bandwidth = 0.001
  c.act.log_theta = True
  c.train.rows = 8_000_000_000
  c.train.batch_rows = 4096
  c.loss.l0_coef = 6e-4
  c.loss.l0_warmup_rows = c.train.get_ref('batch_rows') * 50_000
  c.optim.lr = 7e-5
  c.optim.warmup_rows = c.train.get_ref('batch_rows') * 1000
  c.train.log_rows = 10_000_000
  c.train.eval_rows = 100_000_000
  c.train.eval_size = 65_536
  c.train.save_rows = 250_000_000
  c.mesh.dict = 8
  return c
