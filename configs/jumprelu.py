"""JumpReLU autoencoders in the manner of Gemma Scope (arXiv 2408.05147).

python launch/train.py --workdir=runs/a --config=configs/jumprelu.py:demo
':gemma_scope' has the paper's numbers, ':demo' fits the quickstart's store,
':million' is 64 times as wide and runs on a TPU slice of 16 chips.
"""

from sae_jax.config import Config
from sae_jax.errors import UserError
from sae_jax.paths import cache_dir
from sae_jax.train.config import base_config


def get_config(arg: str = 'gemma_scope') -> Config:
  """arg: 'gemma_scope', 'million', 'demo' or 'demo_members'."""
  c = base_config()
  c.act.name = 'jumprelu'
  if arg == 'gemma_scope':
    return gemma_scope(c)
  if arg == 'million':
    return million(gemma_scope(c))
  if arg == 'demo':
    return demo(c)
  if arg == 'demo_members':
    return demo_members(demo(c))
  raise UserError(
    f'configs/jumprelu.py:{arg}: use gemma_scope, million, demo or demo_members'
  )


def gemma_scope(c: Config) -> Config:
  """Width 16k on Gemma 2 2B, 4B tokens (the paper's section 3, table 1)."""
  c.store.site = 'layer_12.resid_post'
  c.sae.d_in = 2304
  c.sae.latents = 16_384
  c.sae.center = False
  c.act.theta = 0.001
  c.act.bandwidth = 0.001
  c.act.log_theta = True
  c.loss.l0_coef = 6e-4
  c.train.batch_rows = 4096
  c.train.rows = 4_000_000_000
  c.loss.l0_warmup_rows = c.train.get_ref('batch_rows') * 10_000
  c.optim.lr = 7e-5
  c.optim.warmup_rows = c.train.get_ref('batch_rows') * 1000
  return c


def million(c: Config) -> Config:
  """2^20 latents; mesh and micro-batches are the planner's for v5p:2x2x4."""
  c.sae.latents = 2**20
  c.optim.lr_width = 16_384
  c.train.batch_rows = 16_384
  c.train.compute_dtype = 'bfloat16'
  c.train.micro_batches = 2
  c.mesh.dict = 16
  return c


def demo(c: Config) -> Config:
  """Minutes on a laptop: a hundredth of a percent of the paper's rows.

  Theta is learned directly and starts inside the distribution of the
  pre-activations, with a kernel wide enough for few rows; warm-ups are shares
  of the run.
  """
  c.store.path = cache_dir('stores', 'smollm2')
  c.act.theta = 0.1
  c.act.bandwidth = 0.1
  c.loss.l0_coef = 1.5e-3
  c.loss.dead_rows = 100_000
  c.optim.lr = 1e-3
  c.train.rows = 600_000
  c.train.batch_rows = 2048
  rows = c.train.get_ref('rows')
  c.loss.l0_warmup_rows = rows // 4
  c.optim.warmup_rows = rows // 20
  c.optim.decay_rows = rows // 5
  c.train.log_rows = rows // 50
  c.train.eval_rows = rows // 10
  c.train.save_rows = rows // 4
  return c


def demo_members(c: Config) -> Config:
  """Four of them at once, from dense to sparse."""
  c.members = tuple(
    {'name': f'l0_coef={coef:g}', 'loss.l0_coef': coef}
    for coef in (5e-4, 1e-3, 2e-3, 4e-3)
  )
  return c
