"""A study as two tables: its points, and their evaluations while training."""

from typing import NamedTuple


class Point(NamedTuple):
  """One SAE of a study; a row of study.parquet. None: not known, or none.

  FVU, L0 and MSE are those of the last evaluation on held-out rows during
  training; delta loss, in nats, is launch/evaluate.py's.
  """

  point: str  # its id: a hash of its config
  state: str  # 'done', 'failed', 'running' or 'missing'
  reason: str  # why it failed
  stage: str  # 'grid', or 'trial': run to find a value for one of the grid
  changes: str  # JSON of the dotted keys in which it differs from the base
  activation: str
  d_in: int  # D
  latents: int  # F, the N of the laws
  k: float | None  # active latents aimed at: act.k, or loss.target_l0
  l0_coef: float
  lr: float  # peak, scaled to the width
  seed: int
  batch_rows: int
  rows: int  # rows to train on
  rows_done: int
  fvu: float | None
  l0: float | None
  mse: float | None
  dead_share: float | None  # of the latents, in training
  delta_loss: float | None
  delta_loss_se: float | None
  loss_recovered: float | None
  flops: float  # 12 B D F a step, as published
  flops_executed: float  # of the products that were done
  seconds: float  # of training; in a stack its share, by executed FLOPs
  device_hours: float
  members: int  # trained together with it, itself included
  folder: str  # its run folder


class Mark(NamedTuple):
  """One evaluation of a point while it trained; a row of curves.parquet."""

  point: str
  step: int
  rows: int
  flops: float
  flops_executed: float
  seconds: float
  fvu: float
  l0: float
  mse: float
