"""launch/gke/: what kubectl gets is a JobSet, to the last field."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

jsonschema = pytest.importorskip('jsonschema')
yaml = pytest.importorskip('yaml')

ROOT = Path(__file__).parents[2]
COMMAND = 'python launch/train.py --coordinator=auto --config.store.site="a b"'
FLAGS = {
  'name': 'sae-a', 'image': 'registry/sae_jax:1', 'claim': 'runs',
  'accelerator': 'tpu-v5p-slice', 'topology': '2x2x4', 'command': COMMAND,
  'libtpu_init_args': '--xla_a=true --xla_b=1: #"x"',
}  # fmt: skip


def render(**changes):
  flags = [f'--{key}={value}' for key, value in (FLAGS | changes).items()]
  return subprocess.run(
    [sys.executable, 'launch/gke/render.py', *flags],
    cwd=ROOT,
    capture_output=True,
    text=True,
  )


@pytest.fixture(scope='module')
def jobset():
  done = render()
  assert done.returncode == 0, done.stderr
  return yaml.safe_load(done.stdout)


def strict(schema):
  """The schema, with fields it does not name refused everywhere."""
  if isinstance(schema, list):
    return [strict(s) for s in schema]
  if not isinstance(schema, dict):
    return schema
  schema = {key: strict(value) for key, value in schema.items()}
  # A property may itself be called `properties`; no schema has such a type.
  if schema.get('type') == 'object' and isinstance(
    schema.get('properties'), dict
  ):
    schema.setdefault('additionalProperties', False)
  return schema


@pytest.fixture(scope='module')
def validator():
  text = (Path(__file__).parent / 'jobset_schema.json').read_text()
  schema = strict(json.loads(text))
  # Metadata is any object to the schema: the fields we may use.
  names = {'name': {'type': 'string'}, 'annotations': {'type': 'object'}}
  schema['properties']['metadata'] |= {
    'properties': names,
    'additionalProperties': False,
  }
  jsonschema.Draft202012Validator.check_schema(schema)
  return jsonschema.Draft202012Validator(schema)


def test_valid_to_the_last_field(jobset, validator):
  assert [e.message for e in validator.iter_errors(jobset)] == []


def fields(tree, path=()):
  """The paths of all keys of a tree."""
  pairs = (
    tree.items()
    if isinstance(tree, dict)
    else enumerate(tree)
    if isinstance(tree, list)
    else ()
  )
  for key, value in pairs:
    if isinstance(key, str):
      yield *path, key
    yield from fields(value, (*path, key))


def test_a_misspelt_field_is_found_wherever_it_is(jobset, validator):
  """All but labels of nodes, names of resources and annotations."""
  free = ('annotations', 'nodeSelector', 'limits')
  tried = 0
  for path in fields(jobset):
    if any(name in path[:-1] for name in free):
      continue
    broken = json.loads(json.dumps(jobset))
    parent = broken
    for key in path[:-1]:
      parent = parent[key]
    parent[path[-1] + 'x'] = parent.pop(path[-1])
    assert list(validator.iter_errors(broken)), path
    tried += 1
  assert tried > 30


def test_what_it_says(jobset):
  (replicated,) = jobset['spec']['replicatedJobs']
  job = replicated['template']['spec']
  pod = job['template']['spec']
  (container,) = pod['containers']
  assert job['parallelism'] == job['completions'] == 4  # 16 chips, 4 a host
  assert container['resources']['limits'] == {'google.com/tpu': 4}
  assert container['command'] == ['bash', 'launch/gke/pod.sh']
  assert container['args'][-1] == '--config.store.site=a b'
  env = {e['name']: e['value'] for e in container['env']}
  assert env['LIBTPU_INIT_ARGS'] == FLAGS['libtpu_init_args']
  assert pod['nodeSelector'] == {
    'cloud.google.com/gke-tpu-accelerator': 'tpu-v5p-slice',
    'cloud.google.com/gke-tpu-topology': '2x2x4',
  }
  # A user's mistake or a bug fails the JobSet; every other code restarts it.
  (rule,) = job['podFailurePolicy']['rules']
  assert rule['onExitCodes']['containerName'] == container['name']
  assert rule['action'] == 'FailJob' and rule['onExitCodes']['values'] == [1, 2]
  assert job['backoffLimit'] == 0 and pod['restartPolicy'] == 'Never'
  (rule,) = jobset['spec']['failurePolicy']['rules']
  assert rule['action'] == 'FailJobSet'
  assert rule['onJobFailureReasons'] == ['PodFailurePolicy']


@pytest.mark.parametrize(
  'changes, wanted',
  [
    ({'topology': '2x2x'}, '2x2x4'),
    ({'topology': '2x3'}, 'not a multiple of --chips_per_host=4'),
    ({'name': 'My_Run'}, 'small letters'),
    ({'slices': 0}, '--slices=0'),
    ({'max_restarts': -1}, '--max_restarts=-1'),
    ({'mount': 'data'}, 'a path like /data'),
    ({'command': 'python "x'}, 'quotes'),
    ({'topologie': '4x4'}, 'topologie'),
  ],
)
def test_bad_input(changes, wanted):
  done = render(**changes)
  assert done.returncode == 2 and done.stdout == ''
  (line,) = done.stderr.splitlines()
  assert line.startswith('error: ') and wanted in line


def pod(folder, command, seconds='0'):
  """launch/gke/pod.sh with a line of bash; its wait takes `seconds`, and
  leaves a file `waits`."""
  real = subprocess.check_output(['which', 'sleep'], text=True).strip()
  (folder / 'sleep').write_text(
    f'#!/bin/bash\necho $1 > {folder}/waits\nexec {real} {seconds}\n'
  )
  (folder / 'sleep').chmod(0o755)
  return subprocess.Popen(
    ['bash', 'launch/gke/pod.sh', 'bash', '-c', command],
    cwd=ROOT,
    env=os.environ | {'PATH': f'{folder}:{os.environ["PATH"]}'},
    stdout=subprocess.PIPE,
    text=True,
  )


@pytest.mark.parametrize(
  'code, waits',
  [(0, 0), (1, 0), (2, 0), (143, 0), (75, 1), (134, 1), (137, 1)],
)
def test_a_pod_that_lost_others_waits_for_their_codes(tmp_path, code, waits):
  process = pod(tmp_path, f'exit {code}')
  process.communicate(timeout=60)
  assert process.returncode == code
  assert (tmp_path / 'waits').exists() == bool(waits)


def test_a_pod_hands_sigterm_on_and_waits_for_the_save(tmp_path):
  # Not 143, which an interrupted wait gives too.
  saves = 'trap "echo saved; exit 0" TERM; echo begins; while :; do :; done'
  process = pod(tmp_path, saves)
  assert process.stdout and process.stdout.readline() == 'begins\n'
  process.send_signal(signal.SIGTERM)
  assert process.communicate(timeout=60)[0] == 'saved\n'
  assert process.returncode == 0 and not (tmp_path / 'waits').exists()


def test_sigterm_ends_the_wait_of_a_pod(tmp_path):
  process = pod(tmp_path, 'exit 75', seconds='600')
  while not (tmp_path / 'waits').exists():
    assert process.poll() is None
  process.send_signal(signal.SIGTERM)
  process.communicate(timeout=60)
  assert process.returncode == 75
