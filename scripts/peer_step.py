"""The training step of another public library of sparse autoencoders, timed.

ENV/bin/python scripts/peer_step.py --peer=saelens --activation=topk
Runs in an environment with that library, without sae_jax; bench_vs_peers.py
makes one and reads the line of JSON. Each library steps as its own trainer
does, with its own initialisation, clipping, constraints and counters: Adam at
a constant rate, float32, auxiliary losses off unless --auxk. What a library
leaves out of its step shows in the held-out FVU, one formula for all.
"""

import argparse
import importlib
import importlib.metadata
import importlib.util
import itertools
import json
import os
import sys
from collections.abc import Callable
from typing import Any, NamedTuple

import step_clock
from step_clock import Side

TORCH = 'torch==2.13.0'


def main() -> None:
  p = step_clock.options(__doc__)
  p.add_argument('--peer', choices=PEERS, required=True)
  a, rows = step_clock.begin(p)
  peer = PEERS[a.peer]
  if a.activation not in peer.activations:
    p.error(f'{a.peer} has no {a.activation} here')
  os.environ |= {'SPARSIFY_DISABLE_TRITON': '1', 'WANDB_MODE': 'disabled'}
  torch = importlib.import_module('torch')
  torch.set_num_threads(a.threads)
  torch.manual_seed(0)
  if a.peer == 'overcomplete':
    without_init(a.peer)
  importlib.import_module(peer.module)  # before memory is measured
  figures = step_clock.run(a, rows, lambda: peer.start(a))
  about = {
    'peer': a.peer, 'version': importlib.metadata.version(peer.package),
    'torch': torch.__version__,
  }  # fmt: skip
  print(json.dumps(about | figures))


def without_init(name: str) -> None:
  """Makes the submodules of a package importable without its __init__.

  overcomplete's imports torchvision, which must be of torch's own build, and a
  function that matplotlib has not since 3.9; its autoencoders need neither.
  """
  spec = importlib.util.find_spec(name)
  if spec is None:
    raise SystemExit(f'error: {name} is not installed in {sys.prefix}')
  sys.modules[name] = importlib.util.module_from_spec(spec)


def side(step: Callable[[int, Any], Any], codes: Callable) -> Side:
  """A Side of functions of tensors; codes(x) -> (f, x_hat)."""
  torch: Any = importlib.import_module('torch')

  def read(x):
    with torch.no_grad():
      f, x_hat = codes(x)
    return f.numpy(), x_hat.numpy()

  return Side(torch.from_numpy, step, read)


def saelens(a: argparse.Namespace) -> Side:
  lib: Any = importlib.import_module('sae_lens')
  config: Any = importlib.import_module('sae_lens.config')
  training: Any = importlib.import_module('sae_lens.training.sae_trainer')
  torch: Any = importlib.import_module('torch')
  sizes: Any = {
    'd_in': a.d, 'd_sae': a.latents, 'device': 'cpu', 'dtype': 'float32',
  }  # fmt: skip
  if a.activation == 'jumprelu':
    sae = lib.JumpReLUTrainingSAE(
      lib.JumpReLUTrainingSAEConfig(**sizes, l0_coefficient=a.l0_coefficient)
    )
  else:
    kind = {'topk': 'TopK', 'batchtopk': 'BatchTopK'}[a.activation]
    # Without rescaling a step does a little less.
    settings = getattr(lib, f'{kind}TrainingSAEConfig')(
      **sizes, k=a.k, aux_loss_coefficient=a.auxk,
      rescale_acts_by_decoder_norm=False,
    )  # fmt: skip
    sae = getattr(lib, f'{kind}TrainingSAE')(settings)
  job = config.SAETrainerConfig(
    total_training_samples=(a.skip + a.steps + 1) * a.batch,
    train_batch_size_samples=a.batch, lr=a.lr, lr_end=a.lr, device='cpu',
    logger=config.LoggingConfig(log_to_wandb=False),
  )  # fmt: skip
  unread = itertools.repeat(torch.zeros(1, a.d))
  trainer = training.SAETrainer(cfg=job, sae=sae, data_provider=unread)

  def step(i, x):
    trainer.step(x)
    trainer.n_training_steps += 1  # as fit() does

  def codes(x):
    sae.eval()
    f = sae.encode(x)
    return f, sae.decode(f)

  return side(step, codes)


def dictionary_learning(a: argparse.Namespace) -> Side:
  trainers: Any = importlib.import_module('dictionary_learning.trainers')
  settings: Any = {
    'activation_dim': a.d, 'dict_size': a.latents, 'lr': a.lr, 'layer': 0,
    'lm_name': '', 'steps': a.skip + a.steps + 2, 'warmup_steps': 1,
    'device': 'cpu', 'seed': 0,
  }  # fmt: skip
  match a.activation:
    case 'topk':
      trainer = trainers.TopKTrainer(**settings, k=a.k, auxk_alpha=a.auxk)
    case 'batchtopk':
      # Its threshold, which encode() goes by, from the second step on.
      trainer = trainers.BatchTopKTrainer(
        **settings, k=a.k, auxk_alpha=a.auxk, threshold_start_step=0
      )
    case _:
      trainer = trainers.JumpReluTrainer(
        **settings, target_l0=a.k, sparsity_penalty=a.l0_coefficient,
        sparsity_warmup_steps=1,
      )  # fmt: skip

  def codes(x):
    f = trainer.ae.encode(x)
    return f, trainer.ae.decode(f)

  return side(trainer.update, codes)


def sparsify(a: argparse.Namespace) -> Side:
  """Its trainer runs a language model; these are the lines of its step."""
  lib: Any = importlib.import_module('sparsify')
  torch: Any = importlib.import_module('torch')
  settings = lib.SparseCoderConfig(num_latents=a.latents, k=a.k)
  sae = lib.SparseCoder(a.d, settings, dtype=torch.float32)
  adam = torch.optim.Adam(sae.parameters(), lr=a.lr)
  since_fired = torch.zeros(a.latents, dtype=torch.long)

  def step(i, x):
    if i == 0:
      sae.b_dec.data = x.mean(0)
    sae.set_decoder_norm_to_unit_norm()
    dead = since_fired > 10_000_000 if a.auxk else None
    out = sae(x, dead_mask=dead)
    (out.fvu + a.auxk * out.auxk_loss).backward()
    sae.remove_gradient_parallel_to_decoder_directions()
    adam.step()
    adam.zero_grad()
    since_fired.add_(len(x))
    since_fired[out.latent_indices.flatten()] = 0

  def codes(x):
    out = sae(x)
    return out.latent_acts, out.sae_out

  return side(step, codes)


def overcomplete(a: argparse.Namespace) -> Side:
  lib: Any = importlib.import_module('overcomplete.sae')
  torch: Any = importlib.import_module('torch')
  sae = lib.TopKSAE(a.d, nb_concepts=a.latents, top_k=a.k, device='cpu')
  adam = torch.optim.Adam(sae.parameters(), lr=a.lr)

  def squares(x, x_hat, *_):
    return (x - x_hat).square().mean()

  def step(i, x):
    lib.train_sae(sae, [x], squares, adam, nb_epochs=1, monitoring=0)

  def codes(x):
    sae.eval()
    _, f, x_hat = sae(x)
    return f, x_hat

  return side(step, codes)


class Peer(NamedTuple):
  package: str
  version: str
  module: str  # whose import brings the others
  activations: tuple[str, ...]
  start: Callable[[argparse.Namespace], Side]


ALL = ('topk', 'batchtopk', 'jumprelu')
PEERS = {
  'saelens': Peer(
    'sae-lens', '6.54.12', 'sae_lens.training.sae_trainer', ALL, saelens
  ),
  'dictionary_learning': Peer(
    'dictionary-learning', '0.1.0', 'dictionary_learning.trainers', ALL,
    dictionary_learning,
  ),
  'sparsify': Peer(
    'eai-sparsify', '1.3.3', 'sparsify', ('topk',), sparsify
  ),
  'overcomplete': Peer(
    'overcomplete', '0.3.0', 'overcomplete.sae', ('topk',), overcomplete
  ),
}  # fmt: skip

if __name__ == '__main__':
  main()
