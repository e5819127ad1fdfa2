"""Rows of NamedTuples as the bytes of Parquet and CSV files."""

import importlib
import types
from collections.abc import Sequence
from typing import Any, get_args, get_type_hints

from sae_jax.errors import UserError


def table(kind: Any, rows: Sequence[tuple]) -> Any:
  """A pyarrow.Table of `rows`, NamedTuples of type `kind`, types kept.

  `kind`'s fields are str, int or float, or these or None. Raises UserError
  where pyarrow is not installed.
  """
  pa = _pyarrow()
  arrow = {str: pa.string(), int: pa.int64(), float: pa.float64()}
  fields = []
  for name, hint in get_type_hints(kind).items():
    optional = isinstance(hint, types.UnionType)
    base = get_args(hint)[0] if optional else hint
    fields.append(pa.field(name, arrow[base], nullable=optional))
  columns = list(zip(*rows, strict=True)) or [()] * len(fields)
  return pa.table(
    [
      pa.array(column, field.type)
      for column, field in zip(columns, fields, strict=True)
    ],
    schema=pa.schema(fields),
  )


def parquet(rows: Any) -> bytes:
  """A pyarrow.Table as a Parquet file."""
  out = _pyarrow().BufferOutputStream()
  _pyarrow('.parquet').write_table(rows, out)
  return out.getvalue().to_pybytes()


def csv(rows: Any) -> bytes:
  """A pyarrow.Table as text; an empty field is a missing value."""
  out = _pyarrow().BufferOutputStream()
  _pyarrow('.csv').write_csv(rows, out)
  return out.getvalue().to_pybytes()


def _pyarrow(part: str = '') -> Any:
  """The package or a part of it; UserError where it is not installed."""
  try:
    return importlib.import_module(f'pyarrow{part}')
  except ImportError as error:
    raise UserError(
      'the tables of a study need the package pyarrow: '
      "pip install 'sae-jax[study]'"
    ) from error
