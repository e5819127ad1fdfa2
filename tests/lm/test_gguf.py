"""Reading GGUF files: a tiny one as llama.cpp writes it."""

import dataclasses
import hashlib
import types

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import pytest
from tiny_gguf import CFG, byte_words, gguf, load, permuted, write

from sae_jax.errors import UserError
from sae_jax.lm import gguf as reader
from sae_jax.lm import model
from sae_jax.lm.config import RopeScaling
from sae_jax.lm.subject import load_subject
from sae_jax.parallel.mesh import make_mesh


@pytest.fixture(scope='module')
def params():
  return model.init(jax.random.key(0), CFG)


def test_a_written_model_comes_back(tmp_path, params):
  got = load(write(tmp_path / 'tiny.gguf', params))
  assert got.name == 'tiny'
  assert got.cfg.norm_eps == pytest.approx(1e-5)
  assert got.cfg == dataclasses.replace(CFG, norm_eps=got.cfg.norm_eps)
  jax.tree.map(np.testing.assert_array_equal, got.params, params)
  assert (got.bos, got.eos, got.pad) == (0, 1, None)
  assert got.special == {0, 1}


def test_keys_that_change_nothing(tmp_path, params):
  keys = {
    'vocab_size': 259, 'context_length': 64, 'attention.head_count_kv': [2, 2],
    'rope.dimension_count': 8, 'attention.value_length': 8, 'expert_count': 0,
  }  # fmt: skip
  got = load(write(tmp_path / 'tiny.gguf', params, more_keys=keys))
  jax.tree.map(np.testing.assert_array_equal, got.params, params)


def test_the_old_name_of_a_linear_scaling(tmp_path, params):
  path = write(tmp_path / 'x.gguf', params, more_keys={'rope.scale_linear': 4})
  assert load(path).cfg.rope_scaling == RopeScaling('linear', 4)


def test_a_model_split_over_files(tmp_path, params):
  late = ['output_norm', 'blk.1.attn_q']
  whole = load(write(tmp_path / 'm.gguf', params))
  early = [x.name[: -len('.weight')]
           for x in gguf.GGUFReader(tmp_path / 'm.gguf').tensors]  # fmt: skip
  early = [name for name in early if name not in late]
  names = [tmp_path / f'm-0000{i}-of-00002.gguf' for i in (1, 2)]
  for i, leave in enumerate((late, early)):
    write(names[i], params, leave=leave, split={'no': i, 'count': 2})
  got = load(names[0])
  jax.tree.map(np.testing.assert_array_equal, got.params, whole.params)
  lines = [
    f'{hashlib.sha256(x.read_bytes()).hexdigest()}  {x.name}\n' for x in names
  ]
  want = hashlib.sha256(''.join(lines).encode()).hexdigest()
  assert got.weights_sha256 == want
  with pytest.raises(UserError, match='is file 2 of 2 .* give the first, NAME'):
    load(names[1])
  names[0].rename(tmp_path / 'y.gguf')
  with pytest.raises(UserError, match='is file 1 of 2 of one model'):
    load(tmp_path / 'y.gguf')


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


def test_shards_of_quantised_tensors(tmp_path, params):
  """A shard's columns need not begin where a block of 32 numbers does."""
  names = ('blk.1.attn_output', 'blk.0.ffn_down', 'blk.0.attn_q', 'token_embd')
  path = write(tmp_path / 'q.gguf', params, quantised=names)
  whole = load(path).params
  with jax.set_mesh(make_mesh(2, 4)):
    split = load(path).params
  jax.tree.map(np.testing.assert_array_equal, split, whole)
  for name, full in (('w_o', 32), ('w_down', 64), ('w_q', 32)):
    x = split['layers'][0][name]
    assert all(s.data.size * 4 == x.size for s in x.addressable_shards)
    assert full in x.shape


def from_transformers(path, hf, arch):
  """Writes a model as llama.cpp's converter does, with gguf's own names."""
  c = hf.config
  out = gguf.GGUFWriter(path, arch)
  out.add_block_count(c.num_hidden_layers)
  out.add_embedding_length(c.hidden_size)
  out.add_feed_forward_length(c.intermediate_size)
  out.add_head_count(c.num_attention_heads)
  out.add_head_count_kv(c.num_key_value_heads)
  head_dim = getattr(c, 'head_dim', None) or c.hidden_size // 6
  out.add_key_length(head_dim)
  out.add_layer_norm_rms_eps(c.rms_norm_eps)
  rope = c.rope_parameters
  if arch == 'gemma3':
    out.add_rope_freq_base_swa(rope['sliding_attention']['rope_theta'])
    out.add_sliding_window_pattern(2)  # the default is 6
    rope = rope['full_attention']
  out.add_rope_freq_base(rope['rope_theta'])
  if rope['rope_type'] == 'linear':
    out.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
    out.add_rope_scaling_factor(rope['factor'])
  if getattr(c, 'sliding_window', None):
    out.add_sliding_window(c.sliding_window)
  if arch in ('gemma2', 'gemma3'):
    out.add_attention_scale(c.query_pre_attn_scalar**-0.5)
  if arch == 'gemma2':
    out.add_attn_logit_softcapping(c.attn_logit_softcapping)
    out.add_final_logit_softcapping(c.final_logit_softcapping)
  out.add_tokenizer_model('gpt2')
  out.add_tokenizer_pre('gpt-2')
  words = byte_words()
  out.add_token_list([*words[40:100], words[40] + words[41]])
  out.add_token_types([1] * 61)
  out.add_token_merges([f'{words[40]} {words[41]}'])
  out.add_bos_token_id(1)
  out.add_eos_token_id(2)
  out.add_chat_template('{{ x }}')
  kind = next(k for k, v in gguf.MODEL_ARCH_NAMES.items() if v == arch)
  theirs = gguf.get_tensor_name_map(kind, c.num_hidden_layers)
  heads = {'q_proj': c.num_attention_heads, 'k_proj': c.num_key_value_heads}
  for name, x in hf.state_dict().items():
    if name == 'lm_head.weight' and c.tie_word_embeddings:
      continue
    w = x.numpy()
    if arch.startswith('gemma') and name.endswith('norm.weight'):
      w = w + 1
    if arch == 'llama' and (part := name.split('.')[-2]) in heads:
      w = permuted(w, heads[part])
    out.add_tensor(theirs.get_name(name, ('.weight', '.bias')), w)
  if rope['rope_type'] == 'llama3':
    ratio = 1 / hf.model.rotary_emb.inv_freq.numpy()
    ratio /= rope['rope_theta'] ** (np.arange(0, head_dim, 2) / head_dim)
    out.add_tensor('rope_freqs.weight', ratio.astype(np.float32))
  out.write_header_to_file()
  out.write_kv_data_to_file()
  out.write_tensors_to_file()
  out.close()
  return path


@pytest.mark.parametrize(
  'family, arch',
  [
    ('llama', 'llama'), ('llama3', 'llama'), ('llama_linear', 'llama'),
    ('mistral', 'llama'),
    ('qwen2', 'qwen2'), ('qwen3', 'qwen3'), ('gemma', 'gemma'),
    ('gemma2', 'gemma2'), ('gemma3', 'gemma3'),
  ],
)  # fmt: skip
def test_parity_with_transformers(tmp_path, family, arch):
  torch = pytest.importorskip('torch')
  import tiny_hf as tiny

  changes = {}
  if family == 'llama3':  # the numbers Llama 3.1 has: the file holds no others
    rope = dict(high_freq_factor=4.0, original_max_position_embeddings=8192)
    rope |= dict(rope_theta=5e5, factor=8.0)
    changes['rope_parameters'] = tiny.LLAMA3 | rope
  hf = tiny.model_of(family, **changes)
  subject = load(from_transformers(tmp_path / 'x.gguf', hf, arch))
  assert subject.bos == (None if family.startswith('qwen') else 1)
  assert subject.chat_template == '{{ x }}'
  text = np.random.default_rng(0).integers(3, 61, (2, tiny.T), dtype=np.int32)
  with torch.no_grad():
    want = hf(torch.tensor(text).long()).logits
  got = model.forward(subject.params, subject.cfg, text).logits
  np.testing.assert_allclose(got, want, atol=1e-4, rtol=0)


def test_what_gemma_files_leave_out(tmp_path):
  """Real ones give neither scale, caps nor pattern: llama.cpp's defaults."""
  meta = {'embedding_length': 4608, 'block_count': 46}
  meta |= {
    'attention.head_count': 32, 'attention.key_length': 128,
    'feed_forward_length': 36864, 'attention.head_count_kv': 16,
    'attention.layer_norm_rms_epsilon': 1e-6,
  }  # fmt: skip

  def config(arch, **more):
    keys = {f'{arch}.{k}': v for k, v in (meta | more).items()}
    embed = types.SimpleNamespace(shape=np.array([4608, 256]))
    tensors = {'token_embd.weight': embed}
    keys['general.architecture'] = arch
    return reader._config(keys, tensors, tmp_path)

  cfg = config('gemma2')  # 27B
  assert cfg.attention_scale() == pytest.approx(144**-0.5)
  assert (cfg.attn_softcap, cfg.final_softcap) == (50.0, 30.0)
  assert (cfg.sliding_window, cfg.local_layers[:3]) == (
    4096,
    (True, False, True),
  )
  assert not cfg.norm_plus_one and cfg.post_norms and not cfg.qk_norm
  cfg = config('gemma2', block_count=42)  # 9B
  assert cfg.attention_scale() == pytest.approx(128**-0.5)
  cfg = config('gemma3', **{'attention.sliding_window': 1024})
  assert cfg.local_layers[:7] == (True,) * 5 + (False, True)
  assert (cfg.rope_base, cfg.rope_local_base) == (1e6, 1e4)
  assert cfg.attention_scale() == pytest.approx(128**-0.5)
  assert (cfg.attn_softcap, cfg.final_softcap) == (None, None)


def test_another_tokenizer(tmp_path, params):
  path = write(tmp_path / 'x.gguf', params, pre='tekken')
  other = tmp_path / 'tokenizer.json'
  other.write_text(load(write(tmp_path / 'y.gguf', params)).tokenizer.to_str())
  block = {'kind': '', 'path': path, 'tokenizer': str(other)}
  got = load_subject(ml_collections.ConfigDict(block))
  assert got.tokenizer.encode('</s>a').tokens == ['</s>', 'a']
  assert (got.bos, got.eos) == (0, 1)
