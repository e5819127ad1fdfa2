"""Sites, edits, early stop and mesh of the subject model."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sae_jax.errors import UserError
from sae_jax.lm import model
from sae_jax.lm.config import LMConfig

pytestmark = pytest.mark.smoke

CFG = LMConfig(
  vocab=50, d_model=12, layers=3, heads=4, kv_heads=2, head_dim=6, d_mlp=20
)
TOKENS = np.random.default_rng(0).integers(0, 50, (2, 9), dtype=np.int32)
EVERY = tuple(f'layer_{i}.{s}' for i in range(3) for s in model.STEPS)


@pytest.fixture(scope='module')
def params():
  return model.init(jax.random.key(0), CFG)


def run(params, **options):
  return model.forward(params, CFG, TOKENS, **options)


def dots(**options):
  """How many matrix products the forward pass traces."""
  shapes = jax.eval_shape(lambda: model.init(jax.random.key(0), CFG))
  jaxpr = jax.make_jaxpr(
    lambda p: model.forward(p, CFG, TOKENS, **options)._asdict()
  )(shapes)
  return str(jaxpr).count('dot_general')


def test_sites_have_their_width_and_do_not_change_the_logits(params):
  got = run(params, sites=EVERY)
  np.testing.assert_array_equal(got.logits, run(params).logits)
  assert set(got.activations) == set(EVERY)
  for site, x in got.activations.items():
    assert x.shape == (2, 9, model.site_width(CFG, site))
  assert model.site_width(CFG, 'layer_0.attn_z') == 24


def test_the_stream_adds_up(params):
  a = run(params, sites=EVERY, logits=False).activations
  for i in range(3):
    of = lambda s, i=i: a[f'layer_{i}.{s}']
    whole = of('resid_pre') + of('attn_out') + of('mlp_out')
    np.testing.assert_allclose(whole, of('resid_post'), atol=1e-5)
  np.testing.assert_array_equal(a['layer_0.resid_post'], a['layer_1.resid_pre'])
  z = a['layer_1.attn_z'] @ params['layers'][1]['w_o']
  np.testing.assert_allclose(z, a['layer_1.attn_out'], atol=1e-5)


def test_identity_edits_change_nothing(params):
  got = run(params, edits={site: lambda x: x for site in EVERY})
  np.testing.assert_array_equal(got.logits, run(params).logits)


@pytest.mark.parametrize(
  'step, weight',
  [('attn_z', 'w_o'), ('attn_out', 'w_o'), ('mlp_in', 'w_up'),
   ('mlp_out', 'w_down')],
)  # fmt: skip
def test_a_zero_edit_is_an_ablation(params, step, weight):
  layers = list(params['layers'])
  layers[1] = layers[1] | {weight: jnp.zeros_like(layers[1][weight])}
  want = model.forward(params | {'layers': layers}, CFG, TOKENS).logits
  got = run(params, edits={f'layer_1.{step}': jnp.zeros_like}).logits
  np.testing.assert_allclose(got, want, atol=1e-6)
  assert np.abs(got - run(params).logits).max() > 0.01


def test_an_edited_stream_is_what_the_rest_sees(params):
  other = jax.random.normal(jax.random.key(1), (2, 9, 12))
  site, after = 'layer_1.resid_post', 'layer_2.resid_pre'
  got = run(params, sites=(site, after), edits={site: lambda x: other})
  np.testing.assert_array_equal(got.activations[site], other)
  np.testing.assert_array_equal(got.activations[after], other)
  cut = dataclasses.replace(CFG, layers=1)
  rest = params | {'layers': params['layers'][2:]}
  want = model.forward(
    rest, cut, TOKENS, edits={'layer_0.resid_pre': lambda x: other}
  )
  np.testing.assert_allclose(got.logits, want.logits, atol=1e-5)


def test_nothing_beyond_the_deepest_site_is_computed():
  # Products in the order they come: q k v, scores, mix | o | gate up down
  upto = {'resid_pre': 0, 'attn_z': 5, 'attn_out': 6, 'mlp_in': 6,
          'mlp_out': 9, 'resid_post': 9}  # fmt: skip
  for step, count in upto.items():
    got = dots(sites=(f'layer_1.{step}', 'layer_0.mlp_in'), logits=False)
    assert got == 9 + count, step
  assert dots(logits=False) == 0
  assert dots() == 3 * 9 + 1


def test_jit_with_static_config_and_sites(params):
  static = ('cfg', 'sites', 'logits', 'dtype')
  fast = jax.jit(model.forward, static_argnames=static)
  got = fast(params, CFG, TOKENS, sites=EVERY)
  want = run(params, sites=EVERY)
  jax.tree.map(functools.partial(np.testing.assert_allclose, atol=1e-5),
               got, want)  # fmt: skip


@pytest.mark.parametrize('spec', [jax.P(), jax.P('data')])
def test_under_an_explicit_mesh(params, spec):
  want = run(params, sites=EVERY)
  mesh = jax.make_mesh((1, 1), ('data', 'dict'), devices=jax.devices()[:1])
  with jax.set_mesh(mesh):
    laid = jax.device_put(params, jax.P())
    tokens = jax.device_put(TOKENS, spec)
    fast = jax.jit(functools.partial(model.forward, cfg=CFG, sites=EVERY))
    got = fast(laid, tokens=tokens)
    loss = model.next_token_loss(got.logits, tokens)
  assert got.logits.sharding.spec[0] == (spec[0] if spec else None)
  np.testing.assert_allclose(got.logits, want.logits, atol=1e-5)
  np.testing.assert_allclose(
    loss, model.next_token_loss(want.logits, TOKENS), atol=1e-5
  )


def test_specs_split_what_divides():
  cfg = dataclasses.replace(
    CFG, qkv_bias=True, out_bias=True, qk_norm=True, tied=False, vocab=52
  )
  is_leaf = lambda x: isinstance(x, tuple | jax.P)
  form = lambda tree: jax.tree.structure(tree, is_leaf=is_leaf)
  for parts in (1, 2, 4, 8):
    got, want = model.specs(cfg, parts), model.shapes(cfg)
    assert form(got) == form(want)
    layer, heads = got['layers'][1], 'dict' if parts < 8 else None
    kv = 'dict' if parts < 4 else None
    assert layer['w_q'] == jax.P(None, heads)
    assert layer['b_q'] == jax.P(heads)
    assert layer['w_o'] == jax.P(heads, None)
    assert layer['w_k'] == layer['w_v'] == jax.P(None, kv)
    assert layer['b_k'] == layer['b_v'] == jax.P(kv)
    assert layer['w_up'] == layer['w_gate'] == jax.P(None, heads)
    assert layer['w_down'] == jax.P(heads, None)  # 20 divides as 4 heads do
    for name in ('attn_norm', 'mlp_norm', 'q_norm', 'k_norm', 'b_o'):
      assert layer[name] == jax.P(None)
    assert got['embed'] == jax.P(heads, None)  # and 52 likewise
    assert got['unembed'] == jax.P(None, heads)
    assert got['final_norm'] == jax.P(None)


def test_no_token_sees_the_next_one(params):
  changed = TOKENS.copy()
  changed[:, 5] = (changed[:, 5] + 1) % 50
  got = model.forward(params, CFG, changed).logits
  want = run(params).logits
  np.testing.assert_array_equal(got[:, :5], want[:, :5])
  assert np.abs(got[:, 5:] - want[:, 5:]).max() > 0.01


def test_bfloat16_activations_and_float32_logits(params):
  site = 'layer_2.resid_post'
  got = run(params, sites=(site,), dtype=jnp.bfloat16)
  want = run(params, sites=(site,))
  assert got.activations[site].dtype == jnp.bfloat16
  assert got.logits.dtype == jnp.float32
  rough, exact = got.activations[site], want.activations[site]
  error = np.linalg.norm(rough.astype(jnp.float32) - exact)
  assert 1e-4 < error / np.linalg.norm(exact) < 0.03  # 8 bits, 3 layers
  assert np.abs(got.logits - want.logits).max() < 0.2


def test_next_token_loss():
  logits = np.random.default_rng(1).normal(size=(2, 9, 50)).astype(np.float32)
  p = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
  want = [
    [-np.log(p[b, t, TOKENS[b, t + 1]]) for t in range(8)] for b in range(2)
  ]
  got = model.next_token_loss(jnp.asarray(logits), jnp.asarray(TOKENS))
  np.testing.assert_allclose(got, want, atol=1e-5)


@pytest.mark.parametrize(
  'site, nearest',
  [
    ('layer_3.resid_post', 'layer_2.resid_post'),
    ('layer_1.resid_pots', 'layer_1.resid_post'),
    ('layer_01.mlp_out', 'layer_1.mlp_out'),
    ('blocks.1.attn_z', 'layer_1.attn_z'),
    ('layer_2', 'layer_2.'),
    ('', 'layer_0.'),
  ],
)
def test_a_wrong_site_names_the_nearest(params, site, nearest):
  for options in ({'sites': (site,)}, {'edits': {site: lambda x: x}}):
    with pytest.raises(UserError, match=f'the nearest is {nearest}') as error:
      run(params, **options)
    assert '\n' not in str(error.value)


@pytest.mark.parametrize(
  'wrong, message',
  [
    (dict(kv_heads=3), 'multiple of kv_heads'),
    (dict(head_dim=5), 'must be even'),
    (dict(local_layers=(True, True, False)), 'needs a sliding_window'),
    (dict(local_layers=(True,), sliding_window=4), 'has 1 entries'),
  ],
)
def test_contradicting_numbers_are_refused(wrong, message):
  with pytest.raises(ValueError, match=message):
    dataclasses.replace(CFG, **wrong)
