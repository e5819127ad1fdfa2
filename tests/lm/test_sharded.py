"""The subject model on every mesh: same numbers, two all-reduces a layer."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sae_jax.lm import attention, model
from sae_jax.lm.config import LMConfig
from sae_jax.parallel.mesh import DATA, DICT, make_mesh

LLAMA = LMConfig(
  vocab=64, d_model=16, layers=2, heads=8, kv_heads=2, head_dim=4, d_mlp=32,
  tied=False, qkv_bias=True, out_bias=True,
)  # fmt: skip
CONFIGS = {
  'llama': LLAMA,
  'gemma2': dataclasses.replace(
    LLAMA, tied=True, qkv_bias=False, out_bias=False, kv_heads=4,
    mlp='gelu_tanh', norm_plus_one=True, embed_scale=4.0, post_norms=True,
    local_layers=(True, False), sliding_window=5, query_scale=0.3,
    attn_softcap=3.0, final_softcap=2.0,
  ),
  'qwen3': dataclasses.replace(
    LLAMA, qkv_bias=False, out_bias=False, qk_norm=True, kv_heads=8,
    rope_base=1e6,
  ),
  # Neither heads nor MLP nor vocabulary divide by 4 or 8
  'odd': dataclasses.replace(
    LLAMA, vocab=61, heads=6, kv_heads=2, d_mlp=36, tied=True
  ),
}  # fmt: skip
B, T = 8, 20


def sites_of(cfg):
  return tuple(
    f'layer_{i}.{step}' for i in range(cfg.layers) for step in model.STEPS
  )


def tokens_of(cfg):
  rng = np.random.default_rng(0)
  return rng.integers(0, cfg.vocab, (B, T), dtype=np.int32)


def lay(cfg, mesh):
  """(params, tokens) as the model's docstring asks for them."""
  params, specs = (
    model.init(jax.random.key(0), cfg),
    model.specs(cfg, mesh.shape[DICT]),
  )
  return (
    jax.device_put(params, specs),
    jax.device_put(tokens_of(cfg), jax.P(DATA, None)),
  )


@pytest.fixture(autouse=True, scope='module')
def small_blocks():
  """Seven blocks of queries, the last one ragged, in four stretches."""
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(attention, 'BLOCK', 3)
    patch.setattr(attention, 'STRETCHES', 4)
    yield


@pytest.fixture(scope='module')
def plain(small_blocks):
  """name -> outputs of one device without a mesh, and the loss."""
  outputs = {}
  for name, cfg in CONFIGS.items():
    params, tokens = model.init(jax.random.key(0), cfg), tokens_of(cfg)
    run = jax.jit(model.forward, static_argnames=('cfg', 'sites'))
    out = run(params, cfg, tokens, sites=sites_of(cfg))
    loss = model.next_token_loss(out.logits, tokens)
    outputs[name] = jax.device_get((out, loss))
  return outputs


@pytest.fixture(scope='module')
def halved(small_blocks):
  """Logits of llama without a mesh, every site halved."""
  cfg, half = LLAMA, {site: lambda x: x * 0.5 for site in sites_of(LLAMA)}
  run = jax.jit(functools.partial(model.forward, cfg=cfg, edits=half))
  params = model.init(jax.random.key(0), cfg)
  return np.asarray(run(params, tokens=tokens_of(cfg)).logits)


@pytest.mark.parametrize('name', CONFIGS)
def test_every_mesh_gives_the_same(name, plain, mesh):
  cfg, (want, want_loss) = CONFIGS[name], plain[name]
  params, tokens = lay(cfg, mesh)
  run = jax.jit(model.forward, static_argnames=('cfg', 'sites'))
  got = run(params, cfg, tokens, sites=sites_of(cfg))
  np.testing.assert_allclose(got.logits, want.logits, atol=1e-5)
  loss = model.next_token_loss(got.logits, tokens)
  np.testing.assert_allclose(loss, want_loss, atol=1e-5)
  for site, x in want.activations.items():
    there = got.activations[site]
    np.testing.assert_allclose(there, x, atol=1e-5, err_msg=site)
    assert jax.typeof(there).sharding.spec == jax.P(DATA, None, None), site


@pytest.mark.parametrize('name', ['llama', 'gemma2'])
def test_a_layer_costs_two_all_reduces(name):
  cfg, mesh = CONFIGS[name], make_mesh(1, 8)
  with jax.set_mesh(mesh):
    params, tokens = lay(cfg, mesh)
    run = jax.jit(model.forward, static_argnames=('cfg', 'sites', 'logits'))

    def found(layers, step):
      site = f'layer_{layers - 1}.{step}'
      lowered = run.lower(params, cfg, tokens, sites=(site,), logits=False)
      text = lowered.compile().as_text()
      return re.findall(r'(\w+\[[\d,]*\])\S* ([a-z-]+?)(?:-start)?\(', text)

    def collectives(layers, step='resid_post'):
      kinds = r'all-|reduce-scatter|collective-'
      return [x for x in found(layers, step) if re.match(kinds, x[1])]

    stream = f'f32[{B},{T},{cfg.d_model}]'
    # One of them is the look-up in the embedding
    assert collectives(1) == [(stream, 'all-reduce')] * 3
    assert collectives(2) == [(stream, 'all-reduce')] * 5
    kinds = [kind for _, kind in collectives(1, 'attn_z')]
    assert kinds == ['all-reduce', 'all-gather']


def test_edits_are_given_whole_rows(halved, mesh):
  cfg = CONFIGS['llama']
  params, tokens = lay(cfg, mesh)
  seen = {}

  def edit(site):
    def halve(x):
      seen[site] = jax.typeof(x).sharding.spec
      return x * 0.5

    return halve

  run = jax.jit(functools.partial(
    model.forward, cfg=cfg, edits={s: edit(s) for s in sites_of(cfg)}
  ))  # fmt: skip
  got = run(params, tokens=tokens).logits
  assert set(seen.values()) == {jax.P(DATA, None, None)}
  np.testing.assert_allclose(got, halved, atol=1e-5)


def test_bfloat16_on_a_mesh(plain):
  cfg, mesh, site = CONFIGS['gemma2'], make_mesh(2, 4), 'layer_1.resid_post'
  want = plain['gemma2'][0].activations[site]
  with jax.set_mesh(mesh):
    params, tokens = lay(cfg, mesh)
    run = jax.jit(model.forward, static_argnames=('cfg', 'sites', 'dtype'))
    out = run(params, cfg, tokens, sites=(site,), dtype=jnp.bfloat16)
  got = out.activations[site]
  assert got.dtype == jnp.bfloat16
  error = np.linalg.norm(got.astype(jnp.float32) - want)
  assert 1e-4 < error / np.linalg.norm(want) < 0.03


@pytest.mark.parametrize('window', [None, 4, 17])
@pytest.mark.parametrize('length', [1, 3, 11, 12, 13, 31])
def test_blocks_are_the_whole_square(window, length, monkeypatch):
  monkeypatch.setattr(attention, 'UNSEEN', -np.inf)  # no NaN in what is kept
  rng = np.random.default_rng(1)
  q, k, v = (
    rng.normal(size=(2, 2, *g, length, 4)).astype(np.float32)
    for g in ((3,), (), ())
  )
  got = attention._blocks(*map(jnp.asarray, (q, k, v)), window, 2.0)
  scores = 2 * np.tanh(np.einsum('bkgth,bksh->bkgts', q, k) / 2)
  behind = np.arange(length)[:, None] - np.arange(length)
  seen = (behind >= 0) & (behind < (window or length))
  weights = np.where(seen, np.exp(scores), 0)
  weights /= weights.sum(-1, keepdims=True)
  want = np.einsum('bkgts,bksh->bkgth', weights, v)
  np.testing.assert_allclose(got, want, atol=1e-5)


def test_long_texts_never_hold_the_square(monkeypatch):
  monkeypatch.setattr(attention, 'BLOCK', 128)
  monkeypatch.setattr(attention, 'STRETCHES', 8)
  cfg = dataclasses.replace(LLAMA, layers=1)
  shapes = jax.eval_shape(lambda: model.init(jax.random.key(0), cfg))
  text = jax.ShapeDtypeStruct((1, 4096), np.int32)
  run = jax.jit(model.forward, static_argnames=('cfg', 'sites', 'logits'))
  site = ('layer_0.resid_post',)
  compiled = run.lower(shapes, cfg, text, sites=site, logits=False).compile()
  square = 4 * cfg.heads * 4096**2
  assert compiled.memory_analysis().temp_size_in_bytes < square / 8
