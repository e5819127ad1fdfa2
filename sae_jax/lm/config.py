"""The shape of a subject model: one dataclass of switches for all families.

Llama, Mistral, Qwen 2/3 and Gemma 1/2/3 differ only in these; `model.py`
implements every one of them. Hashable, so that it can be static under jit.
"""

import dataclasses
import math
from typing import Literal


@dataclasses.dataclass(frozen=True)
class RopeScaling:
  """How rotary frequencies are stretched for longer contexts.

  'linear' divides all of them by `factor` (Gemma 3's global layers); 'llama3'
  divides long wavelengths only and blends in between (Llama 3.1 and later).
  """

  kind: Literal['linear', 'llama3']
  factor: float
  low_freq_factor: float = 1.0  # llama3 only, as the rest
  high_freq_factor: float = 4.0
  original_length: int = 8192  # positions the model was first trained on


@dataclasses.dataclass(frozen=True)
class LMConfig:
  """A decoder-only transformer; the defaults are Llama's.

  Raises ValueError where numbers contradict each other.
  """

  vocab: int
  d_model: int
  layers: int
  heads: int
  kv_heads: int
  head_dim: int
  d_mlp: int
  # Norms
  norm_eps: float = 1e-5
  norm_plus_one: bool = False  # Gemma: gain is 1 + w
  post_norms: bool = False  # Gemma 2, 3: norm what is added to the residual
  # Attention
  qk_norm: bool = False  # Qwen 3, Gemma 3: RMSNorm of each head's q and k
  qkv_bias: bool = False  # Qwen 2
  out_bias: bool = False  # Llama with attention_bias
  query_scale: float | None = None  # None: 1 / sqrt(head_dim)
  attn_softcap: float | None = None  # Gemma 2: 50
  sliding_window: int | None = None  # keys seen by local layers, own included
  local_layers: tuple[bool, ...] | None = None  # None: all with a window
  # Rotary embedding (rotate-half convention)
  rope_base: float = 10_000.0
  rope_scaling: RopeScaling | None = None
  rope_local_base: float | None = None  # Gemma 3's local layers, unscaled
  # MLP, embedding, logits
  mlp: Literal['silu', 'gelu_tanh'] = 'silu'
  embed_scale: float | None = None  # Gemma: sqrt(d_model)
  tied: bool = True  # logits through the transposed embedding
  final_softcap: float | None = None  # Gemma 2: 30
  head: bool = True  # False: saved without what makes logits
  # Positions the model was made for; nothing is computed from them.
  context: int | None = dataclasses.field(default=None, compare=False)

  def __post_init__(self):
    if self.heads % self.kv_heads:
      raise ValueError(
        f'heads ({self.heads}) must be a multiple of kv_heads ({self.kv_heads})'
      )
    if self.head_dim % 2:
      raise ValueError(f'head_dim ({self.head_dim}) must be even: rotary pairs')
    if self.local_layers is not None:
      if self.sliding_window is None:
        raise ValueError('local_layers needs a sliding_window')
      if len(self.local_layers) != self.layers:
        raise ValueError(
          f'local_layers has {len(self.local_layers)} entries, layers is '
          f'{self.layers}'
        )

  def window(self, layer: int) -> int | None:
    """How many keys a layer sees, its own included; None: all before it."""
    if self.local_layers is None or self.local_layers[layer]:
      return self.sliding_window
    return None

  def attention_scale(self) -> float:
    """What query-key products are multiplied by."""
    return self.query_scale or 1 / math.sqrt(self.head_dim)
