"""The decoder against transformers, family by family, on tiny random models."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sae_jax.lm import model
from sae_jax.lm.config import LMConfig, RopeScaling

torch = pytest.importorskip('torch')
transformers = pytest.importorskip('transformers')

LAYERS, WINDOW, T = 3, 7, 20  # a window shorter than the text

SIZES = dict(
  vocab_size=61, hidden_size=24, intermediate_size=40, head_dim=8,
  num_hidden_layers=LAYERS, num_attention_heads=6, num_key_value_heads=2,
  max_position_embeddings=64, rms_norm_eps=1e-5, attn_implementation='eager',
  pad_token_id=0, bos_token_id=1, eos_token_id=2,
)  # fmt: skip
OURS = LMConfig(
  vocab=61, d_model=24, d_mlp=40, head_dim=8, layers=LAYERS, heads=6,
  kv_heads=2,
)  # fmt: skip
GEMMA = dict(mlp='gelu_tanh', norm_plus_one=True, embed_scale=24**0.5)
LOCAL = (True, False, True)
PATTERN = ['sliding_attention', 'full_attention', 'sliding_attention']
LLAMA3 = dict(
  rope_type='llama3', rope_theta=1000.0, factor=4.0, low_freq_factor=1.0,
  high_freq_factor=3.0, original_max_position_embeddings=16,
)  # fmt: skip
ROPE = {'rope_type': 'default', 'rope_theta': 10_000.0}

# name: (transformers' model, its settings, our settings)
FAMILIES = {
  'llama': ('Llama', dict(tie_word_embeddings=True), {}),
  'llama3': (
    'Llama',
    dict(
      tie_word_embeddings=False, attention_bias=True, rope_parameters=LLAMA3
    ),
    dict(
      tied=False,
      qkv_bias=True,
      out_bias=True,
      rope_base=1000.0,
      rope_scaling=RopeScaling('llama3', 4.0, 1.0, 3.0, 16),
    ),
  ),
  'mistral': (
    'Mistral',
    dict(sliding_window=WINDOW, tie_word_embeddings=False),
    dict(sliding_window=WINDOW, tied=False),
  ),
  'qwen2': (
    'Qwen2',
    dict(
      tie_word_embeddings=True,
      hidden_size=48,  # Qwen 2 has no head_dim of its own
      rope_parameters=ROPE | {'rope_theta': 1e6},
    ),
    dict(qkv_bias=True, d_model=48, rope_base=1e6),
  ),
  'qwen3': (
    'Qwen3',
    dict(tie_word_embeddings=False),
    dict(qk_norm=True, tied=False),
  ),
  'gemma': ('Gemma', dict(tie_word_embeddings=True), GEMMA),
  'gemma2': (
    'Gemma2',
    dict(
      layer_types=PATTERN,
      sliding_window=WINDOW,
      query_pre_attn_scalar=11,
      attn_logit_softcapping=3.0,
      final_logit_softcapping=2.0,
    ),
    GEMMA
    | dict(
      post_norms=True,
      local_layers=LOCAL,
      sliding_window=WINDOW,
      query_scale=11**-0.5,
      attn_softcap=3.0,
      final_softcap=2.0,
    ),
  ),
  'gemma3': (
    'Gemma3',
    dict(
      layer_types=PATTERN,
      sliding_window=WINDOW,
      query_pre_attn_scalar=9,
      rope_parameters={
        'sliding_attention': ROPE | {'rope_theta': 100.0},
        'full_attention': {
          'rope_type': 'linear', 'factor': 8.0, 'rope_theta': 1e4,
        },
      },
    ),
    GEMMA
    | dict(
      post_norms=True,
      qk_norm=True,
      local_layers=LOCAL,
      sliding_window=WINDOW,
      query_scale=1 / 3,
      rope_local_base=100.0,
      rope_scaling=RopeScaling('linear', 8.0),
    ),
  ),
}  # fmt: skip

NORMS = {
  'attn_norm': 'input_layernorm', 'mlp_norm': 'post_attention_layernorm',
  'q_norm': 'self_attn.q_norm', 'k_norm': 'self_attn.k_norm',
}  # fmt: skip
POST_NORMS = NORMS | {
  'attn_post_norm': 'post_attention_layernorm',
  'mlp_norm': 'pre_feedforward_layernorm',
  'mlp_post_norm': 'post_feedforward_layernorm',
}


def convert(state, cfg):
  """transformers' state dict as our params."""
  state = {k.removeprefix('model.'): v.numpy() for k, v in state.items()}
  norms = POST_NORMS if cfg.post_norms else NORMS

  def leaf(name, layer):
    if name in norms:
      return state[f'layers.{layer}.{norms[name]}.weight']
    kind, part = name.split('_')
    block = 'mlp' if part in ('gate', 'up', 'down') else 'self_attn'
    prefix = f'layers.{layer}.{block}.{part}_proj.'
    return state[f'{prefix}bias' if kind == 'b' else f'{prefix}weight'].T

  params = {
    'embed': state['embed_tokens.weight'],
    'final_norm': state['norm.weight'],
    'layers': [
      {name: leaf(name, i) for name in layer}
      for i, layer in enumerate(model.shapes(cfg)['layers'])
    ],
  }
  if not cfg.tied:
    params['unembed'] = state['lm_head.weight'].T
  return jax.tree.map(jnp.asarray, params)


def build(family):
  """(transformers' model with every parameter random, our cfg and params)."""
  name, theirs, ours = FAMILIES[family]
  suffix = 'TextConfig' if name == 'Gemma3' else 'Config'
  hf_config = getattr(transformers, name + suffix)(**SIZES | theirs)
  torch.manual_seed(0)
  hf = getattr(transformers, f'{name}ForCausalLM')(hf_config).eval()
  with torch.no_grad():
    for parameter in hf.parameters():
      if parameter.ndim > 1:
        parameter.normal_(0, parameter.shape[1] ** -0.5)
      else:  # gains and biases off their neutral values
        parameter.add_(torch.randn_like(parameter) * 0.3)
  cfg = dataclasses.replace(OURS, **ours)
  return hf, cfg, convert(hf.state_dict(), cfg)


TOKENS = np.random.default_rng(0).integers(3, 61, (2, T), dtype=np.int32)


@pytest.mark.parametrize('family', FAMILIES)
def test_logits_and_residual_stream(family):
  hf, cfg, params = build(family)
  with torch.no_grad():
    want = hf(torch.tensor(TOKENS).long(), output_hidden_states=True)
  pre = [f'layer_{i}.resid_pre' for i in range(LAYERS)]
  post = [f'layer_{i}.resid_post' for i in range(LAYERS)]
  got = model.forward(params, cfg, TOKENS, sites=(*pre, *post))
  assert np.std(want.logits.numpy()) > 0.3  # not a model that says nothing
  np.testing.assert_allclose(got.logits, want.logits, atol=1e-4, rtol=0)
  for i in range(LAYERS):
    np.testing.assert_allclose(
      got.activations[pre[i]], want.hidden_states[i], atol=1e-4
    )
  for i in range(LAYERS - 1):  # transformers' last one is after the norm
    np.testing.assert_allclose(
      got.activations[post[i]], want.hidden_states[i + 1], atol=1e-4
    )


@pytest.mark.parametrize('family', ['llama', 'gemma2'])
def test_sublayer_sites(family):
  hf, cfg, params = build(family)
  layer, seen = hf.model.layers[1], {}
  attn_end, mlp_end = layer.self_attn.o_proj, layer.mlp
  if cfg.post_norms:
    attn_end = layer.post_attention_layernorm
    mlp_end = layer.post_feedforward_layernorm

  def keep(name, of_input):
    def hook(_, inputs, output):
      seen[name] = inputs[0] if of_input else output

    return hook

  layer.self_attn.o_proj.register_forward_hook(keep('attn_z', True))
  attn_end.register_forward_hook(keep('attn_out', False))
  layer.mlp.register_forward_hook(keep('mlp_in', True))
  mlp_end.register_forward_hook(keep('mlp_out', False))
  with torch.no_grad():
    hf(torch.tensor(TOKENS).long())
  sites = tuple(f'layer_1.{name}' for name in seen)
  assert len(sites) == 4
  got = model.forward(params, cfg, TOKENS, sites=sites, logits=False)
  for site in sites:
    want = seen[site.split('.')[1]].numpy()
    assert model.site_width(cfg, site) == want.shape[-1]
    np.testing.assert_allclose(got.activations[site], want, atol=1e-4)
