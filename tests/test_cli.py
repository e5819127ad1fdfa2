"""What the programs in launch/ share: --help, and numbers such as 1e6."""

import sys

import pytest
from absl import flags
from ml_collections import ConfigDict, config_flags
from programs import program

from sae_jax import cli
from sae_jax.errors import UserError
from sae_jax.train.keys import set_keys

# The flags that matter first.
FIRST = {
  'train': ['config', 'workdir'],
  'harvest': ['config'],
  'evaluate': ['workdir'],
  'import_store': ['from', 'source', 'store'],
  'verify': ['store'],
  'sweep': ['config', 'workdir'],
  'fit_laws': ['study'],
}


@pytest.mark.parametrize('name', FIRST)
def test_help_is_of_the_programs_own_flags(name):
  with program(f'launch/{name}.py'):
    lines = cli.usage(name).splitlines()
  flags_of = [line[2:].partition('=')[0] for line in lines]
  assert flags_of[: len(FIRST[name])] == FIRST[name]
  assert len(lines) < 25 and not any('verbosity' in line for line in lines)
  keys = any(line.startswith('--config.KEY=VALUE') for line in lines)
  assert keys == ('config' in FIRST[name])


def test_help_ends_well(monkeypatch, capsys):
  with program('launch/verify.py') as module, pytest.raises(SystemExit) as end:
    monkeypatch.setitem(sys.modules, '__main__', module)
    cli._parse(['verify', '--help'])
  assert end.value.code == 0
  out = capsys.readouterr().out
  assert out.startswith('Checks a store') and '--store=' in out


def parse(*argv):
  """The config and --n of a program with these arguments."""
  sys.argv = ['x', *argv]  # it looks there for overrides
  values = flags.FlagValues()
  flags.DEFINE_integer('n', 0, '', flag_values=values)
  default = ConfigDict({'a': {'rows': 1, 'rate': 1.0, 'on': True}})
  config = config_flags.DEFINE_config_dict(
    'config', default, flag_values=values
  )
  values(sys.argv)
  return config.value, values.n


@pytest.mark.parametrize(
  'given, value',
  [('1e6', 10**6), ('2.50E1', 25), ('3.0', 3), (str(2**60 + 1), 2**60 + 1)],
)
def test_whole_floats_are_integers(monkeypatch, given, value):
  monkeypatch.setattr(sys, 'argv', [])
  config, n = parse(f'--config.a.rows={given}', f'--n={given}')
  assert n == config.a.rows == value and type(n) is type(config.a.rows) is int


@pytest.mark.parametrize('given', ['1.5', '1e-1', 'many', 'inf', 'nan'])
def test_others_are_not(monkeypatch, given):
  monkeypatch.setattr(sys, 'argv', [])
  for flag in ('--config.a.rows', '--n'):
    with pytest.raises((flags.Error, ValueError), match=given):
      parse(f'{flag}={given}')


def test_whole_floats_in_members_and_sweeps():
  config = ConfigDict({'a': {'rows': 1, 'rate': 1.0, 'on': True}})
  set_keys(config, {'a.rows': 2e3, 'a.rate': 2.0}, 'members')
  assert type(config.a.rows) is int and type(config.a.rate) is float
  for bad in ({'a.rows': 1.5}, {'a.rows': float('inf')}, {'a.on': 1.0}):
    with pytest.raises(UserError, match='must be'):
      set_keys(config, bad, 'members')
