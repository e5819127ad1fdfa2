"""TopK autoencoders with AuxK (Gao et al. 2024, arXiv 2406.04093).

python launch/train.py --workdir=runs/b --config=configs/topk.py:demo
':openai' keeps the paper's optimiser, ':demo' fits the quickstart's store.
"""

from sae_jax.config import Config
from sae_jax.errors import UserError
from sae_jax.paths import cache_dir
from sae_jax.train.config import base_config


def get_config(arg: str = 'openai') -> Config:
  """arg: 'openai' or 'demo'."""
  c = base_config()
  c.act.name = 'topk'
  if arg == 'openai':
    return openai(c)
  if arg == 'demo':
    return demo(c)
  raise UserError(f'configs/topk.py:{arg}: use openai or demo')


def openai(c: Config) -> Config:
  """Width 32k, k = 32, at the width of GPT-2 small; the paper's optimiser.

  Rows are normalised by the store's one mean and scale, not each by its own.
  """
  c.sae.d_in = 768
  c.sae.latents = 32_768
  c.act.k = 32
  c.loss.aux_k = 512
  c.optim.lr = 2e-4
  c.optim.lr_width = 2**14
  c.optim.b1 = 0.9
  c.optim.eps = 6.25e-10
  c.optim.ema = 0.999
  c.train.batch_rows = 131_072
  c.train.rows = 1_300_000_000
  return c


def demo(c: Config) -> Config:
  """Minutes on a laptop; Adam without a first moment, like our JumpReLU."""
  c.store.path = cache_dir('stores', 'smollm2')
  # The k largest of many random latents overshoot: nearer to the best scale
  # (docs/performance.md).
  c.sae.encoder_norm = 0.45
  c.act.k = 32
  c.loss.dead_rows = 100_000
  c.optim.lr = 1e-3
  c.train.rows = 600_000
  c.train.batch_rows = 2048
  rows = c.train.get_ref('rows')
  c.optim.warmup_rows = rows // 20
  c.optim.decay_rows = rows // 5
  c.train.log_rows = rows // 50
  c.train.eval_rows = rows // 10
  c.train.save_rows = rows // 4
  return c
