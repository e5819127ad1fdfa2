"""BatchTopK autoencoders (Bussmann et al. 2024, arXiv 2412.06410).

python launch/train.py --workdir=runs/c --config=configs/batchtopk.py:demo
':bussmann' has the paper's numbers, ':demo' fits the quickstart's store.
"""

from sae_jax.config import Config
from sae_jax.errors import UserError
from sae_jax.paths import cache_dir
from sae_jax.train.config import base_config


def get_config(arg: str = 'bussmann') -> Config:
  """arg: 'bussmann' or 'demo'."""
  c = base_config()
  c.act.name = 'batchtopk'
  if arg == 'bussmann':
    return bussmann(c)
  if arg == 'demo':
    return demo(c)
  raise UserError(f'configs/batchtopk.py:{arg}: use bussmann or demo')


def bussmann(c: Config) -> Config:
  """Width 12k, k = 32, on GPT-2 small, a billion tokens.

  Rows are normalised by the store's one mean and scale, not each by its own.
  """
  c.store.site = 'layer_8.resid_pre'
  c.sae.d_in = 768
  c.sae.latents = 12_288
  c.act.k = 32
  c.act.theta_ema = 0.999
  c.loss.aux_k = 512
  c.loss.aux_coef = 1 / 32
  c.optim.lr = 3e-4
  c.optim.b1 = 0.9
  c.optim.b2 = 0.99
  c.train.batch_rows = 4096
  c.train.rows = 1_000_000_000
  c.loss.dead_rows = c.train.get_ref('batch_rows') * 5
  return c


def demo(c: Config) -> Config:
  """Minutes on a laptop; as the TopK demo."""
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
