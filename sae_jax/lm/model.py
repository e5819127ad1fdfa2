"""The subject model: a pure-JAX decoder that gives its activations at sites.

Params are a plain dict, every matrix [in, out]. Nothing beyond the deepest
asked site is computed; an edit replaces the tensor at a site and goes on.
"""

import difflib
import functools
import re
from collections.abc import Callable, Generator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from sae_jax.errors import UserError
from sae_jax.lm.attention import attention, rotation
from sae_jax.lm.config import LMConfig
from sae_jax.lm.layers import (
  linear,
  lookup,
  mlp,
  norm,
  rows_whole,
  unembed,
)
from sae_jax.parallel.mesh import DICT

Params = dict[str, Any]

# Places within a layer, in the order in which they are computed:
STEPS = {
  'resid_pre': 'residual stream before the layer',
  'attn_z': 'heads concatenated, before W_O [heads * head_dim]',
  'attn_out': 'what attention adds to the residual stream (after a post-norm)',
  'mlp_in': 'input of the MLP, after its norm',
  'mlp_out': 'what the MLP adds to the residual stream (after a post-norm)',
  'resid_post': 'residual stream after the layer',
}


class Output(NamedTuple):
  logits: jax.Array | None  # [B, T, V] float32
  activations: dict[str, jax.Array]  # site -> [B, T, width], the asked dtype


def forward(
  params: Params,
  cfg: LMConfig,
  tokens: jax.Array,
  *,
  sites: Sequence[str] = (),
  edits: Mapping[str, Callable[[jax.Array], jax.Array]] | None = None,
  logits: bool = True,
  dtype: jax.typing.DTypeLike = jnp.float32,
) -> Output:
  """Runs the decoder over tokens [B, T] (int32), positions from 0.

  An activation is taken after the edit of its site. With `logits=False`
  nothing beyond the deepest asked site is computed (edits beyond it have no
  effect). Softmax, norms and logits are float32 whatever `dtype` is. Under
  jit `cfg`, `sites`, `logits` and `dtype` are static.

  Under an explicit mesh params lie as `specs` says and tokens P(DATA, None).
  Every activation, and what an edit is given, is then P(DATA, None, None):
  attn_z is gathered if it is asked for. A layer costs two all-reduces of
  [B, T, d], after w_o and w_down; logits stay split over the vocabulary.

  Raises UserError for a site the model does not have, or no head (logits).
  """
  if logits:
    check_head(cfg)
  edits = edits or {}
  check_sites(cfg, (*sites, *edits))
  wanted = {*sites, 'logits'} if logits else set(sites)
  seen = {}
  walk = _walk(params, cfg, jnp.asarray(tokens), dtype)
  site, x = next(walk)
  while wanted:
    if site in edits:
      x = edits[site](rows_whole(x))
    if site in wanted:
      seen[site] = x if site == 'logits' else rows_whole(x)
      wanted.remove(site)
    if wanted:
      site, x = walk.send(x)
  return Output(seen.pop('logits', None), seen)


def check_sites(cfg: LMConfig, sites: Sequence[str]) -> None:
  """Raises UserError, naming the nearest right site, for one that is not."""
  for site in sites:
    found = re.fullmatch(r'layer_(\d+)\.(\w+)', site)
    layer, step = found.groups() if found else ('0', '')
    # int() first: layer_007 would be a second name of layer_7
    if found and step in STEPS and f'layer_{int(layer)}.{step}' == site:
      if int(layer) < cfg.layers:
        continue
    number = re.search(r'\d+', site)
    layer = min(int(number[0]) if number else 0, cfg.layers - 1)
    word = step or re.split(r'[.\d]', site)[-1]
    near = difflib.get_close_matches(word, STEPS, 1, 0.0)[0]
    raise UserError(
      f'site {site!r} does not exist in this model of {cfg.layers} layers; the '
      f'nearest is layer_{layer}.{near} (places: {", ".join(STEPS)})'
    )


def check_head(cfg: LMConfig) -> None:
  """Raises UserError where the model gives activations but no logits."""
  if not cfg.head:
    raise UserError(
      'the language model was saved without its head (lm_head.weight), so that '
      'it has no logits: evaluate with --lm=false'
    )


def site_width(cfg: LMConfig, site: str) -> int:
  """Length of one activation vector at a site (UserError if it is none)."""
  check_sites(cfg, (site,))
  return cfg.heads * cfg.head_dim if site.endswith('attn_z') else cfg.d_model


def next_token_loss(logits: jax.Array, tokens: jax.Array) -> jax.Array:
  """Cross-entropy in nats, float32 [B, T-1], of predicting tokens[:, 1:]."""
  logits = logits[:, :-1].astype(jnp.float32)
  # A sum instead of a look-up: it works where the vocabulary is split.
  at = jax.lax.broadcasted_iota(tokens.dtype, logits.shape, 2)
  right = jnp.where(at == tokens[:, 1:, None], logits, 0).sum(-1)
  return jax.nn.logsumexp(logits, axis=-1) - right


def _walk(
  params: Params, cfg: LMConfig, tokens: jax.Array, dtype
) -> Generator[tuple[str, jax.Array], jax.Array, None]:
  """Yields (site, tensor) in order and goes on with the tensor it is sent.

  Work happens between two yields, so whoever stops asking stops computing.
  """
  x = lookup(params['embed'], tokens).astype(dtype)
  if cfg.embed_scale is not None:
    # Gemma rounds the scale to the working precision: 34.0 for bfloat16, 1152
    x = x * jnp.asarray(cfg.embed_scale, dtype)
  turns = {local: rotation(cfg, local, x.shape[1]) for local in (False, True)}
  for i, p in enumerate(params['layers']):
    x = yield f'layer_{i}.resid_pre', x
    turn = turns[cfg.window(i) is not None]
    heads = attention(p, cfg, i, norm(p['attn_norm'], cfg, x), turn)
    z = yield f'layer_{i}.attn_z', heads
    out = linear(p, 'o', z)
    if cfg.post_norms:
      out = norm(p['attn_post_norm'], cfg, out)
    out = yield f'layer_{i}.attn_out', out
    x = x + out
    y = yield f'layer_{i}.mlp_in', norm(p['mlp_norm'], cfg, x)
    out = mlp(p, cfg, y)
    if cfg.post_norms:
      out = norm(p['mlp_post_norm'], cfg, out)
    out = yield f'layer_{i}.mlp_out', out
    x = yield f'layer_{i}.resid_post', x + out
  yield 'logits', unembed(params, cfg, x)


def shapes(cfg: LMConfig) -> Params:
  """The params' tree with a shape (tuple of int) in place of each array."""
  d, h, m = cfg.d_model, cfg.head_dim, cfg.d_mlp
  q, k = cfg.heads * h, cfg.kv_heads * h
  layer = {
    'attn_norm': (d,), 'mlp_norm': (d,), 'w_q': (d, q), 'w_k': (d, k),
    'w_v': (d, k), 'w_o': (q, d), 'w_gate': (d, m), 'w_up': (d, m),
    'w_down': (m, d),
  }  # fmt: skip
  if cfg.post_norms:
    layer |= {'attn_post_norm': (d,), 'mlp_post_norm': (d,)}
  if cfg.qk_norm:
    layer |= {'q_norm': (h,), 'k_norm': (h,)}
  if cfg.qkv_bias:
    layer |= {'b_q': (q,), 'b_k': (k,), 'b_v': (k,)}
  if cfg.out_bias:
    layer |= {'b_o': (d,)}
  tree = {'embed': (cfg.vocab, d), 'final_norm': (d,)}
  if cfg.head and not cfg.tied:
    tree['unembed'] = (d, cfg.vocab)
  return tree | {'layers': [dict(layer) for _ in range(cfg.layers)]}


def specs(cfg: LMConfig, parts: int = 1) -> Params:
  """The params' tree with a PartitionSpec in place of each array.

  Tensor parallelism over mesh axis DICT, whose size is `parts`: heads, the
  MLP's inner width and the vocabulary are split where `parts` divides them,
  and whole on every device where it does not (key-value heads, often fewer
  than devices, for themselves). Nothing is split over DATA.
  """
  split = lambda size: None if size % parts else DICT
  q, k, m = split(cfg.heads), split(cfg.kv_heads), split(cfg.d_mlp)
  vocab = split(cfg.vocab)
  out = {'q': q, 'k': k, 'v': k, 'gate': m, 'up': m}  # axis of the columns
  into = {'w_o': q, 'w_down': m}  # axis of the rows

  def spec(name: str) -> jax.P:
    kind, _, part = name.partition('_')
    if name in into:
      return jax.P(into[name], None)
    if kind == 'w':
      return jax.P(None, out[part])
    return jax.P(out.get(part) if kind == 'b' else None)

  tree = shapes(cfg)
  layers = [{name: spec(name) for name in layer} for layer in tree['layers']]
  ends = {'embed': jax.P(vocab, None), 'unembed': jax.P(None, vocab)}
  ends['final_norm'] = jax.P(None)
  return {name: ends[name] for name in tree if name != 'layers'} | {
    'layers': layers
  }


@functools.partial(jax.jit, static_argnames='cfg')
def init(key: jax.Array, cfg: LMConfig) -> Params:
  """Random float32 params (for tests): normal, variance 1 / fan-in."""
  is_shape = lambda x: isinstance(x, tuple)
  wanted, form = jax.tree.flatten(shapes(cfg), is_leaf=is_shape)
  sizes = [int(np.prod(shape)) for shape in wanted]
  noise = jax.random.normal(key, (sum(sizes),), jnp.float32)
  pieces = jnp.split(noise, np.cumsum(sizes)[:-1])
  leaves = []
  for shape, x in zip(wanted, pieces, strict=True):
    if len(shape) == 1:  # gains and biases: near their neutral value
      x = 0.1 * x + (0.0 if cfg.norm_plus_one else 1.0)
    else:
      x = x.reshape(shape) / np.sqrt(shape[0])
    leaves.append(x)
  return jax.tree.unflatten(form, leaves)
