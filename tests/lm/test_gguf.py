"""Reading GGUF files: a tiny one as llama.cpp writes it, and broken ones."""

import dataclasses

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import pytest

from sae_jax.errors import UserError
from sae_jax.lm import model
from sae_jax.lm.config import LMConfig
from sae_jax.lm.subject import load_subject

gguf = pytest.importorskip('gguf')

CFG = LMConfig(
  vocab=259, d_model=32, layers=2, heads=4, kv_heads=2, head_dim=8, d_mlp=64,
  rope_base=5000.0, tied=False,
)  # fmt: skip
NAMES = {
  'attn_norm': 'attn_norm', 'mlp_norm': 'ffn_norm', 'w_q': 'attn_q',
  'w_k': 'attn_k', 'w_v': 'attn_v', 'w_o': 'attn_output',
  'w_gate': 'ffn_gate', 'w_up': 'ffn_up', 'w_down': 'ffn_down',
}  # fmt: skip


@pytest.fixture(scope='module')
def params():
  return model.init(jax.random.key(0), CFG)


def byte_words():
  """The 256 characters that stand for bytes in byte-level BPE, by code."""
  plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
  rest = [x for x in range(256) if x not in plain]
  words = {x: chr(x) for x in plain}
  words |= {x: chr(256 + i) for i, x in enumerate(rest)}
  return [words[x] for x in range(256)]


def permuted(w, heads):
  """What llama.cpp's converter does to the rows of q and k."""
  rows = w.reshape(heads, 2, w.shape[0] // heads // 2, *w.shape[1:])
  return rows.swapaxes(1, 2).reshape(w.shape)


def write(path, params, *, arch='llama', pre='smollm', quantised=(), leave=(),
          add=(), skip_keys=()):  # fmt: skip
  """Writes CFG's params as a GGUF file with a byte-level tokenizer."""
  out = gguf.GGUFWriter(path, arch)
  keys = {
    'block_count': 2, 'embedding_length': 32, 'attention.head_count': 4,
    'attention.head_count_kv': 2, 'feed_forward_length': 64,
  }  # fmt: skip
  for key in keys.keys() - set(skip_keys):
    out.add_uint32(f'{arch}.{key}', keys[key])
  out.add_float32(f'{arch}.rope.freq_base', 5000.0)
  out.add_float32(f'{arch}.attention.layer_norm_rms_epsilon', 1e-5)
  out.add_tokenizer_model('gpt2')
  out.add_tokenizer_pre(pre)
  out.add_token_list(['<s>', '</s>', *byte_words(), 'ĊĊ'])
  out.add_token_types([3, 3, *[1] * 257])
  out.add_token_merges(['Ċ Ċ'])
  out.add_bos_token_id(0)
  out.add_eos_token_id(1)
  tensors = {'token_embd': params['embed'], 'output': params['unembed'].T}
  tensors['output_norm'] = params['final_norm']
  for i, layer in enumerate(params['layers']):
    heads = {'w_q': 4, 'w_k': 2}
    for ours, theirs in NAMES.items():
      w = np.asarray(layer[ours]).T
      w = permuted(w, heads[ours]) if ours in heads else w
      tensors[f'blk.{i}.{theirs}'] = w
  for name, w in (tensors | {x: np.zeros(3) for x in add}).items():
    if name in leave:
      continue
    w, kind = np.ascontiguousarray(w, np.float32), None
    if name in quantised:
      kind = gguf.GGMLQuantizationType.Q8_0
      w = gguf.quants.quantize(w, kind)
    out.add_tensor(f'{name}.weight', w, raw_dtype=kind)
  out.write_header_to_file()
  out.write_kv_data_to_file()
  out.write_tensors_to_file()
  out.close()
  return str(path)


def load(path, **options):
  block = ml_collections.ConfigDict({'kind': 'gguf', 'path': str(path)})
  return load_subject(block, **options)


def test_a_written_model_comes_back(tmp_path, params):
  got = load(write(tmp_path / 'tiny.gguf', params))
  assert got.name == 'tiny'
  assert got.cfg.norm_eps == pytest.approx(1e-5)
  assert got.cfg == dataclasses.replace(CFG, norm_eps=got.cfg.norm_eps)
  jax.tree.map(np.testing.assert_array_equal, got.params, params)
  assert (got.bos, got.eos, got.pad) == (0, 1, None)
  assert got.special == {0, 1}


def test_hashes_follow_the_file(tmp_path, params):
  one = load(write(tmp_path / 'a.gguf', params))
  two = load(write(tmp_path / 'b.gguf', params, pre='gpt-2'))
  assert len(one.weights_sha256) == 64
  assert one.weights_sha256 != two.weights_sha256
  assert one.tokenizer_sha256 != two.tokenizer_sha256


def test_quantised_and_in_bfloat16(tmp_path, params):
  path = write(tmp_path / 'q.gguf', params, quantised=('blk.1.attn_k',))
  got = load(path, dtype=jnp.bfloat16).params['layers'][1]
  assert got['w_k'].dtype == jnp.bfloat16
  assert got['attn_norm'].dtype == jnp.float32
  want = params['layers'][1]['w_k']
  error = np.abs(got['w_k'].astype(jnp.float32) - want).max()
  assert 0 < error < 0.01 * np.abs(want).max()


def test_how_text_is_cut(tmp_path, params):
  pieces = {}
  for pre in ('smollm', 'gpt-2'):
    path = write(tmp_path / f'{pre}.gguf', params, pre=pre)
    tokenizer = load(path).tokenizer
    pieces[pre] = tokenizer.encode('</s>\n\n1é').tokens
    assert tokenizer.decode([1, *tokenizer.encode('a é').ids]) == 'a é'
  # A digit ends the white space before it, so both line ends merge
  assert pieces['smollm'] == ['</s>', 'ĊĊ', '1', 'Ã', '©']
  assert pieces['gpt-2'] == ['</s>', 'Ċ', 'Ċ', '1', 'Ã', '©']


@pytest.mark.parametrize(
  'change, message',
  [
    (dict(arch='mamba'), "architecture 'mamba' is not supported.*llama"),
    (dict(pre='qwen2'), "pre-tokenizer 'qwen2' is not known; known.*smollm"),
    (dict(leave=['blk.1.ffn_up']), 'lacks the tensor blk.1.ffn_up.weight'),
    (dict(leave=['token_embd']), 'lacks the tensor token_embd.weight'),
    (dict(add=['rope_freqs']), 'no place for: rope_freqs.weight'),
    (dict(skip_keys=['block_count']), 'lacks llama.block_count'),
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
  with pytest.raises(UserError, match='cannot read the model .*No such file'):
    load(tmp_path / 'absent.gguf')
  with pytest.raises(UserError, match='cannot read the model .*directory'):
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
  block = ml_collections.ConfigDict({'kind': 'onnx', 'path': 'x'})
  with pytest.raises(UserError, match="'onnx' is not known; known: gguf"):
    load_subject(block)
