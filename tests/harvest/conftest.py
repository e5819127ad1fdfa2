"""Fixtures: small stores of the tiny model."""

import damage
import pytest
from tiny_harvest import write_text
from tiny_stores import made


@pytest.fixture(scope='module')
def text(tmp_path_factory):
  folder = tmp_path_factory.mktemp('text')
  write_text(folder)
  return folder


@pytest.fixture(scope='module')
def whole(text, tmp_path_factory):
  return made(text, tmp_path_factory.mktemp('verify') / 'store')


@pytest.fixture(scope='module')
def int8(text, tmp_path_factory):
  root = tmp_path_factory.mktemp('verify') / 'int8'
  return made(text, root, dtype='int8')


@pytest.fixture
def store(whole, tmp_path):
  return damage.copied(whole, tmp_path / 'store')
