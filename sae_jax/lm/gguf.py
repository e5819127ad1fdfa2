"""Subject models from GGUF files (llama.cpp's format), dequantised.

The file is memory-mapped and converted tensor by tensor, so that no more than
one tensor exists twice.
"""

import hashlib
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sae_jax.errors import UserError
from sae_jax.lm import model, tokens
from sae_jax.lm.config import LMConfig, RopeScaling
from sae_jax.lm.subject import Subject, tokenizer_sha256

ARCHITECTURES = ('llama',)

# Our name of a matrix or vector of a layer -> GGUF's
_LAYER = {
  'attn_norm': 'attn_norm', 'w_q': 'attn_q', 'w_k': 'attn_k', 'w_v': 'attn_v',
  'w_o': 'attn_output', 'mlp_norm': 'ffn_norm', 'w_gate': 'ffn_gate',
  'w_up': 'ffn_up', 'w_down': 'ffn_down',
}  # fmt: skip


def load(path: str, dtype: jax.typing.DTypeLike = jnp.float32) -> Subject:
  """Reads a model of the llama architecture with its tokenizer.

  dtype is that of the matrices; norm gains stay float32. Raises UserError for
  a file that is missing, damaged, no GGUF or of another architecture.
  """
  file = Path(path).expanduser()
  reader = _open(file)
  meta = {name: field.contents() for name, field in reader.fields.items()}
  tensors = {tensor.name: tensor for tensor in reader.tensors}
  cfg = _config(meta, tensors, file)
  tokenizer, special = tokens.from_gguf(meta, str(file))
  with open(file, 'rb') as opened:
    weights_sha256 = hashlib.file_digest(opened, 'sha256').hexdigest()
  return Subject(
    name=file.stem,
    cfg=cfg,
    params=_params(tensors, cfg, dtype, file),
    tokenizer=tokenizer,
    bos=_get(meta, 'tokenizer.ggml.bos_token_id', file),
    eos=_get(meta, 'tokenizer.ggml.eos_token_id', file),
    pad=meta.get('tokenizer.ggml.padding_token_id'),
    special=special,
    weights_sha256=weights_sha256,
    tokenizer_sha256=tokenizer_sha256(tokenizer),
  )


def _open(file: Path):
  """A gguf.GGUFReader, or a UserError that says what is wrong."""
  try:
    import gguf
  except ImportError as error:
    raise UserError(
      'reading a GGUF file needs the package gguf: pip install gguf'
    ) from error
  try:
    with open(file, 'rb') as opened:
      magic = opened.read(4)
  except OSError as error:
    raise UserError(
      f'cannot read the model {file}: {error.strerror}'
    ) from error
  if magic != b'GGUF':
    raise UserError(f'{file} is not a GGUF file (it starts with {magic!r})')
  try:
    return gguf.GGUFReader(file)
  except (ValueError, IndexError, KeyError, OverflowError) as error:
    raise UserError(
      f'{file} is cut off or damaged ({error}); fetch it again'
    ) from error


def _get(meta: dict[str, Any], name: str, file: Path) -> Any:
  if name not in meta:
    raise UserError(f'{file}: the metadata lacks {name}')
  return meta[name]


def _config(meta: dict[str, Any], tensors: dict[str, Any], file: Path):
  """The LMConfig that the metadata describes."""
  arch = meta.get('general.architecture')
  if arch not in ARCHITECTURES:
    raise UserError(
      f'{file}: architecture {arch!r} is not supported; supported: '
      f'{", ".join(ARCHITECTURES)}'
    )
  get = lambda name: _get(meta, f'{arch}.{name}', file)
  heads, width = get('attention.head_count'), get('embedding_length')
  stretch = meta.get(f'{arch}.rope.scaling.type', 'none')
  if stretch not in ('none', 'linear'):
    raise UserError(f'{file}: rotary scaling {stretch!r} is not supported')
  if 'token_embd.weight' not in tensors:
    raise UserError(f'{file} lacks the tensor token_embd.weight')
  return LMConfig(
    vocab=int(tensors['token_embd.weight'].shape[1]),
    d_model=width,
    layers=get('block_count'),
    heads=heads,
    kv_heads=meta.get(f'{arch}.attention.head_count_kv', heads),
    head_dim=meta.get(f'{arch}.attention.key_length', width // heads),
    d_mlp=get('feed_forward_length'),
    norm_eps=get('attention.layer_norm_rms_epsilon'),
    rope_base=meta.get(f'{arch}.rope.freq_base', 10_000.0),
    rope_scaling=RopeScaling('linear', get('rope.scaling.factor'))
    if stretch == 'linear'
    else None,
    tied='output.weight' not in tensors,
  )


def _params(tensors: dict[str, Any], cfg: LMConfig, dtype, file: Path):
  """Every tensor of the file as one of ours; none may be left over."""
  left = dict(tensors)

  def take(name: str, shape: tuple[int, ...], heads: int = 0) -> jax.Array:
    if f'{name}.weight' not in left:
      raise UserError(f'{file} lacks the tensor {name}.weight')
    w = _dequantise(left.pop(f'{name}.weight'), file)
    w = _unpermute(w, heads) if heads else w
    w = w if name == 'token_embd' else w.T
    if w.shape != shape:
      raise UserError(
        f'{file}: tensor {name}.weight has shape {w.shape}, not {shape}'
      )
    return jnp.asarray(w, dtype if w.ndim > 1 else jnp.float32)

  want = model.shapes(cfg)
  heads = {'w_q': cfg.heads, 'w_k': cfg.kv_heads}
  params = {
    'embed': take('token_embd', want['embed']),
    'layers': [
      {
        ours: take(f'blk.{i}.{theirs}', layer[ours], heads.get(ours, 0))
        for ours, theirs in _LAYER.items()
      }
      for i, layer in enumerate(want['layers'])
    ],
    'final_norm': take('output_norm', want['final_norm']),
  }
  if not cfg.tied:
    params['unembed'] = take('output', want['unembed'])
  if left:
    raise UserError(
      f'{file} has tensors this model has no place for: '
      f'{", ".join(sorted(left)[:3])}'
    )
  return params


def _dequantise(tensor: Any, file: Path) -> np.ndarray:
  """One tensor as float32, [out, in] as the file's writer had it."""
  import gguf

  try:
    return gguf.quants.dequantize(tensor.data, tensor.tensor_type)
  except NotImplementedError as error:
    raise UserError(
      f'{file}: tensor {tensor.name} is stored as {tensor.tensor_type.name}, '
      'which the gguf package cannot dequantise'
    ) from error


def _unpermute(w: np.ndarray, heads: int) -> np.ndarray:
  """Rows of q or k from llama.cpp's order to the rotate-half order.

  There the two rows of a rotary pair lie side by side, (0, h/2, 1, h/2+1, ..)
  within a head; here the pairs are (i, i + h/2).
  """
  rows, width = w.shape
  pairs = w.reshape(heads, rows // heads // 2, 2, width)
  return pairs.swapaxes(1, 2).reshape(rows, width)
