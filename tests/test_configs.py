"""The recipes in configs/, read as launch/train.py reads them."""

import math
import sys
from pathlib import Path
from unittest import mock

import pytest
from absl import flags
from ml_collections import config_flags

from sae_jax.harvest.config import check_config
from sae_jax.sweep import grid
from sae_jax.train.config import validate
from sae_jax.train.state import make_schedule, steps_of

# ml_collections imports the recipe by load_module.
pytestmark = pytest.mark.filterwarnings(
  'ignore:the load_module:DeprecationWarning'
)

CONFIGS = Path(__file__).parents[1] / 'configs'
TRAINING = [
  'jumprelu.py', 'jumprelu.py:gemma_scope', 'jumprelu.py:million',
  'jumprelu.py:demo', 'jumprelu.py:demo_members',
  'topk.py', 'topk.py:openai', 'topk.py:demo',
  'batchtopk.py', 'batchtopk.py:bussmann', 'batchtopk.py:demo',
  'scaling.py', 'scaling.py:demo', 'scaling.py:demo_jumprelu',
  'scaling.py:gemma2_2b',
]  # fmt: skip
M = 1_000_000


def _load(recipe, **overrides):
  """The config of --config=configs/<recipe> --config.<section>.<key>=..."""
  values = flags.FlagValues()
  config = config_flags.DEFINE_config_file('config', flag_values=values)
  more = [
    f'--config.{name.replace("__", ".")}={value}'
    for name, value in overrides.items()
  ]
  argv = ['train.py', f'--config={CONFIGS / recipe}', *more]
  with mock.patch.object(sys, 'argv', argv):  # it looks there for overrides
    values(argv)
  return config.value


def _expect(config, **expected):
  for name, value in expected.items():
    section, key = name.split('__')
    assert config[section][key] == value, name


@pytest.mark.parametrize('recipe', TRAINING)
def test_every_training_recipe_is_valid(recipe):
  config = _load(recipe)
  validate(config)
  assert config.loss.l0_warmup_rows <= config.train.rows
  assert config.optim.warmup_rows + config.optim.decay_rows <= config.train.rows


@pytest.mark.parametrize('arg', ['demo', 'demo_jumprelu', 'gemma2_2b'])
def test_every_study_is_valid(arg):
  path = f'scaling.py:{arg}'
  points = grid.entries(_load(path), grid.load_sweep(str(CONFIGS / path)))
  widths = {p.changes['sae.latents'] for p in points}
  assert len(widths) >= 3
  if arg == 'demo':
    assert len(points) >= 24 and {512, 16_384} <= widths
    assert len({p.changes['act.k'] for p in points}) >= 3


@pytest.mark.parametrize('recipe', ['smollm2', 'tiny', 'gemma_scope'])
def test_every_harvest_recipe_is_valid(recipe):
  check_config(_load(f'harvest.py:{recipe}', store__path='/somewhere'))


def test_no_recipe_is_left_out_here():
  tested = {name.split(':')[0] for name in TRAINING} | {'harvest.py', 'run.py'}
  assert {path.name for path in CONFIGS.glob('*.py')} == tested


def test_gemma_scope_has_the_paper_s_numbers():
  """arXiv 2408.05147, section 3 and table 1: 16k latents, Gemma 2 2B."""
  c = _load('jumprelu.py:gemma_scope')
  _expect(
    c,
    act__name='jumprelu', act__theta=0.001, act__bandwidth=0.001,
    sae__d_in=2304, sae__latents=2**14, sae__center=False, sae__pre_bias=True,
    loss__l0_coef=6e-4, loss__target_l0=0, loss__l0_warmup_rows=10_000 * 4096,
    optim__lr=7e-5, optim__lr_width=0, optim__b1=0, optim__b2=0.999,
    optim__eps=1e-8, optim__clip_norm=0, optim__ema=0, optim__decay_rows=0,
    optim__warmup_rows=1000 * 4096,
    train__batch_rows=4096, train__rows=4000 * M,
  )  # fmt: skip
  lr = make_schedule(c)
  last = steps_of(c.train.rows, c.train.batch_rows) - 1
  assert lr(0) == pytest.approx(7e-6, rel=1e-5)
  assert lr(999) < lr(1000) == lr(last) == pytest.approx(7e-5, rel=1e-5)


def test_openai_has_the_paper_s_numbers():
  """arXiv 2406.04093, appendix A; lr as in the authors' code."""
  c = _load('topk.py:openai')
  _expect(
    c,
    act__name='topk', act__k=32, sae__pre_bias=True, sae__center=True,
    loss__aux_coef=1 / 32, loss__aux_k=512, loss__dead_rows=10 * M,
    optim__lr=2e-4, optim__lr_width=2**14, optim__b1=0.9, optim__b2=0.999,
    optim__eps=6.25e-10, optim__ema=0.999, optim__clip_norm=0,
    optim__warmup_rows=0, optim__decay_rows=0,
    train__batch_rows=131_072,
  )  # fmt: skip
  for latents in (2**14, 2**15, 2**20):
    c.sae.latents = latents
    lr, expected = make_schedule(c), 2e-4 / math.sqrt(latents / 2**14)
    last = steps_of(c.train.rows, c.train.batch_rows) - 1
    assert lr(0) == lr(last) == pytest.approx(expected, rel=1e-5)


def test_batchtopk_has_the_paper_s_numbers():
  """arXiv 2412.06410, section 4; the rest as in the authors' code."""
  c = _load('batchtopk.py:bussmann')
  _expect(
    c,
    act__name='batchtopk', act__k=32, act__theta_ema=0.999, sae__d_in=768,
    sae__latents=16 * 768, sae__pre_bias=True, loss__aux_coef=1 / 32,
    loss__aux_k=512, loss__dead_rows=5 * 4096,
    optim__lr=3e-4, optim__lr_width=0, optim__b1=0.9, optim__b2=0.99,
    optim__eps=1e-8, optim__ema=0, optim__warmup_rows=0, optim__decay_rows=0,
    train__batch_rows=4096, train__rows=1000 * M,
  )  # fmt: skip
  half = _load('batchtopk.py:bussmann', train__batch_rows=2048)
  assert half.loss.dead_rows == 5 * 2048


def test_gemma_scope_s_warm_ups_are_steps_at_any_batch():
  c = _load('jumprelu.py:gemma_scope', train__batch_rows=256)
  _expect(
    c,
    train__batch_rows=256, train__rows=4000 * M,
    loss__l0_warmup_rows=10_000 * 256, optim__warmup_rows=1000 * 256,
  )  # fmt: skip
  validate(c)


@pytest.mark.parametrize(
  'recipe', ['jumprelu.py:demo', 'topk.py:demo', 'batchtopk.py:demo']
)
def test_the_demos_warm_ups_and_reports_are_shares_of_the_run(recipe):
  rows = 60_000
  c = _load(recipe, train__rows=rows)
  ramp = rows // 4 if recipe.startswith('jumprelu') else 0
  _expect(
    c,
    train__rows=rows, train__batch_rows=2048, loss__l0_warmup_rows=ramp,
    optim__warmup_rows=rows // 20, optim__decay_rows=rows // 5,
    train__log_rows=rows // 50, train__eval_rows=rows // 10,
    train__save_rows=rows // 4,
  )  # fmt: skip
  validate(c)


def test_a_warm_up_of_its_own_changes_nothing_else():
  expected = _load('jumprelu.py:gemma_scope').to_dict()
  expected['optim']['warmup_rows'] = 5
  found = _load('jumprelu.py:gemma_scope', optim__warmup_rows=5)
  assert found.to_dict() == expected
