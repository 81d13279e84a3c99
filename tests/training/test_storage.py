"""Runs on a backbone whose kernels are in 4 bits: what is stored, what stays frozen, what comes
out.
"""

import json
import math

import jax
import numpy as np
import pytest

import jpeft
from jpeft import cli, config, merge, models, planning, predict, training
from jpeft.config.schema import STORAGES
from jpeft.methods import REGISTRY
from jpeft.planning import configs, search
from jpeft.planning import devices as targets
from jpeft.programs import compile
from jpeft.quant import FORMATS, Quantized, named
from jpeft.training import watch
from jpeft.training.checkpoints import fingerprint
from tests.config.test_schema import SMALL

QUICK = {'method.rank': '2', 'model.scan': 'true'}
KERNELS = 2 * (4 * 16 * 16 + 2 * 16 * 32)  # of the blocks: attention and MLP of two


def boxes(tree):
  return [
    x
    for x in jax.tree.leaves(tree, is_leaf=lambda x: isinstance(x, Quantized))
    if isinstance(x, Quantized)
  ]


def decoded(tree):
  plain = lambda x: x.unbox() if isinstance(x, Quantized) else x
  return jax.tree.map(plain, tree, is_leaf=lambda x: isinstance(x, Quantized))


@pytest.fixture(scope='module')
def qlora(config_file, tmp_path_factory):
  """(folder, report) of a run of QLoRA."""
  folder = tmp_path_factory.mktemp('qlora') / 'run'
  return folder, training.train(config.load(f'{config_file}:qlora', QUICK), folder)


def test_the_names_are_those_of_the_formats():
  assert set(STORAGES) == set(FORMATS)
  assert named('nf4_double') == jpeft.nf4(double=True)
  with pytest.raises(ValueError, match="no 4-bit format is called 'nf5'; did you mean 'nf4'"):
    named('nf5')
  assert {e.storage for e in REGISTRY.values()} <= {None, *FORMATS}


def test_an_unknown_format_is_one_sentence():
  with pytest.raises(
    ValueError, match=r"config.model.quantize must be one of nf4, nf4_double, .*, not 'nf5'"
  ):
    config.complete({**SMALL, 'model': {'source': 's', 'quantize': 'nf5'}})


@pytest.mark.parametrize(
  ('method', 'asked', 'stored'),
  [
    ('lora', None, None),
    ('qlora', None, 'nf4_double'),
    ('lora', 'int4', 'int4'),
    ('qlora', 'fp4', 'fp4'),
  ],
)
def test_the_config_comes_before_the_method(load, method, asked, stored):
  settings = load(method, **({'model.quantize': asked} if asked else {}))
  assert training.Memory.of(settings).storage == stored
  for source in (models.load, models.describe):
    held = training.build(settings, 2, source)[0].variables
    assert {x.form for x in boxes(held)} == ({named(stored)} if stored else set())


def test_a_run_says_what_is_stored_and_keeps_it(qlora, load):
  folder, told = qlora
  pretrained, _, _ = training.reopen(folder)
  plain = training.build(load('lora', **QUICK), 2)[0].variables
  assert told['storage'] == 'nf4_double'
  assert told['backbone_bytes'] == jpeft.nbytes(pretrained.variables) < 0.6 * jpeft.nbytes(plain)
  assert told['total'] == sum(x.size for x in jax.tree.leaves(plain))
  assert told['step_cost']['weights_bytes'] == told['backbone_bytes']
  assert told['backbone_sha256'] == fingerprint(pretrained.variables)
  assert sum(math.prod(x.shape) for x in boxes(pretrained.variables)) == KERNELS
  assert 'kernels as nf4_double' in (folder / 'report.md').read_text()


def test_a_stopped_run_goes_on(qlora, load, tmp_path, monkeypatch):
  settings, (_, whole) = load('qlora', **QUICK), qlora
  stop = watch.Signals.__enter__

  def soon(self):
    stop(self)
    self.caught = 15
    return self

  monkeypatch.setattr(watch.Signals, '__enter__', soon)
  with pytest.raises(cli.Stopped):
    training.train(settings, tmp_path / 'part')
  monkeypatch.undo()
  again = training.train(settings, tmp_path / 'part')
  assert (
    again['theta_sha256'] == whole['theta_sha256']
    and again['backbone_sha256'] == whole['backbone_sha256']
  )


def test_predict_and_merge(qlora, images, tmp_path, capsys):
  folder, _ = qlora
  file = str(next((images / 'test/red').iterdir()))
  assert predict.main(['--run', str(folder), '--input', file, '--json']) == 0
  told = json.loads(capsys.readouterr().out)['probabilities']
  assert merge.main(['--run', str(folder), '--out', str(tmp_path / 'out')]) == 0
  assert float(capsys.readouterr().out.split(' are ')[1].split()[0]) < 1e-5
  plain, (pretrained, tuned, theta) = (
    models.load(tmp_path / 'out', scan=True),
    training.reopen(folder),
  )
  assert not boxes(plain.variables) and set(told) == {'red', 'blue'}
  want = decoded(tuned.merge(theta, pretrained.variables))
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), plain.variables, want)


def test_plans_count_the_bytes_as_stored(load, monkeypatch):
  cpu = targets.target('cpu')
  small = targets.Target('cpu', cpu.devices, 1)  # nothing fits, so nothing is compiled
  for module in (targets, planning):
    monkeypatch.setattr(module, 'target', lambda name: small)
  monkeypatch.setattr(search, 'INSTEAD', ())
  plans = {name: configs.of_configs({name: load(name)}, small)[0] for name in ('lora', 'qlora')}
  saved = plans['lora'].weights - plans['qlora'].weights
  assert (
    0.8 * 3.5 * KERNELS < saved < 3.5 * KERNELS
  )  # of four bytes a weight, half of one and the scales are left
  model = training.build(load('lora'), 2, models.describe)[0].model
  batch = {
    'image': jax.ShapeDtypeStruct((4, 8, 8, 3), np.float32),
    'label': jax.ShapeDtypeStruct((4,), np.int32),
  }
  named, asked = (
    jpeft.plan(model, name, batch, storage=storage)[0]
    for name, storage in (('qlora', None), ('lora', 'nf4_double'))
  )
  assert (
    named.weights
    == asked.weights
    == compile.nbytes(training.build(load('qlora'), 2, models.describe)[0].variables)
  )
