"""Subject models from GGUF files (llama.cpp's format), dequantised.

The file is memory-mapped; of a quantised tensor only the blocks that a slice
needs are dequantised.
"""

import re
from pathlib import Path
from typing import Any

import jax
import numpy as np

from sae_jax.errors import UserError
from sae_jax.lm import model, place, tokens
from sae_jax.lm.config import LMConfig, RopeScaling

GEMMAS = ('gemma', 'gemma2', 'gemma3')
ARCHITECTURES = ('llama', 'qwen2', 'qwen3', *GEMMAS)  # Mistral's is llama
# Keys that change no activation; others that we do not read are refused
_HARMLESS = (
  'context_length', 'rope.scaling.original_context_length',  # of its training
  'rope.scaling.finetuned', 'vocab_size',  # likewise; the embedding's rows
  'tensor_data_layout',  # the order of rows that `_unpermuted` undoes
  'expert_used_count', 'pooling_type',  # 0 of 0; what is done with the output
)  # fmt: skip
# Widths that may be given once more, for us all the same.
_HEAD_DIMS = (
  'rope.dimension_count', 'rope.dimension_count_swa', 'attention.value_length',
  'attention.key_length_swa', 'attention.value_length_swa',
)  # fmt: skip

# Our name of a tensor of a layer -> GGUF's
_LAYER = {
  'attn_norm': 'attn_norm.weight', 'mlp_norm': 'ffn_norm.weight',
  'w_q': 'attn_q.weight', 'b_q': 'attn_q.bias',
  'w_k': 'attn_k.weight', 'b_k': 'attn_k.bias',
  'w_v': 'attn_v.weight', 'b_v': 'attn_v.bias',
  'w_o': 'attn_output.weight', 'b_o': 'attn_output.bias',
  'q_norm': 'attn_q_norm.weight', 'k_norm': 'attn_k_norm.weight',
  'w_gate': 'ffn_gate.weight', 'w_up': 'ffn_up.weight',
  'w_down': 'ffn_down.weight', 'attn_post_norm': 'post_attention_norm.weight',
  'mlp_post_norm': 'post_ffw_norm.weight',
}  # fmt: skip
_TOP = {
  'embed': 'token_embd.weight', 'final_norm': 'output_norm.weight',
  'unembed': 'output.weight',
}  # fmt: skip


def opened(path: Path) -> place.Opened:
  """A file's model, still to be read.

  Raises UserError for a file that is missing, damaged, no GGUF or of an
  architecture we do not know, for a key of it that we do not know; its parts do
  for a tokenizer of an unknown kind and for tensors that do not fit.
  """
  (meta, tensors), *others = [_open(part) for part in files(path)]
  no, count = meta.get('split.no', 0), meta.get('split.count', 1)
  if no or count > 1 + len(others):
    raise UserError(
      f'{path} is file {no + 1} of {count} of one model: give the first, '
      f'NAME-00001-of-{count:05}.gguf, with the others beside it'
    )
  for _, more in others:
    tensors |= more
  try:
    cfg = _config(meta, tensors, path)
  except (ValueError, TypeError, ArithmeticError) as error:  # bad numbers
    raise UserError(f'{path}: {error}') from error
  ids = {
    ours: meta.get(f'tokenizer.ggml.{theirs}_token_id')
    for ours, theirs in (('bos', 'bos'), ('eos', 'eos'), ('pad', 'padding'))
  }
  return place.Opened(
    cfg,
    ids,
    words=lambda: tokens.from_gguf(meta, str(path)),
    params=lambda dtype: _params(meta, tensors, cfg, dtype, path),
  )


def files(path: Path) -> list[Path]:
  """Those of a model, the first given; llama-gguf-split makes several."""
  found = re.fullmatch(r'(.*-)00001(-of-(\d{5})\.gguf)', path.name)
  name, end, count = found.groups() if found else ('', '', 0)
  each = range(1, int(count) + 1)
  return [path.with_name(f'{name}{i:05}{end}') for i in each] or [path]


def _open(file: Path) -> tuple[dict[str, Any], dict[str, Any]]:
  """A file's metadata and its tensors, mapped, by name."""
  try:
    import gguf
  except ImportError as error:
    raise UserError(
      'reading a GGUF file needs the package gguf: pip install gguf'
    ) from error
  try:
    reader = gguf.GGUFReader(file)
    if reader.byte_order == 'S':
      turn = 'turn a copy by gguf-convert-endian COPY little'
      raise UserError(f'{file} is a big-endian GGUF file: {turn}')
    meta = {name: field.contents() for name, field in reader.fields.items()}
    return meta, {tensor.name: tensor for tensor in reader.tensors}
  except OSError as error:
    raise UserError(f'cannot read {file}: {error.strerror}') from error
  except (ValueError, IndexError, KeyError, OverflowError) as error:
    raise UserError(
      f'{file} is not a GGUF file, cut off or damaged ({error}); fetch it again'
    ) from error


def _config(meta: dict[str, Any], tensors: dict[str, Any], file: Path):
  """The LMConfig that the metadata describes.

  What it leaves out of Gemma is as in llama.cpp: the windows' pattern, caps,
  the scale of queries. Its gains have the one of 1 + w in them.
  """
  arch = meta.get('general.architecture')
  if arch not in ARCHITECTURES:
    raise UserError(
      f'{file}: architecture {arch!r} is not supported; supported: '
      f'{", ".join(ARCHITECTURES)}'
    )

  unread = {x for x in meta if x.startswith(f'{arch}.')}

  def get(name: str, *default: Any) -> Any:
    key = f'{arch}.{name}'
    unread.discard(key)
    if key not in meta and not default:
      raise UserError(f'{file}: the metadata lacks {key}')
    value = meta.get(key, *default)
    if isinstance(value, list) and 'pattern' not in name:  # one for each layer
      if len(set(value)) != 1:
        raise UserError(f'{file}: {key} is not the same for every layer')
      value = value[0]
    return value

  if get('expert_count', 0):
    raise UserError(f'{file} is a mixture of experts: these are not supported')
  if 'token_embd.weight' not in tensors:
    raise UserError(f'{file} lacks the tensor token_embd.weight')
  heads, width = get('attention.head_count'), get('embedding_length')
  layers, gemma = get('block_count'), arch in GEMMAS
  late_gemma = arch in ('gemma2', 'gemma3')
  window = get('attention.sliding_window', 4096 if arch == 'gemma2' else None)
  window = window or None  # 0 means none
  local = _local_layers(arch, layers, get)
  rope_local = get('rope.freq_base_swa', 1e4) if arch == 'gemma3' else None
  caps = (50.0, 30.0) if arch == 'gemma2' else (None, None)
  scale = get('attention.scale', None)
  if scale is None and (arch, layers) in (('gemma2', 46), ('gemma3', 62)):
    scale = (width // heads) ** -0.5  # the 27B models, which no key tells
  head_dim = get('attention.key_length', width // heads)
  cfg = LMConfig(
    vocab=int(tensors['token_embd.weight'].shape[1]),
    d_model=width,
    layers=layers,
    heads=heads,
    kv_heads=get('attention.head_count_kv', heads),
    head_dim=head_dim,
    d_mlp=get('feed_forward_length'),
    norm_eps=get('attention.layer_norm_rms_epsilon'),
    post_norms=late_gemma,
    qk_norm=arch in ('qwen3', 'gemma3'),
    qkv_bias='blk.0.attn_q.bias' in tensors,
    out_bias='blk.0.attn_output.bias' in tensors,
    query_scale=scale,
    attn_softcap=get('attn_logit_softcapping', caps[0]),
    sliding_window=window,
    local_layers=local if window else None,
    rope_base=get('rope.freq_base', 1e6 if arch == 'gemma3' else 10_000.0),
    rope_scaling=_rope_scaling(get, tensors, head_dim, file),
    rope_local_base=rope_local if window else None,
    mlp='gelu_tanh' if gemma else 'silu',
    embed_scale=width**0.5 if gemma else None,
    tied='output.weight' not in tensors,
    final_softcap=get('final_logit_softcapping', caps[1]),
    context=get('context_length', None),
  )
  known = dict.fromkeys(_HEAD_DIMS, head_dim) | {'attention.causal': True}
  for key in sorted(unread):
    name = key.removeprefix(f'{arch}.')
    if name not in _HARMLESS and get(name) != known.get(name):
      only = f'only {known[name]} is' if name in known else 'not'
      raise UserError(f'{file}: {key} is {get(name)}: {only} supported')
  return cfg


def _local_layers(arch: str, layers: int, get) -> tuple[bool, ...] | None:
  """Which layers have the window: all but each n-th, or a list."""
  usual = {'gemma2': 2, 'gemma3': 6}.get(arch)
  pattern = get('attention.sliding_window_pattern', usual)
  if pattern is None:
    return None
  if isinstance(pattern, list):
    return tuple(bool(x) for x in pattern)
  return tuple((i + 1) % pattern > 0 for i in range(layers))


def _rope_scaling(get, tensors, head_dim: int, file: Path):
  # A factor alone is linear; its old name; 0 and 1 are none: as in llama.cpp
  kind = get('rope.scaling.type', 'linear')
  factor = get('rope.scaling.factor', get('rope.scale_linear', 0))
  if kind not in ('none', 'linear'):
    raise UserError(f'{file}: rotary scaling {kind!r} is not supported')
  if kind == 'linear' and factor not in (0, 1):
    return RopeScaling('linear', factor)
  if 'rope_freqs.weight' not in tensors:
    return None
  # Llama 3.1 and later: what each frequency is divided by. Two numbers of the
  # formula are the same in all of them; check that it gives the file's.
  stored = np.asarray(tensors['rope_freqs.weight'].data, np.float32)
  scaling = RopeScaling('llama3', float(stored.max()), 1.0, 4.0, 8192)
  places = np.arange(0, head_dim, 2) / head_dim
  frequency = get('rope.freq_base', 10_000.0) ** -places
  turns = scaling.original_length * frequency / (2 * np.pi)
  keep = np.clip((turns - 1) / 3, 0, 1)
  kept = keep + (1 - keep) / max(scaling.factor, 1)
  if stored.shape != kept.shape or not np.allclose(stored * kept, 1, rtol=1e-3):
    raise UserError(f"{file}: rope_freqs.weight is not Llama 3's scaling")
  return scaling


def _params(
  meta: dict[str, Any],
  tensors: dict[str, Any],
  cfg: LMConfig,
  dtype: jax.typing.DTypeLike,
  file: Path,
) -> model.Params:
  """Every tensor of the file as one of ours, in its shards."""
  heads = {}  # of tensors whose rows llama.cpp's converter reorders
  if meta['general.architecture'] == 'llama':
    heads = {'attn_q': cfg.heads, 'attn_k': cfg.kv_heads}
  stored = {}
  for theirs, tensor in tensors.items():
    shape = tuple(int(x) for x in tensor.shape[::-1])
    parts = heads.get(theirs.split('.')[2] if theirs.count('.') > 2 else '')
    stored[theirs] = place.Stored(
      shape, _reader(tensor, shape, _unpermuted(shape[0], parts), file)
    )

  def name(ours: str, layer: int) -> str:
    return _TOP[ours] if layer < 0 else f'blk.{layer}.{_LAYER[ours]}'

  used = getattr(cfg.rope_scaling, 'kind', None) == 'llama3'
  harmless = lambda theirs: used and theirs == 'rope_freqs.weight'
  return place.load(cfg, stored, name, dtype, str(file), harmless)


def _unpermuted(rows: int, heads: int | None) -> np.ndarray | None:
  """Order of rows of q or k that makes rotary pairs (i, i + h/2).

  In the file the two rows of a pair lie side by side, (0, h/2, 1, h/2+1, ..)
  within a head. None: as they are.
  """
  if heads is None or rows % (2 * heads):
    return None
  pairs = np.arange(rows).reshape(heads, rows // heads // 2, 2)
  return pairs.swapaxes(1, 2).reshape(rows)


def _reader(tensor: Any, shape: tuple[int, ...], order, file: Path):
  """Index -> that slice of a tensor in float32, [out, in] as in the file."""
  import gguf

  block, size = gguf.GGML_QUANT_SIZES[tensor.tensor_type]

  def read(index: place.Index) -> np.ndarray:
    *rows, columns = index
    data = tensor.data
    if order is not None:
      places = order[index[0]]
      if len(shape) == 1:
        return _dequantise(data, tensor, file)[places]
      data = data[places]
    elif rows:
      data = data[rows[0]]
    # Columns come in blocks of `block` numbers in `size` bytes
    start, stop, _ = columns.indices(shape[-1])
    first, last = start // block, -(-stop // block)
    if data.dtype == np.uint8:
      data = data[..., first * size : last * size]
    else:
      data = data[..., start:stop]
      first = start // block
    whole = _dequantise(data, tensor, file)
    skip = start - first * block
    return whole[..., skip : skip + stop - start]

  return read


def _dequantise(data: np.ndarray, tensor: Any, file: Path) -> np.ndarray:
  import gguf

  try:
    return gguf.quants.dequantize(data, tensor.tensor_type)
  except NotImplementedError as error:
    raise UserError(
      f'{file}: tensor {tensor.name} is stored as {tensor.tensor_type.name}, '
      'which the gguf package cannot dequantise'
    ) from error
