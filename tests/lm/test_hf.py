"""Hugging Face folders: forms of config.json, names, shards, casts."""

import hashlib
import json
import socket
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

torch = pytest.importorskip('torch')

import safetensors.torch  # noqa: E402
import tiny_hf as tiny  # noqa: E402
import transformers  # noqa: E402
from ml_collections import ConfigDict  # noqa: E402
from tiny_hf import block, edit_tensors, load  # noqa: E402

from sae_jax.lm import hf as ours  # noqa: E402
from sae_jax.lm import model  # noqa: E402
from sae_jax.lm.config import RopeScaling  # noqa: E402
from sae_jax.lm.subject import load_subject, weights_sha256  # noqa: E402
from sae_jax.parallel.mesh import make_mesh  # noqa: E402


def test_what_is_known_of_it(llama):
  template = '{% for m in messages %}{{ m.content }}{% endfor %}'
  (llama / 'chat_template.jinja').write_text(template)
  subject = load(llama)
  assert subject.name == 'tiny-3.2'
  assert (subject.bos, subject.eos, subject.pad) == (1, 2, 0)
  assert subject.special == {0, 1, 2}
  assert subject.chat_template == template
  assert subject.tokenizer.encode('w5 w9').ids == [5, 9]  # no BOS by itself
  assert load(llama).tokenizer_sha256 == subject.tokenizer_sha256
  (llama / 'chat_template.jinja').unlink()
  assert load(llama).chat_template is None


def test_old_recorded_configs_lack_keys(llama):
  old = ConfigDict({'kind': 'hf', 'path': str(llama)})
  assert load_subject(old).cfg == tiny.expected('llama')


def test_a_model_without_bos(tmp_path):
  words = tiny.tokenizer_of(bos_token=None)
  assert load(tiny.save(tmp_path, tiny.model_of('qwen2'), words)).bos is None


def config_of(tmp_path, **keys):
  (tmp_path / 'config.json').write_text(json.dumps(keys))
  return ours._read_config(tmp_path)[0]


def check_sites(hf, subject):
  """The residual streams against the decoder's of transformers."""
  tokens = np.arange(3, 23, dtype=np.int32)[None]
  with torch.no_grad():
    want = hf(torch.tensor(tokens).long(), output_hidden_states=True)
  sites = [f'layer_{i}.resid_pre' for i in range(tiny.LAYERS)]
  got = model.forward(
    subject.params, subject.cfg, tokens, sites=sites, logits=False
  ).activations
  for i, site in enumerate(sites):
    want_i = want.hidden_states[i]
    np.testing.assert_allclose(got[site], want_i, atol=1e-4, rtol=0)


@pytest.mark.parametrize(
  'head', ['Model', 'ForSequenceClassification', 'ForQuestionAnswering']
)
def test_saved_without_what_makes_logits(tmp_path, head):
  config = tiny.model_of('llama', tie_word_embeddings=False).config
  hf = tiny.randomised(getattr(transformers, f'Llama{head}')(config))
  subject = load(tiny.save(tmp_path, hf))
  assert not subject.cfg.head
  check_sites(hf, subject)


def test_a_hidden_size_that_is_no_multiple_of_the_heads(tmp_path):
  """Which transformers' own check refuses, head_dim or not."""
  config = tiny.model_of('llama').config
  config.hidden_size = 20  # six heads of 8
  hf = tiny.randomised(transformers.LlamaForCausalLM(config))
  config.hidden_size = 24  # it would not be saved
  tiny.save(tmp_path, hf)
  tiny.edit_json(tmp_path / 'config.json', hidden_size=20)
  subject = load(tmp_path)
  assert (subject.cfg.d_model, subject.cfg.head_dim) == (20, 8)
  check_sites(hf, subject)


def test_older_forms_of_config_json(tmp_path):
  sizes = dict(
    vocab_size=61, hidden_size=24, intermediate_size=40, num_hidden_layers=7,
    num_attention_heads=6, num_key_value_heads=2,
  )  # fmt: skip
  scaling = dict(
    rope_type='llama3', factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
    original_max_position_embeddings=8192,
  )  # fmt: skip
  cfg = config_of(
    tmp_path, model_type='llama', rope_theta=5e5, rope_scaling=scaling, **sizes
  )
  assert (cfg.head_dim, cfg.rope_base, cfg.tied) == (4, 5e5, False)
  assert cfg.rope_scaling == RopeScaling('llama3', 8.0, 1.0, 4.0, 8192)
  scaling = {'type': 'linear', 'factor': 2.0}
  cfg = config_of(tmp_path, model_type='llama', rope_scaling=scaling, **sizes)
  assert cfg.rope_scaling == RopeScaling('linear', 2.0)
  cfg = config_of(tmp_path, model_type='gemma2', sliding_window=9, **sizes)
  assert cfg.local_layers == (True, False, True, False, True, False, True)
  assert (cfg.attn_softcap, cfg.final_softcap) == (50.0, 30.0)
  gemma3 = dict(
    model_type='gemma3_text', rope_theta=1e6, rope_local_base_freq=1e4,
    rope_scaling={'rope_type': 'linear', 'factor': 8.0}, sliding_window=9,
    query_pre_attn_scalar=168,
  )  # fmt: skip
  cfg = config_of(tmp_path, **sizes, **gemma3)
  assert cfg.local_layers == (True,) * 5 + (False, True)
  assert (cfg.rope_base, cfg.rope_local_base) == (1e6, 1e4)
  assert cfg.rope_scaling == RopeScaling('linear', 8.0)
  assert cfg.query_scale == 168**-0.5
  text = gemma3 | sizes | {'sliding_window_pattern': 2}
  cfg = config_of(
    tmp_path, model_type='gemma3', text_config=text, vision_config={}
  )
  assert cfg.local_layers == (True, False) * 3 + (True,)
  cfg = config_of(
    tmp_path, model_type='qwen2', use_sliding_window=True, sliding_window=9,
    max_window_layers=5, **sizes,
  )  # fmt: skip
  assert cfg.local_layers == (False,) * 5 + (True, True)
  cfg = config_of(tmp_path, model_type='qwen2', sliding_window=9, **sizes)
  assert cfg.sliding_window is None
  types = ['full_attention', 'sliding_attention'] * 4
  cfg = config_of(
    tmp_path, model_type='mistral', sliding_window=9, layer_types=types[:7],
    **sizes,
  )  # fmt: skip
  assert cfg.local_layers == (False, True) * 3 + (False,)


@pytest.mark.parametrize('prefix', ['as saved', 'language_model.model.'])
def test_text_part_of_gemma3_with_images(tmp_path, prefix):
  text = tiny.SIZES | tiny.FAMILIES['gemma3'][1]
  vision = dict(
    hidden_size=16, intermediate_size=16, num_hidden_layers=1, image_size=28,
    num_attention_heads=2, patch_size=14,
  )  # fmt: skip
  config = transformers.Gemma3Config(
    text_config=text, vision_config=vision, mm_tokens_per_image=1
  )
  hf = tiny.randomised(transformers.Gemma3ForConditionalGeneration(config))
  tiny.save(tmp_path, hf)
  if prefix != 'as saved':  # as the hub's files are
    edit_tensors(
      tmp_path,
      lambda tensors: {
        prefix + name.split('language_model.')[-1].removeprefix('model.')
        if 'language_model' in name
        else name.removeprefix('model.'): x
        for name, x in tensors.items()
      },
    )
  subject = load(tmp_path)
  assert subject.cfg == tiny.expected('gemma3')
  tokens = np.arange(3, 23, dtype=np.int32)[None]
  with torch.no_grad():
    want = hf(torch.tensor(tokens).long()).logits
  got = model.forward(subject.params, subject.cfg, tokens).logits
  np.testing.assert_allclose(got, want, atol=1e-4, rtol=0)


SPLIT = dict(
  vocab_size=64, hidden_size=32, intermediate_size=48, num_attention_heads=8,
  num_key_value_heads=4, tie_word_embeddings=False, num_hidden_layers=2,
)  # fmt: skip


def test_each_device_reads_and_holds_its_quarter(tmp_path, monkeypatch):
  hf = tiny.model_of('llama', **SPLIT)
  tiny.save(tmp_path, hf, max_shard_size='6kB')
  whole = load(tmp_path).params
  assert len({x.device for x in jax.tree.leaves(whole)}) == 1
  taken, plain = [], np.memmap.__getitem__

  def getitem(self, index):
    taken.append((self, plain(self, index)))
    return taken[-1][1]

  monkeypatch.setattr(np.memmap, '__getitem__', getitem)
  with jax.set_mesh(make_mesh(2, 4)):
    split = load(tmp_path).params
  jax.tree.map(np.testing.assert_array_equal, split, whole)
  leaves = jax.tree.leaves(split)
  for x in leaves:
    assert len(x.addressable_shards) == 8
    if x.ndim == 2:
      assert all(s.data.size * 4 == x.size for s in x.addressable_shards)
  # Never a whole matrix, and each slice once though two devices hold it
  assert all(file.ndim == 1 or file.size == 4 * x.size for file, x in taken)
  assert sum(x.size for _, x in taken) == sum(x.size for x in leaves)


PROCESS = """
import sys, jax, numpy as np
jax.config.update('jax_num_cpu_devices', 2)
rank, port, folder = int(sys.argv[1]), sys.argv[2], sys.argv[3]
jax.distributed.initialize(f'127.0.0.1:{port}', 2, rank)
from ml_collections import ConfigDict
from sae_jax.lm.subject import load_subject
from sae_jax.parallel.mesh import make_mesh
total, plain = [0], np.memmap.__getitem__
def getitem(self, index):
  out = plain(self, index)
  total[0] += out.size if out.ndim == 2 else 0
  return out
np.memmap.__getitem__ = getitem
with jax.set_mesh(make_mesh(1, 4)):
  params = load_subject(ConfigDict({'path': folder})).params
matrices = [x for x in jax.tree.leaves(params) if x.ndim == 2]
half = 2 * total[0] == sum(x.size for x in matrices)
parts = [y.data for x in matrices for y in x.addressable_shards]
print(rank, half, sum(float((np.asarray(x) ** 2).sum()) for x in parts))
"""


@pytest.mark.slow
def test_two_processes_read_a_half_each(tmp_path):
  hf = tiny.model_of('llama', **SPLIT)
  tiny.save(tmp_path, hf)
  with socket.socket() as free:
    free.bind(('127.0.0.1', 0))
    port = str(free.getsockname()[1])
  command = [sys.executable, '-c', PROCESS]
  started = [
    subprocess.Popen(
      [*command, rank, port, str(tmp_path)], stdout=subprocess.PIPE, text=True
    )
    for rank in '01'
  ]
  lines = [
    x.communicate(timeout=120)[0].splitlines()[-1].split() for x in started
  ]
  assert [x[:2] for x in lines] == [['0', 'True'], ['1', 'True']]
  matrices = [x.detach().double() for x in hf.parameters() if x.ndim == 2]
  want = sum(float((x**2).sum()) for x in matrices)
  assert sum(float(x[2]) for x in lines) == pytest.approx(want, rel=1e-5)


@pytest.mark.parametrize('stored', ['bfloat16', 'float16', 'float32'])
def test_casts(tmp_path, stored):
  hf = tiny.model_of('llama').to(getattr(torch, stored))
  tiny.save(tmp_path, hf)
  want = hf.model.layers[1].mlp.up_proj.weight.float().detach().numpy().T
  gain = hf.model.layers[1].input_layernorm.weight.float().detach().numpy()
  for dtype in (jnp.float32, jnp.bfloat16):
    got = load(tmp_path, dtype).params['layers'][1]
    assert got['w_up'].dtype == dtype
    assert got['attn_norm'].dtype == jnp.float32
    np.testing.assert_array_equal(got['w_up'], want.astype(dtype))
    np.testing.assert_array_equal(got['attn_norm'], gain)
  assert want.astype(ml_dtypes.bfloat16).dtype == got['w_up'].dtype


def documented(folder, weights):
  """The hash that the command in docs/models.md gives."""
  text = (Path(__file__).parents[2] / 'docs' / 'models.md').read_text()
  command = text[text.index('    cd FOLDER') : text.index('## Onto a mesh')]
  command = command.replace('FOLDER', str(folder))
  command = command.replace('W=model.safetensors', f'W={weights}')
  done = subprocess.run(['bash', '-c', command], capture_output=True, text=True)
  return done.stdout.split()[0]


def test_weights_say_which_of_two_models(tmp_path):
  tiny.save(tmp_path, tiny.model_of('llama'), max_shard_size='9kB')
  index, single = 'model.safetensors.index.json', 'model.safetensors'
  first = load(tmp_path)
  weights = {  # another model of the same shape, as a single file
    k: v * 2
    for file in tmp_path.glob('model-*.safetensors')
    for k, v in safetensors.torch.load_file(file).items()
  }
  safetensors.torch.save_file(weights, tmp_path / single)
  for name, factor in ((index, 1), (single, 2)):
    got = load(tmp_path, weights=name)
    want = first.params['final_norm'] * factor
    np.testing.assert_array_equal(got.params['final_norm'], want)
    assert got.weights_sha256 == documented(tmp_path, name)
    assert got.weights_sha256 == weights_sha256(block(tmp_path, weights=name))
    assert (got.weights_sha256 == first.weights_sha256) == (factor == 1)
  tiny.edit_json(tmp_path / 'config.json', transformers_weights=single)
  got = load(tmp_path).params['final_norm']  # as transformers does
  np.testing.assert_array_equal(got, first.params['final_norm'] * 2)


def test_hash_of_the_weights(tmp_path, llama):
  got = load(llama).weights_sha256
  assert got == weights_sha256(block(llama))
  lines = ''
  for name in ('config.json', 'model.safetensors'):
    digest = hashlib.sha256((llama / name).read_bytes()).hexdigest()
    lines += f'{digest}  {name}\n'
  assert got == hashlib.sha256(lines.encode()).hexdigest()
  (llama / 'tokenizer_config.json').write_text('{}')  # not the weights
  assert weights_sha256(block(llama)) == got
  edit_tensors(llama, lambda t: t | {'model.norm.weight': t['model.norm.weight']
                                     + 1})  # fmt: skip
  assert weights_sha256(block(llama)) != got
  assert weights_sha256(block(tmp_path / 'absent')) is None
  assert weights_sha256(block(tmp_path / 'absent.gguf')) is None
