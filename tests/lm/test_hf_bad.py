"""Hugging Face folders and the hub: what a user can get wrong."""

import jax
import pytest

torch = pytest.importorskip('torch')

import huggingface_hub  # noqa: E402
import tiny_hf as tiny  # noqa: E402
from huggingface_hub import errors  # noqa: E402
from tiny_hf import block, edit_json, edit_tensors, load  # noqa: E402

from sae_jax.errors import UserError  # noqa: E402
from sae_jax.lm import model  # noqa: E402
from sae_jax.lm.subject import weights_sha256  # noqa: E402
from sae_jax.parallel.mesh import make_mesh  # noqa: E402


def without(name):
  return lambda tensors: {k: v for k, v in tensors.items() if k != name}


UP = 'model.layers.1.mlp.up_proj.weight'


@pytest.mark.parametrize(
  'change, message',
  [
    (without(UP), f'lacks the tensor {UP}'),
    (without('model.embed_tokens.weight'), 'lacks the tensor model.embed_tok'),
    (
      lambda t: t | {UP: t[UP][:, :-1].clone()},
      r'up_proj.weight has shape \(23, 40\), not \(24, 40\)',
    ),
    (
      lambda t: t | {f'x{i}.weight': torch.zeros(2) for i in range(5)},
      'no place for: x0.weight, x1.weight, x2.weight$',
    ),
    (
      lambda t: t | {UP: torch.zeros(40, 24, dtype=torch.int8)},
      'up_proj.weight is stored as I8; known: F64.*before quantisation',
    ),
  ],
)
def test_tensors_that_do_not_fit(llama, change, message):
  edit_tensors(llama, change)
  refuses(llama, message)


def refuses(folder, message, **more):
  with pytest.raises(UserError, match=message) as error:
    load(folder, **more)
  assert '\n' not in str(error.value)


def test_harmless_tensors(llama):
  extra = {'model.layers.0.self_attn.rotary_emb.inv_freq': torch.zeros(4),
           'lm_head.weight': torch.zeros(61, 24)}  # fmt: skip
  edit_tensors(llama, lambda tensors: tensors | extra)
  assert load(llama).cfg.tied


@pytest.mark.parametrize(
  'changes, message',
  [
    ({'model_type': 'mamba'}, "'mamba' is not supported; supported: llama, mi"),
    ({'model_type': None}, 'architecture None is not supported'),
    ({'mlp_bias': True}, 'mlp_bias is set'),
    ({'hidden_act': 'relu'}, "activation 'relu' is not supported"),
    ({'quantization_config': {'quant_method': 'x'}}, 'quantization_config is'),
    ({'hidden_size': 'x'}, r"config.json: .*'hidden_size' expected int"),
    ({'hidden_size': 25, 'head_dim': None}, 'config.json: .*not a multiple'),
    (
      {'rope_parameters': {'rope_type': 'yarn', 'factor': 2.0,
                           'rope_theta': 1e4}},
      "rotary scaling 'yarn'; supported: linear, llama3",
    ),
  ],
)  # fmt: skip
def test_configs_we_do_not_understand(llama, changes, message):
  edit_json(llama / 'config.json', **changes)
  refuses(llama, message)


def test_files_that_are_missing_or_cut_off(tmp_path, llama):
  file = llama / 'model.safetensors'
  raw = file.read_bytes()
  for size in (0, 4, 30, len(raw) // 2, len(raw) - 1):
    file.write_bytes(raw[:size])
    refuses(llama, 'model.safetensors is cut off or damaged')
  file.unlink()
  refuses(llama, r'neither model.safetensors nor .*there: none\)')
  (llama / 'config.json').write_text('{')
  refuses(llama, 'cannot read .*config.json')
  (llama / 'config.json').unlink()
  refuses(llama, 'tiny-3.2 has no config.json')
  refuses(tmp_path / 'absent', 'is no folder, no .gguf file and no name')
  refuses('absent/at/all', 'is no folder')
  refuses(llama / 'tokenizer.json', 'is no folder, no .gguf file')
  sharded = tiny.save(
    tmp_path / 's', tiny.model_of('llama'), max_shard_size='9kB'
  )
  first = sorted(sharded.glob('model-*.safetensors'))[0]
  first.unlink()
  refuses(sharded, f'lacks 1 of the .* first {first.name}: fetch')
  assert weights_sha256(block(sharded)) is None


def test_several_models_in_one_folder(tmp_path, llama):
  sharded = tiny.save(
    tmp_path / 's', tiny.model_of('llama'), max_shard_size='9kB'
  )
  single = sharded / 'model.safetensors'
  single.write_bytes((llama / single.name).read_bytes())
  refuses(sharded, 'has model.safetensors.index.json .*=model.safetensors$')
  refuses(sharded, 'lacks 1 of the 1 files of x.safet', weights='x.safetensors')
  for file in sharded.glob('model*'):
    file.rename(sharded / f'consolidated{file.suffix}')
  refuses(sharded, r'config.model.weights \(.*: consolidated.safetensors\)')
  gguf = tmp_path / 'x.gguf'
  refuses(gguf, 'model.weights: .* is all there is', weights='x.safetensors')


def test_a_folder_without_head_has_no_logits(tmp_path):
  hf = tiny.model_of('llama', tie_word_embeddings=False)
  subject = load(tiny.save(tmp_path, hf.model))
  with pytest.raises(UserError, match='without its head .*--lm=false'):
    model.forward(subject.params, subject.cfg, [[1, 2]])


def test_a_tokenizer_of_another_model(tmp_path):
  big = tiny.tokenizer_of(words=70)
  folder = tiny.save(tmp_path / 'm', tiny.model_of('llama'), big)
  refuses(folder, 'ids up to 69, the embedding 61 rows: .*model.tokenizer')
  other = tmp_path / 'other'
  tiny.tokenizer_of().save_pretrained(other)
  assert load(folder, tokenizer=str(other)).bos == 1
  by_file = load(folder, tokenizer=str(other / 'tokenizer.json'))
  assert (by_file.bos, by_file.eos, by_file.pad) == (1, 2, 0)
  assert by_file.tokenizer.encode('w5').ids == [5]
  refuses(folder, 'no tokenizer.json', tokenizer=str(tmp_path / 'none.json'))
  for file in folder.glob('tokenizer*'):
    file.unlink()
  refuses(folder, 'm has no tokenizer: name a folder .*model.tokenizer')
  (folder / 'tokenizer.json').write_text('{}')
  refuses(folder, 'makes no fast tokenizer of it')


def test_control_tokens_beyond_the_embedding_are_dropped(tmp_path):
  # Gemma 3's small models have one for images
  words = tiny.tokenizer_of()
  words.add_special_tokens({'additional_special_tokens': ['<image>']})
  words.add_special_tokens({'pad_token': '<new>'})
  folder = tiny.save(tmp_path, tiny.model_of('llama'), words)
  subject = load(folder)
  assert subject.special == {0, 1, 2}
  assert subject.pad is None
  assert max(subject.tokenizer.encode('w5 <image> <new>').ids) < 61
  words.add_special_tokens({'bos_token': '<start>'})
  words.save_pretrained(folder)
  refuses(folder, 'ids up to 63, the embedding 61 rows')


def test_no_end_of_text(tmp_path):
  words = tiny.tokenizer_of(eos_token=None)
  folder = tiny.save(tmp_path, tiny.model_of('llama'), words)
  refuses(folder, r'names no token that ends a text \(eos\)')


def test_a_mesh_that_does_not_divide(llama, monkeypatch):
  specs = lambda cfg, parts: jax.tree.map(
    lambda x: jax.P(*['dict'] * (len(x) > 1)), model.shapes(cfg),
    is_leaf=lambda x: isinstance(x, tuple),
  )  # fmt: skip
  monkeypatch.setattr(model, 'specs', specs)
  with jax.set_mesh(make_mesh(2, 4)):  # 61 words
    refuses(llama, r'\[61, 24\] cannot be split .*lower config.mesh.dict')


def hub_raises(monkeypatch, error):
  def download(*_, **__):
    raise error

  monkeypatch.setattr(huggingface_hub, 'snapshot_download', download)


def response(status):
  return type('Response', (), {'headers': {}, 'status_code': status,
                               'request': None})()  # fmt: skip


def test_the_hub(monkeypatch, llama):
  monkeypatch.setattr(
    huggingface_hub, 'snapshot_download', lambda *_, **__: str(llama)
  )
  subject = load('some-org/tiny-model')
  assert subject.name == 'some-org/tiny-model'
  assert weights_sha256(block('some-org/tiny-model')) == subject.weights_sha256
  gated = errors.GatedRepoError('no', response=response(403))
  hub_raises(monkeypatch, gated)
  refuses('google/gemma-2-2b', 'accept its licence at https://hugging.*login')
  absent = errors.RepositoryNotFoundError('no', response=response(404))
  hub_raises(monkeypatch, absent)
  refuses('google/gema-2-2b', "no model 'google/gema-2-2b' that you may read")
  hub_raises(monkeypatch, errors.LocalEntryNotFoundError('no\nnet'))
  refuses('google/gemma-2-2b', 'cannot fetch google/gemma-2-2b .*no net')
  hub_raises(monkeypatch, errors.HfHubHTTPError('5', response=response(500)))
  refuses('google/gemma-2-2b', 'cannot fetch google/gemma-2-2b')
  assert weights_sha256(block('google/gemma-2-2b')) is None
  with pytest.raises(UserError, match="'onnx' is not known; known: gguf, hf"):
    weights_sha256(block('google/gemma-2-2b', kind='onnx'))


def test_the_hub_offline(monkeypatch, tmp_path):
  monkeypatch.setattr(huggingface_hub.constants, 'HF_HUB_OFFLINE', True)
  monkeypatch.setattr(huggingface_hub.constants, 'HF_HUB_CACHE', str(tmp_path))
  refuses('google/gemma-2-2b', 'cannot fetch google/gemma-2-2b from the hub')
