"""The decoder against transformers, family by family, on tiny random models.

Saved by transformers, read by our loader: logits and every tapped site.
"""

import numpy as np
import pytest

torch = pytest.importorskip('torch')

import tiny_hf as tiny  # noqa: E402
from ml_collections import ConfigDict  # noqa: E402

from sae_jax.lm import model  # noqa: E402
from sae_jax.lm.subject import load_subject  # noqa: E402

TOKENS = np.random.default_rng(0).integers(3, 61, (2, tiny.T), dtype=np.int32)


def taps(hf, post_norms):
  """Site -> tensor, filled by hooks when the model runs."""
  seen = {}

  def keep(module, name, of_input):
    def hook(_, inputs, kwargs, output):
      given = inputs[0] if inputs else kwargs['hidden_states']
      got = output[0] if isinstance(output, tuple) else output
      seen[name] = given if of_input else got

    module.register_forward_hook(hook, with_kwargs=True)

  for i, layer in enumerate(hf.model.layers):
    attn_end, mlp_end = layer.self_attn.o_proj, layer.mlp
    if post_norms:
      attn_end = layer.post_attention_layernorm
      mlp_end = layer.post_feedforward_layernorm
    keep(layer, f'layer_{i}.resid_pre', True)
    keep(layer.self_attn.o_proj, f'layer_{i}.attn_z', True)
    keep(attn_end, f'layer_{i}.attn_out', False)
    keep(layer.mlp, f'layer_{i}.mlp_in', True)
    keep(mlp_end, f'layer_{i}.mlp_out', False)
    keep(layer, f'layer_{i}.resid_post', False)
  return seen


@pytest.mark.parametrize('family', tiny.FAMILIES)
def test_logits_and_every_site(family, tmp_path):
  hf = tiny.model_of(family)
  # 'llama3' in pieces of some tensors each, as big models come
  sharded = dict(max_shard_size='4kB') if family == 'llama3' else {}
  tiny.save(tmp_path, hf, **sharded)
  if sharded:
    assert len(list(tmp_path.glob('*.safetensors'))) > 5
  subject = load_subject(ConfigDict({'path': str(tmp_path)}))
  cfg = subject.cfg
  assert cfg == tiny.expected(family)
  seen = taps(hf, cfg.post_norms)
  with torch.no_grad():
    want = hf(torch.tensor(TOKENS).long()).logits.numpy()
  assert len(seen) == tiny.LAYERS * len(model.STEPS)
  got = model.forward(subject.params, cfg, TOKENS, sites=tuple(seen))
  assert np.std(want) > 0.3  # not a model that says nothing
  np.testing.assert_allclose(got.logits, want, atol=1e-4, rtol=0)
  for site, tensor in seen.items():
    want = tensor.numpy()
    assert model.site_width(cfg, site) == want.shape[-1]
    np.testing.assert_allclose(
      got.activations[site], want, atol=1e-4, rtol=0, err_msg=site
    )
