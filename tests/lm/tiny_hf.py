"""Tiny random models of every family, saved as transformers saves them."""

import dataclasses
import json

import jax.numpy as jnp
import safetensors.torch
import tokenizers
import torch
import transformers
from ml_collections import ConfigDict

from sae_jax.lm.config import LMConfig, RopeScaling
from sae_jax.lm.subject import load_subject

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
  'llama_linear': (
    'Llama',
    dict(
      tie_word_embeddings=True,
      rope_parameters={
        'rope_type': 'linear', 'factor': 4.0, 'rope_theta': 1e4,
      },
    ),
    dict(rope_scaling=RopeScaling('linear', 4.0)),
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
  'qwen3_window': (
    'Qwen3',
    dict(
      tie_word_embeddings=True,
      attention_bias=True,
      use_sliding_window=True,
      sliding_window=WINDOW,
      max_window_layers=1,
    ),
    dict(
      qk_norm=True,
      qkv_bias=True,
      out_bias=True,
      sliding_window=WINDOW,
      local_layers=(False, True, True),
    ),
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
      query_scale=9**-0.5,
      rope_local_base=100.0,
      rope_scaling=RopeScaling('linear', 8.0),
    ),
  ),
}  # fmt: skip


def model_of(family, **changes):
  """transformers' model with every parameter random."""
  name, theirs, _ = FAMILIES[family]
  suffix = 'TextConfig' if name == 'Gemma3' else 'Config'
  config = getattr(transformers, name + suffix)(**SIZES | theirs | changes)
  return randomised(getattr(transformers, f'{name}ForCausalLM')(config))


def randomised(hf):
  torch.manual_seed(0)
  with torch.no_grad():
    for parameter in hf.parameters():
      if parameter.ndim > 1:
        parameter.normal_(0, parameter[0].numel() ** -0.5)
      else:  # gains and biases off their neutral values
        parameter.add_(torch.randn_like(parameter) * 0.3)
  return hf.eval()


def expected(family):
  """The LMConfig of a family's model."""
  return dataclasses.replace(OURS, **FAMILIES[family][2])


def tokenizer_of(words=61, **settings):
  """A fast tokenizer of `words` words that puts BOS before a text."""
  vocab = {'<pad>': 0, '<s>': 1, '</s>': 2}
  vocab |= {f'w{i}': i for i in range(3, words)}
  tokenizer = tokenizers.Tokenizer(
    tokenizers.models.WordLevel(vocab, unk_token='w3')
  )
  tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
  tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
    single='<s> $A', special_tokens=[('<s>', 1)]
  )
  names = dict(bos_token='<s>', eos_token='</s>', pad_token='<pad>')
  return transformers.PreTrainedTokenizerFast(
    tokenizer_object=tokenizer, **names | settings
  )


def save(folder, hf, tokenizer=None, **options):
  """Writes model and tokenizer; options: of save_pretrained."""
  hf.save_pretrained(folder, **options)
  (tokenizer or tokenizer_of()).save_pretrained(folder)
  return folder


def block(path, **more):
  return ConfigDict({'kind': '', 'path': str(path), 'tokenizer': ''} | more)


def load(path, dtype=jnp.float32, **more):
  return load_subject(block(path, **more), dtype)


def edit_json(path, **changes):
  """Changes keys of a JSON file; None takes a key away."""
  data = json.loads(path.read_text()) | changes
  data = {key: value for key, value in data.items() if value is not None}
  path.write_text(json.dumps(data))


def edit_tensors(folder, change):
  """Replaces the tensors of a folder by change(tensors)."""
  file = folder / 'model.safetensors'
  tensors = change(safetensors.torch.load_file(file))
  safetensors.torch.save_file(tensors, file)
