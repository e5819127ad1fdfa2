"""A repair gives the bytes of the harvest, and deletes nothing in vain."""

import dataclasses
import json
import subprocess
import sys

import damage
import numpy as np
import pytest
from tiny_harvest import SITES, tiny_config, write_text
from tiny_stores import SITE, SUBJECT, flipped, found_by, look, made, mend, move

from sae_jax.errors import UserError
from sae_jax.harvest import repair as repairing
from sae_jax.harvest.job import harvest
from sae_jax.store.create import write_arrays
from sae_jax.store.manifest import read_manifest


def removed(part, shard, suffix='.bin'):
  def remove(root):
    damage.path_of(root, part, shard).with_suffix(suffix).unlink()

  return remove


def edited(name, change):
  return lambda root: damage.edit(root / name, change)


def wrong_mean(data):
  data['sites'][0]['mean'][3] = 1.0


def wrong_record(data):
  data['moments'][SITES[1]]['m2'][1] = 5.0


DAMAGE = {
  'rows': flipped(SITE, 2),
  'last rows': flipped(SITE, 4),
  'tokens': flipped('tokens', 1),
  'sequences': flipped('sequences', 3),
  'keep': flipped('keep', 2),
  'documents': lambda root: damage.flip(root / 'sequences/documents.bin'),
  'no documents': lambda root: (root / 'sequences/documents.bin').unlink(),
  'no rows': removed(SITE, 0),
  'no checksums': removed('tokens', 3, '.blocks'),
  'no keep': removed('keep', 4),
  'manifest': edited('manifest.json', wrong_mean),
  'record': edited('records/shard-00001-of-00005.json', wrong_record),
  'no record': lambda root: (
    root / 'records/shard-00003-of-00005.json'
  ).unlink(),
  'aligned': lambda root: damage.alter_rows(
    root, 'tokens', 2, lambda rows: rows.sort(axis=0)
  ),
  'model': lambda root: damage.alter_rows(root, SITE, 3, move(1)),
}


@pytest.mark.parametrize('kind', DAMAGE)
def test_a_repair_gives_the_same_bytes(whole, store, kind):
  DAMAGE[kind](store)
  assert found_by(store)
  mend(store)
  assert found_by(store) == {}
  assert damage.contents(store) == damage.contents(whole)


def test_a_repair_of_much_at_once_in_int8(int8, tmp_path):
  store = damage.copied(int8, tmp_path / 'store')
  for kind in ('rows', 'sequences', 'no keep', 'documents', 'record'):
    DAMAGE[kind](store)
  flipped(SITE.replace('sites', 'scales'), 4)(store)
  lines = mend(store)
  assert damage.contents(store) == damage.contents(int8)
  assert any('packed from the text' in line for line in lines)
  assert any('shards 1, 2, 4: rows computed' in line for line in lines)
  assert mend(store) == ['nothing to mend']


def test_only_the_bad_shards_are_written(store):
  flipped(SITE, 2)(store)
  old = {p: p.stat().st_mtime_ns for p in store.rglob('*.bin')}
  mend(store)
  new = {p: p.stat().st_mtime_ns for p in store.rglob('*.bin')}
  assert {p.name[6:11] for p in old if old[p] != new[p]} == {'00002'}


def test_what_a_removed_shard_has_left_is_deleted(whole, store):
  def remove(data):
    data['shards'][4]['removed'] = True

  damage.edit(store / 'manifest.json', remove)
  (store / 'records/shard-00004-of-00005.json').unlink()
  assert mend(store)[-1] == 'removed shards: their rows deleted'
  assert found_by(store) == {}
  assert len(list(store.rglob('shard-00004*.bin'))) == 2  # sequences, keep


def test_nothing_goes_when_model_or_text_cannot_be_had(store, text, tmp_path):
  flipped(SITE, 2)(store)
  flipped('sequences', 3)(store)
  before, checks = damage.contents(store), look(store)
  other_text = tmp_path / 'text'
  other_text.mkdir()
  write_text(other_text, documents=11)
  other = dataclasses.replace(SUBJECT, weights_sha256='others')
  words = dataclasses.replace(SUBJECT, special=frozenset([0, 1, 2, 5]))
  for kwargs, message in [
    (dict(subject=None), 'is not here: give --model_path'),
    (dict(subject=other), 'another model'),
    (dict(text_path=str(other_text)), 'another text'),
    (dict(text_path='/nowhere'), 'no .txt file'),
    (dict(subject=words), 'gives other sequences than those recorded'),
  ]:
    with pytest.raises(UserError, match=message) as caught:
      mend(store, checks, **kwargs)
    assert '\n' not in str(caught.value)
    assert damage.contents(store) == before
  # Rows alone need no text.
  flipped('sequences', 3)(store)
  mend(store, text_path='/nowhere')
  assert found_by(store) == {}


def test_a_text_and_a_filter_that_have_moved(text, tmp_path):
  def even(tokens):
    return tokens % 2 == 0

  config = tiny_config(text, tmp_path / 's')
  config.harvest.rows = 150
  harvest(config, SUBJECT, even)
  before = damage.contents(tmp_path / 's')
  flipped('keep', 0)(tmp_path / 's')
  with pytest.raises(UserError, match='filter .*even: call'):
    mend(tmp_path / 's')
  moved = damage.copied(text, tmp_path / 'moved')
  mend(tmp_path / 's', keep=even, text_path=str(moved))
  assert damage.contents(tmp_path / 's') == before


def test_a_store_of_arrays_cannot_be_repaired(tmp_path):
  x = np.ones((150, 3), np.float32)
  write_arrays(tmp_path, {'a': x}, rows_per_shard=64, rows_per_block=16)
  check = look(tmp_path)[-1]
  assert check.state == 'skipped' and "from 'arrays'" in check.skipped
  damage.flip(tmp_path / 'sites/a/shard-00001-of-00003.bin')
  before = damage.contents(tmp_path)
  with pytest.raises(UserError, match="made from 'arrays': make it from there"):
    mend(tmp_path)
  edited('manifest.json', lambda data: data.update(rows=1))(tmp_path)
  with pytest.raises(UserError, match='contradicts itself'):
    mend(tmp_path)
  assert damage.contents(tmp_path).keys() == before.keys()


def test_a_shard_that_is_being_written_is_left_alone(whole, store):
  flipped(SITE, 2)(store)
  flipped(SITE, 3)(store)
  path = damage.path_of(store, 'tokens', 2).with_suffix('.bin.tmp')
  holder = subprocess.Popen(
    [
      sys.executable, '-c',
      'import fcntl, sys; f = open(sys.argv[1], "w"); '
      'fcntl.flock(f, fcntl.LOCK_EX); print("held", flush=True); '
      'sys.stdin.read()', str(path),
    ],
    stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
  )  # fmt: skip
  try:
    assert holder.stdout.readline() == 'held\n'
    bad = damage.path_of(store, SITE, 2)
    before = bad.read_bytes()
    lines = mend(store)
    assert 'shards 2: left alone' in lines[0]
    assert bad.read_bytes() == before and path.exists()
    assert f'{bad}: block' in found_by(store)['checksums'][0]
  finally:
    holder.communicate('')
  mend(store)
  assert damage.contents(store) == damage.contents(whole)


def test_a_repair_that_is_killed_goes_on(whole, store, monkeypatch):
  class Killed(BaseException):
    pass

  def kill(*args, **kwargs):
    raise Killed

  flipped(SITE, 2)(store)
  flipped('tokens', 4)(store)
  monkeypatch.setattr(repairing, 'fill', kill)
  with pytest.raises(Killed):
    mend(store)
  monkeypatch.undo()
  found = found_by(store)['files']
  assert len(found) == 2 and 'shard 2: its repair was cut off' in found[0]
  monkeypatch.setattr(repairing, 'finish', kill)
  with pytest.raises(Killed):
    mend(store)
  monkeypatch.undo()
  assert found_by(store) == {}
  mend(store)
  assert damage.contents(store) == damage.contents(whole)


def test_a_store_that_is_being_written(text, tmp_path, whole):
  for task in (1, 0):
    config = tiny_config(text, tmp_path / 's')
    config.task = f'{task}/2'
    if task == 0:
      break
    harvest(config, SUBJECT)
  checks = look(tmp_path / 's')
  assert '2 shards, 3 not written yet' in checks[0].looked_at
  assert '128 rows' in checks[2].looked_at or '128 tokens' in (
    checks[2].looked_at
  )
  assert '256 rows of 2 sites in 2 shards: 256' in checks[-1].looked_at
  flipped(SITE, 3)(tmp_path / 's')
  flipped('sequences', 3)(tmp_path / 's')
  mend(tmp_path / 's')
  assert found_by(tmp_path / 's') == {}
  state = read_manifest(tmp_path / 's', complete=False).state
  assert state == 'writing'
  harvest(config, SUBJECT)
  found, wanted = damage.contents(tmp_path / 's'), damage.contents(whole)
  found['manifest.json'] = found['manifest.json'].replace(
    str(tmp_path / 's').encode(), str(whole).encode()
  )
  assert found == wanted


def test_a_budget_does_not_hold_a_repair_up(text, tmp_path):
  root = made(text, tmp_path / 's')
  before = damage.contents(root)

  def bound(data):
    data['keep_bytes'] = 20_000

  damage.edit(root / 'manifest.json', bound)
  flipped(SITE, 4)(root)
  mend(root)  # without a trainer, a harvest would wait for one
  after = damage.contents(root)
  assert json.loads(after.pop('manifest.json'))['keep_bytes'] == 20_000
  before.pop('manifest.json')
  assert after == before
