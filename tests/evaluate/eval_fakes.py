"""A tiny language model, its store, and SAEs whose figures are known."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import tokenizers
from tokenizers import decoders, models, pre_tokenizers

from sae_jax.lm import model
from sae_jax.lm.config import LMConfig
from sae_jax.models.activations import jump_relu
from sae_jax.models.sae import SAE, identity_norm
from sae_jax.store.create import create, new_folder
from sae_jax.store.manifest import Site
from sae_jax.store.plan import pack_keep, plan
from sae_jax.store.writer import open_writer

SITE = 'layer_0.resid_post'
BOS, EOS = 1, 2
CFG = LMConfig(
  vocab=40, d_model=16, layers=2, heads=2, kv_heads=1, head_dim=8, d_mlp=24
)
T = 12


def make_sae(W_enc, W_dec, *, theta=0.0):
  """JumpReLU SAE without biases or normalisers: W_enc [F, D], W_dec [F, D]."""
  latents, width = W_enc.shape
  return SAE(
    W_enc=jnp.float32(W_enc),
    b_enc=jnp.zeros(latents),
    W_dec=jnp.float32(W_dec),
    b_dec=jnp.zeros(width),
    act=jump_relu(jnp.full(latents, theta), 0.1),
    norm_in=identity_norm(width),
    norm_out=identity_norm(width),
    pre_bias=False,
  )


def identity_sae(width):
  """relu(x) and relu(-x) in latents: x_hat = x to the last bit."""
  W = np.concatenate([np.eye(width), -np.eye(width)])
  return make_sae(W, W)


def zero_sae(width):
  """Reconstructs every row as zero."""
  W = np.eye(width)
  return make_sae(W, 0 * W)


def random_sae(width, latents, seed=0):
  """Reconstructs badly, with some latents that never fire."""
  rng = np.random.default_rng(seed)
  W_enc, W_dec = rng.normal(size=(2, latents, width)) / width**0.5
  W_enc[::7] = 0
  sae = make_sae(W_enc, 0.3 * W_dec, theta=0.5)
  return sae.replace(b_dec=jnp.float32(rng.normal(size=width)))


def random_lm(seed=0):
  return model.init(jax.random.key(seed), CFG)


def nasty_tokenizer():
  """CFG.vocab byte-level tokens: markup, half characters, line breaks."""
  words = [
    'a', '<bos>', '<eos>', '<script>alert(1)</script>', '"', "'", '&amp;',
    'Ġ<b>', 'Ċ', 'Ã', '©', 'Ġthe', '{{', '}}', '-->',
  ]  # fmt: skip
  words += [f'Ġw{i}' for i in range(len(words), CFG.vocab)]
  bpe = models.BPE(vocab={w: i for i, w in enumerate(words)}, merges=[])
  tokenizer = tokenizers.Tokenizer(bpe)
  tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
  tokenizer.decoder = decoders.ByteLevel()
  special = [tokenizers.AddedToken(w, special=True) for w in words[1:3]]
  tokenizer.add_tokens(special)
  return tokenizer


def random_tokens(n, seed=0):
  """Token ids [n, T], BOS first, an EOS here and there; keep [n, T]."""
  rng = np.random.default_rng(seed)
  tokens = rng.integers(3, CFG.vocab, (n, T)).astype(np.int32)
  tokens[rng.random((n, T)) < 0.05] = EOS
  tokens[:, 0] = BOS
  keep = (tokens != EOS) & (tokens != BOS)
  return tokens, keep


def origin(subject, model_path):
  """What a harvest writes into the manifest about where rows come from."""
  return {
    'model': {
      'name': subject.name,
      'weights_sha256': subject.weights_sha256,
      'tokenizer_sha256': subject.tokenizer_sha256,
    },
    'text': {'sha256': '', 'documents': 4, 'documents_read': 3},
    'policy': {'padding_token': None},
    'config': {
      'model': {'kind': 'gguf', 'path': str(model_path)},
      'text': {'path': '/somewhere/texts'},
    },
  }


def write_store(
  root, tokens, keep, rows, *, site=SITE, shard=64, block=16, **fields
):
  """A store of rows [keep.sum(), D], the first shard held out."""
  width, dtype = rows.shape[1], rows.dtype.name
  empty = {'model': {}, 'text': {}, 'policy': {}, 'config': {}, 'made_by': {}}
  manifest = plan(
    tokens, pack_keep(keep), [Site(site, width, dtype)], rows=len(rows),
    rows_per_shard=shard, rows_per_block=block, held_out_shards=1,
    norm_shards=1, seed=0, **(empty | fields),
  )  # fmt: skip
  with new_folder(root) as folder:
    create(folder, manifest, tokens, pack_keep(keep))
  with open_writer(folder) as writer:
    writer.write(0, {site: rows})
    return writer.finish()


def blocks(rows, tokens=None, step=7):
  """rows [n, D] as a store's reader gives them, in odd pieces."""
  if tokens is None:
    tokens = np.zeros((len(rows), 3), np.int32)
  for at in range(0, len(rows), step):
    yield rows[at : at + step], tokens[at : at + step]


bfloat16 = ml_dtypes.bfloat16
