"""GGUF files that are broken, or hold what we do not understand."""

import jax
import pytest
from ml_collections import ConfigDict
from tiny_gguf import CFG, gguf, load, write

from sae_jax.errors import UserError
from sae_jax.lm import model
from sae_jax.lm.subject import load_subject


@pytest.fixture(scope='module')
def params():
  return model.init(jax.random.key(0), CFG)


@pytest.mark.parametrize(
  'change, message',
  [
    (dict(arch='mamba'), "architecture 'mamba' is not supported.*llama"),
    (
      dict(pre='tekken'),
      "pre-tokenizer 'tekken' is not known; known.*smollm.*model.tokenizer",
    ),
    (dict(leave=['blk.1.ffn_up']), 'lacks the tensor blk.1.ffn_up.weight'),
    (dict(leave=['token_embd']), 'lacks the tensor token_embd.weight'),
    (dict(add=['rope_freq']), 'no place for: rope_freq.weight'),
    (dict(add=['rope_freqs']), "rope_freqs.weight is not Llama 3's"),
    (dict(skip_keys=['block_count']), 'lacks llama.block_count'),
    (
      dict(more_keys={'rope.dimension_count': 4}),
      'llama.rope.dimension_count is 4: only 8 is supported',
    ),
    (dict(more_keys={'logit_scale': 2}), 'llama.logit_scale is 2: not supp'),
    (
      dict(more_keys={'attention.head_count_kv': [2, 4]}),
      'llama.attention.head_count_kv is not the same for every layer',
    ),
    (dict(more_keys={'expert_count': 8}), 'is a mixture of experts'),
    (dict(merge='Ċ Ġ'), 'not fit together .*`ĊĠ` out of vocab.*tokenizer'),
    (dict(merge='Ċ x y'), 'vocabulary does not fit together .*tokenizer'),
    (dict(eos=400), 'ids up to 400, the embedding 259 rows'),
    (dict(endianess=gguf.GGUFEndian.BIG), 'is a big-endian GGUF file'),
    (
      dict(more_keys={'attention.head_count_kv': 3}),
      r'heads \(4\) must be a multiple of kv_heads \(3\)',
    ),
  ],
)
def test_a_file_we_do_not_understand(tmp_path, params, change, message):
  path = write(tmp_path / 'x.gguf', params, **change)
  with pytest.raises(UserError, match=message) as error:
    load(path)
  assert path in str(error.value) and '\n' not in str(error.value)


def test_a_tensor_of_another_shape(tmp_path, params):
  layers = [params['layers'][0], dict(params['layers'][1])]
  layers[1]['w_up'] = layers[1]['w_up'][:, :-1]
  path = write(tmp_path / 'x.gguf', params | {'layers': layers})
  with pytest.raises(UserError, match=r'ffn_up.weight has shape \(32, 63\)'):
    load(path)


def test_broken_files(tmp_path, params):
  with pytest.raises(UserError, match='cannot read .*gguf: No such file'):
    load(tmp_path / 'absent.gguf')
  with pytest.raises(UserError, match='cannot read .*directory'):
    load(tmp_path)
  text = tmp_path / 'text.gguf'
  text.write_text('version https://git-lfs')
  with pytest.raises(UserError, match='not a GGUF file'):
    load(text)
  raw = open(write(tmp_path / 'whole.gguf', params), 'rb').read()
  cut = tmp_path / 'cut.gguf'
  for size in (4, 30, 400, len(raw) // 2, len(raw) - 64):
    cut.write_bytes(raw[:size])
    with pytest.raises(UserError, match='cut off or damaged'):
      load(cut)


def test_an_unknown_kind_of_model():
  block = ConfigDict({'kind': 'onnx', 'path': 'x'})
  with pytest.raises(
    UserError, match="'onnx' is not known; known: gguf, hf, hub"
  ):
    load_subject(block)
