"""A tiny GGUF file as llama.cpp writes it, whole or not."""

import ml_collections
import numpy as np
import pytest

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
          add=(), skip_keys=(), more_keys=(), merge='Ċ Ċ', eos=1,
          endianess=gguf.GGUFEndian.LITTLE, split=()):  # fmt: skip
  """Writes CFG's params as a GGUF file with a byte-level tokenizer."""
  out = gguf.GGUFWriter(path, arch, endianess=endianess)
  for key, value in dict(split).items():
    out.add_uint16(f'split.{key}', value)
  keys = {
    'block_count': 2, 'embedding_length': 32, 'attention.head_count': 4,
    'attention.head_count_kv': 2, 'feed_forward_length': 64,
  }  # fmt: skip
  keys |= dict(more_keys)
  for key in keys.keys() - set(skip_keys):
    add_key = out.add_array if isinstance(keys[key], list) else out.add_uint32
    add_key(f'{arch}.{key}', keys[key])
  out.add_float32(f'{arch}.rope.freq_base', 5000.0)
  out.add_float32(f'{arch}.attention.layer_norm_rms_epsilon', 1e-5)
  out.add_tokenizer_model('gpt2')
  out.add_tokenizer_pre(pre)
  out.add_token_list(['<s>', '</s>', *byte_words(), 'ĊĊ'])
  out.add_token_types([3, 3, *[1] * 257])
  out.add_token_merges([merge])
  out.add_bos_token_id(0)
  out.add_eos_token_id(eos)
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
