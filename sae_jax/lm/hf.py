"""Subject models from Hugging Face folders: config.json and safetensors.

transformers reads config.json, whose keys changed over the years; the weights
are memory-mapped and read in slices (safetensors' own numpy reader knows no
bfloat16).
"""

import dataclasses
import json
import struct
from pathlib import Path
from typing import Any, Literal

import ml_dtypes
import numpy as np
import safetensors

from sae_jax.errors import UserError
from sae_jax.lm import place, tokens
from sae_jax.lm.config import LMConfig, RopeScaling

CONFIG, SINGLE = 'config.json', 'model.safetensors'
INDEX = 'model.safetensors.index.json'

GEMMAS = ('gemma', 'gemma2', 'gemma3', 'gemma3_text')
MODEL_TYPES = ('llama', 'mistral', 'qwen2', 'qwen3', *GEMMAS)

_DTYPES = {
  'F64': np.float64, 'F32': np.float32, 'F16': np.float16,
  'BF16': ml_dtypes.bfloat16,
}  # fmt: skip
_ACTIVATIONS: dict[str, Literal['silu', 'gelu_tanh']] = {
  'silu': 'silu', 'gelu_pytorch_tanh': 'gelu_tanh', 'gelu_new': 'gelu_tanh',
}  # fmt: skip

_NAMES = {
  'attn_norm': 'input_layernorm.weight',
  'mlp_norm': 'post_attention_layernorm.weight',
  'q_norm': 'self_attn.q_norm.weight', 'k_norm': 'self_attn.k_norm.weight',
  'w_q': 'self_attn.q_proj.weight', 'b_q': 'self_attn.q_proj.bias',
  'w_k': 'self_attn.k_proj.weight', 'b_k': 'self_attn.k_proj.bias',
  'w_v': 'self_attn.v_proj.weight', 'b_v': 'self_attn.v_proj.bias',
  'w_o': 'self_attn.o_proj.weight', 'b_o': 'self_attn.o_proj.bias',
  'w_gate': 'mlp.gate_proj.weight', 'w_up': 'mlp.up_proj.weight',
  'w_down': 'mlp.down_proj.weight',
}  # fmt: skip
_POST_NORM_NAMES = _NAMES | {  # one name, two meanings
  'attn_post_norm': 'post_attention_layernorm.weight',
  'mlp_norm': 'pre_feedforward_layernorm.weight',
  'mlp_post_norm': 'post_feedforward_layernorm.weight',
}
# Where the decoder is: alone, inside Gemma 3 with images (as published, as
# transformers 5 writes it), below another head, saved without any.
_PREFIXES = ('model.', 'language_model.model.', 'model.language_model.')
_PREFIXES += ('transformer.', '')
_IMAGES = ('vision_tower.', 'multi_modal_projector.')
_OTHER_HEADS = ('score.', 'qa_outputs.', 'v_head.')  # classifiers, rewards


def opened(folder: Path, weights: str = '') -> place.Opened:
  """A folder's model, still to be read; weights: as of weight_files.

  Raises UserError for what is missing, cut off or not implemented; its parts do
  for a missing tokenizer, tensors that do not fit.
  """
  cfg, ids = _read_config(folder)
  files = {}
  for path in weight_files(folder, weights):
    files |= _tensors(path)
  prefix = next(
    (x for x in _PREFIXES if f'{x}embed_tokens.weight' in files), 'model.'
  )
  outer = 'language_model.' if prefix == 'language_model.model.' else ''
  names = _POST_NORM_NAMES if cfg.post_norms else _NAMES
  top = {
    'embed': f'{prefix}embed_tokens.weight',
    'final_norm': f'{prefix}norm.weight',
    'unembed': f'{outer}lm_head.weight',
  }
  cfg = dataclasses.replace(cfg, head=cfg.tied or top['unembed'] in files)

  def name(ours: str, layer: int) -> str:
    return top[ours] if layer < 0 else f'{prefix}layers.{layer}.{names[ours]}'

  def harmless(theirs: str) -> bool:
    return (
      theirs.endswith('rotary_emb.inv_freq')  # buffers of old files
      or (cfg.tied and theirs == top['unembed'])  # the embedding once more
      or theirs.removeprefix('model.').startswith(_IMAGES)
      or theirs.startswith(_OTHER_HEADS)
    )

  where = str(folder)
  hint = 'name a folder that has one with model.tokenizer'
  return place.Opened(
    cfg,
    ids,
    words=lambda: tokens.from_folder(folder, hint),
    params=lambda dtype: place.load(cfg, files, name, dtype, where, harmless),
  )


def _read_config(folder: Path) -> tuple[LMConfig, dict[str, int | None]]:
  import transformers  # here: takes a second
  from huggingface_hub.errors import StrictDataclassError

  raw = _read_json(folder / CONFIG)
  kind = raw.get('model_type')
  if kind not in MODEL_TYPES:
    raise UserError(
      f'{folder}: architecture {kind!r} is not supported; supported: '
      f'{", ".join(MODEL_TYPES)}'
    )
  try:
    # Given head_dim, the hidden size need be no multiple of the heads, whatever
    # transformers checks (its issue 46082): it is told 0 first.
    size = raw.get('head_dim') and raw.get('hidden_size')
    told = dict[str, Any](raw, hidden_size=0) if size else raw
    whole = transformers.AutoConfig.for_model(**told)
    if size:
      whole.hidden_size = size
    c = whole.text_config if kind == 'gemma3' else whole
    _check(kind, c, raw, folder)
    cfg = _lm_config(kind, c, tied=bool(whole.tie_word_embeddings))
  except (ValueError, TypeError, KeyError, StrictDataclassError) as error:
    reason = ' '.join(str(error).split())
    raise UserError(f'{folder / CONFIG}: {reason}') from error
  ids = {}
  for name in ('bos', 'eos', 'pad'):
    value = getattr(c, f'{name}_token_id', None)
    ids[name] = value[0] if isinstance(value, list) else value
  return cfg, ids


def weight_files(folder: Path, weights: str = '') -> list[Path]:
  """The safetensors of a folder's model, sorted by name; each is there.

  weights: the file or the index to read; '' is the one that config.json names
  (`transformers_weights`) or that is there. Raises UserError where it is both.
  """
  given = weights or _read_json(folder / CONFIG).get('transformers_weights')
  there = [x for x in (INDEX, SINGLE) if (folder / x).exists()]
  if not given and not there:
    others = [x.name for x in sorted(folder.glob('*.safetensors'))]
    raise UserError(
      f'{folder} has neither {SINGLE} nor {INDEX}: save the model with '
      'save_pretrained, or name another file with config.model.weights '
      f'(safetensors there: {", ".join(others) or "none"})'
    )
  names = [first := given or there[0]]
  if first.endswith('.json'):
    names = sorted(set(_read_json(folder / first)['weight_map'].values()))
  if not given and SINGLE in set(there) - set(names):
    raise UserError(  # transformers reads the single file
      f'{folder} has {INDEX} with files of its own and {SINGLE}: say which to '
      f'read, --config.model.weights={INDEX} or ={SINGLE}'
    )
  absent = [name for name in names if not (folder / name).exists()]
  if absent:
    raise UserError(
      f'{folder} lacks {len(absent)} of the {len(names)} files of {first}, '
      f'first {absent[0]}: fetch the model again'
    )
  return [folder / name for name in names]


def _read_json(path: Path) -> dict[str, Any]:
  try:
    return json.loads(path.read_text(encoding='utf-8'))
  except FileNotFoundError as error:
    raise UserError(
      f'{path.parent} has no {path.name}: give the folder of a Hugging Face '
      'model'
    ) from error
  except (OSError, ValueError) as error:
    raise UserError(f'cannot read {path}: {error}') from error


def _tensors(path: Path) -> dict[str, place.Stored]:
  """Name -> tensor of one safetensors file, mapped, not read."""
  try:
    with safetensors.safe_open(path, 'numpy'):
      pass  # checks the header and that the file is as long as it says
    with open(path, 'rb') as file:
      (length,) = struct.unpack('<Q', file.read(8))
      header = json.loads(file.read(length))
  except (safetensors.SafetensorError, OSError) as error:
    raise UserError(
      f'{path} is cut off or damaged ({error}); fetch it again'
    ) from error
  header.pop('__metadata__', None)
  found = {}
  for name, entry in header.items():
    if entry['dtype'] not in _DTYPES:
      raise UserError(
        f'{path}: tensor {name} is stored as {entry["dtype"]}; known: '
        f'{", ".join(_DTYPES)}; give the model before quantisation'
      )
    shape = tuple(entry['shape'])
    if 0 not in shape:  # nothing to map
      array = np.memmap(
        path,
        _DTYPES[entry['dtype']],
        'r',
        offset=8 + length + entry['data_offsets'][0],
        shape=shape,
      )
      found[name] = place.Stored(shape, array.__getitem__)
  return found


def _check(kind: str, c: Any, raw: dict[str, Any], folder: Path) -> None:
  """Raises UserError for settings that change what is computed."""
  refused = {
    'quantization_config': 'give the model before quantisation',
    'mlp_bias': 'biases in the MLP are not supported',
    'use_bidirectional_attention': 'only causal attention is supported',
  }
  for key, why in refused.items():
    if getattr(c, key, None) or raw.get(key):
      raise UserError(f'{folder / CONFIG}: {key} is set: {why}')
  kinds = set(getattr(c, 'layer_types', None) or ())
  if other := kinds - {'full_attention', 'sliding_attention'}:
    raise UserError(f'{folder / CONFIG}: layer_types {sorted(other)} unknown')
  act = _activation(c)
  if act not in _ACTIVATIONS:
    raise UserError(
      f'{folder / CONFIG}: activation {act!r} is not supported; supported: '
      f'{", ".join(_ACTIVATIONS)}'
    )


def _activation(c: Any) -> str:
  return getattr(c, 'hidden_activation', None) or c.hidden_act


def _lm_config(kind: str, c: Any, tied: bool) -> LMConfig:
  """LMConfig of a transformers config; ValueError for an unknown rotary."""
  gemma = kind in GEMMAS
  late_gemma = gemma and kind != 'gemma'
  bias = bool(getattr(c, 'attention_bias', False))
  window, local = _windows(kind, c)
  rope, rope_local = c.rope_parameters, {}
  if 'full_attention' in rope:
    rope, rope_local = rope['full_attention'], rope['sliding_attention']
    if _scaling(rope_local, c) is not None:
      raise ValueError('scaled rotary embedding in sliding layers')
  return LMConfig(
    vocab=c.vocab_size,
    d_model=c.hidden_size,
    layers=c.num_hidden_layers,
    heads=c.num_attention_heads,
    kv_heads=c.num_key_value_heads,
    head_dim=getattr(c, 'head_dim', None)
    or c.hidden_size // c.num_attention_heads,
    d_mlp=c.intermediate_size,
    norm_eps=c.rms_norm_eps,
    norm_plus_one=gemma,
    post_norms=late_gemma,
    qk_norm=kind in ('qwen3', 'gemma3', 'gemma3_text'),
    qkv_bias=bias or kind == 'qwen2',
    out_bias=bias and kind != 'qwen2',
    query_scale=c.query_pre_attn_scalar**-0.5 if late_gemma else None,
    attn_softcap=c.attn_logit_softcapping if late_gemma else None,
    sliding_window=window,
    local_layers=local,
    rope_base=float(rope['rope_theta']),
    rope_scaling=_scaling(rope, c),
    rope_local_base=rope_local.get('rope_theta'),
    mlp=_ACTIVATIONS[_activation(c)],
    embed_scale=c.hidden_size**0.5 if gemma else None,
    tied=tied,
    final_softcap=c.final_logit_softcapping if late_gemma else None,
    context=getattr(c, 'max_position_embeddings', None),
  )


def _windows(kind: str, c: Any) -> tuple[int | None, tuple[bool, ...] | None]:
  """sliding_window and local_layers; Mistral's window is on every layer."""
  if kind in ('llama', 'gemma'):
    return None, None
  if kind == 'mistral' and not getattr(c, 'layer_types', None):
    return c.sliding_window, None
  local = tuple(x == 'sliding_attention' for x in c.layer_types)
  return (c.sliding_window, local) if any(local) else (None, None)


def _scaling(rope: dict[str, Any], c: Any) -> RopeScaling | None:
  kind = rope.get('rope_type', 'default')
  if rope.get('partial_rotary_factor', 1.0) != 1.0:
    raise ValueError('partial rotary embedding is not supported')
  if kind == 'default':
    return None
  if kind == 'linear':
    return RopeScaling('linear', float(rope['factor']))
  if kind == 'llama3':
    return RopeScaling(
      'llama3',
      float(rope['factor']),
      float(rope['low_freq_factor']),
      float(rope['high_freq_factor']),
      int(rope['original_max_position_embeddings']),
    )
  raise ValueError(f'rotary scaling {kind!r}; supported: linear, llama3')
