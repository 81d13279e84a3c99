"""The planner: what it says of a step, from shapes, and what it refuses."""

import dataclasses
import importlib
import json
import sys

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jpeft
from jpeft import cli, models, plan, planning, programs, training
from jpeft.core import NO_BACKPROP
from jpeft.models import ViT
from jpeft.planning import devices as targets
from jpeft.planning import measure, result, search
from jpeft.programs import compile, cost
from jpeft.training import fit
from tests.runs import VIT

IMAGES = {
  'image': jax.ShapeDtypeStruct((4, 8, 8, 3), jnp.float32),
  'label': jax.ShapeDtypeStruct((4,), jnp.int32),
}


def vit(depth=1, **fields):
  return ViT(
    width=32, depth=depth, heads=4, mlp_dim=64, patch_size=4, image_size=8, num_classes=5, **fields
  )


@pytest.fixture
def command(config_file, monkeypatch, capsys):
  """command(*flags) -> (exit code, stdout, stderr) of jpeft.plan on the tiny config, for the
  CPU.
  """

  def called(*flags, target='cpu'):
    if target:
      flags = (f'--target={target}', *flags)
    monkeypatch.setattr(sys, 'argv', ['jpeft.plan', f'--config={config_file}', *flags])
    code = cli.command('jpeft.plan', plan.main)
    return code, *capsys.readouterr()

  return called


@pytest.fixture
def uncompiled(monkeypatch):
  """A target so small that nothing is compiled for it: shapes and FLOPs are known all the same."""
  cpu = targets.target('cpu')
  for module in (targets, planning):
    monkeypatch.setattr(module, 'target', lambda name: targets.Target(name, cpu.devices, 1))
  monkeypatch.setattr(search, 'INSTEAD', ())
  monkeypatch.setattr(programs, 'compiled', lambda *args: pytest.fail('it was compiled'))


# ---- FLOPs.


def traced(fn, *args):
  return jax.jit(fn).trace(*args)


def test_flops_of_products_by_hand():
  x, w = jnp.zeros((3, 5)), jnp.zeros((5, 7))
  image, kernel = jnp.zeros((2, 8, 8, 3)), jnp.zeros((2, 2, 3, 6))
  conv = lambda x, w: jax.lax.conv_general_dilated(
    x, w, (2, 2), 'VALID', dimension_numbers=('NHWC', 'HWIO', 'NHWC')
  )
  assert cost.flops(traced(jnp.dot, x, w)) == (2 * 3 * 5 * 7,) * 2
  assert cost.flops(traced(conv, image, kernel)) == (2 * (2 * 4 * 4 * 6) * (2 * 2 * 3),) * 2


def test_rounds_of_loops_count_and_dead_code_does_not():
  x, w = jnp.zeros((3, 5)), jnp.zeros((4, 5, 5))
  loop = lambda x, w: jax.lax.scan(lambda x, w: (x @ w, (w @ w).sum()), x, w)[0]
  assert cost.flops(traced(loop, x, w)) == (4 * 2 * 3 * 5 * 5, 2 * 3 * 5 * 5)
  arms = lambda x, w: jax.lax.cond(x.sum() > 0, lambda: x @ w[0] @ w[1], lambda: x @ w[0])
  assert cost.flops(traced(arms, x, w)).all == 2 * 2 * 3 * 5 * 5


def test_scanned_and_unrolled_steps_count_alike(uncompiled):
  unrolled, scanned = (
    jpeft.plan(vit(3, scan=scan, remat=True), 'full', IMAGES)[0] for scan in (False, True)
  )
  assert scanned.flops == pytest.approx(unrolled.flops, rel=0.001)
  assert scanned.forward == unrolled.forward


def test_the_count_is_near_that_of_xla():
  net = lambda x, w: jax.nn.relu(jax.nn.relu(x @ w) @ w.T) @ w
  fn = traced(jax.grad(lambda w, x: net(x, w).sum()), jnp.zeros((256, 512)), jnp.zeros((128, 256)))
  assert fn.lower().compile().cost_analysis()['flops'] == pytest.approx(
    cost.flops(fn).all, rel=0.05
  )


# ---- Plans.


def test_parts_by_hand():
  model = vit()
  (found,) = jpeft.plan(model, 'lora', IMAGES, target='cpu')
  held = jax.jit(model.init)(jax.random.key(0), np.zeros((1, 8, 8, 3), np.float32))
  weights = sum(x.nbytes for x in jax.tree.leaves(held))
  trainable = 2 * (32 * 8 + 8 * 32) + 32 * 5 + 5
  assert (found.weights, found.theta, found.trainable) == (weights, 4 * trainable, trainable)
  assert 8 * trainable <= found.optimizer <= 8 * trainable + 64  # two moments, and counts
  batch = 4 * (8 * 8 * 3 * 4 + 4)
  assert 0 <= found.argument - (weights + 12 * trainable + batch) < 64
  assert found.exact and found.total >= found.argument and found.fits is None


def test_full_tuning_still_keeps_the_backbone():
  # theta stands in for every weight, so the step reads none; the trainer holds them all the same.
  (found,) = jpeft.plan(vit(), 'full', IMAGES, target='cpu')
  assert found.weights == found.theta and found.argument >= 4 * found.theta


def test_passes_tell_the_memory_class(uncompiled):
  model = ViT(width=64, depth=6, heads=4, mlp_dim=256, patch_size=4, image_size=16, num_classes=5)
  batch = {**IMAGES, 'image': jax.ShapeDtypeStruct((4, 16, 16, 3), jnp.float32)}
  passes = {p.method: p.passes for p in jpeft.plan(model, ['linear', 'lst', 'lora', 'full'], batch)}
  assert passes['linear'] == pytest.approx(1, abs=0.01)
  assert 1 < passes['lst'] < 1.35
  assert 1.8 < passes['lora'] < 2.5 and 2.8 < passes['full'] <= 3


def test_nnx_and_models_without_a_mode(uncompiled):
  class Net(nnx.Module):
    def __init__(self, rngs):
      self.body, self.head = nnx.Linear(6, 8, rngs=rngs), nnx.Linear(8, 3, rngs=rngs)

    def __call__(self, x):
      return self.head(nnx.relu(self.body(x)))

  class Plain(nn.Module):
    @nn.compact
    def __call__(self, x):
      return nn.Dense(3, name='head')(nn.relu(nn.Dense(8, name='body')(x)))

  batch = {'image': jnp.zeros((4, 6)), 'label': jnp.zeros(4, int)}
  lora = jpeft.lora(2, targets='body')
  first, second = (
    jpeft.plan(model, lora, batch)[0]
    for model in (nnx.eval_shape(lambda: Net(nnx.Rngs(0))), Plain())
  )
  assert first.trainable == second.trainable == 2 * (6 + 8)
  assert first.flops == second.flops


def test_the_largest_batch():
  def line(size):
    return 100 + 10 * size

  def steps(size):  # a compiler that pads, and recomputes where memory is short
    return 100 + 8 * 2 ** int(size).bit_length() + (size if size < 500 else 0)

  def only_known(size):  # of what does not fit, no more than its arguments are known
    return line(size) if size < 300 else 100 + size

  for needs, most_tries in ((line, 4), (steps, 14), (only_known, 14)):
    for end in (1, 2, 3, 31, 32, 33, 100, 290):
      for unit in (1, 4):
        limit = needs(end)
        asked = []

        def tried(size):
          asked.append(size)
          fits = size <= end
          return search.Tried(size, fits, needs(size))

        found = search.largest(tried, 32, limit, 100, unit)
        best = end // unit * unit
        assert found <= best and best - found <= max(unit, found // 8)
        assert found % unit == 0 and all(type(n) is int and n % unit == 0 for n in asked)
        assert len(asked) == len(set(asked)) <= most_tries, asked
  assert search.largest(lambda n: search.Tried(n, True, n), 8, 10**9, 0, most=1000) == 1000


def test_the_search_measures_batches_that_the_mesh_divides(uncompiled, monkeypatch):
  one = jpeft.plan(vit(), 'full', IMAGES)[0]
  asked = []

  def measured(work, name, tuned, tx, where, size=None):
    asked.append(size or work.size)
    return dataclasses.replace(one, total=10 * asked[-1], limit=495)

  monkeypatch.setattr(search, 'measure', measured)
  (found,) = jpeft.plan(vit(), 'full', IMAGES, accumulate=2, search=True)
  assert 40 <= found.largest <= 48 and found.total == 40
  assert len(asked) == len(set(asked)) and all(size % 2 == 0 for size in asked)


def test_what_cannot_fit_is_not_compiled(uncompiled):
  found = jpeft.plan(vit(), 'full', IMAGES)[0]
  assert (
    found.fits is False and not found.exact and found.total == found.argument and found.temp is None
  )
  assert 'over' in str(result.Plans([found])) and found.row()['temp_mib'] is None


@pytest.mark.parametrize(
  ('message', 'size'),
  (
    (
      'XLA:TPU compile permanent error. Ran out of memory in memory space hbm. '
      'Used 25.50G of 15.75G hbm. Exceeded hbm capacity by 9.75G.',
      25.5 * 2**30,
    ),
    (
      'E1000: CompileTimeHbmOom: Ran out of memory on HBM, the total memory required for HLO '
      'temporaries (61.97G) exceeds '
      'available HBM (15.75G). HLO module: jit_step.',
      int(61.97 * 2**30) + 7,
    ),
  ),
)
def test_the_compilers_refusal_is_read(message, size):
  error = jax.errors.JaxRuntimeError(f'RESOURCE_EXHAUSTED: {message}')

  class Program:
    def lower(self):
      return self

    def compile(self, options):
      raise error

  with pytest.raises(compile.TooLarge) as refused:
    compile.compiled(Program(), arguments=7)
  assert refused.value.bytes == size


def test_the_module_can_be_called_however_it_was_imported():
  assert importlib.import_module('jpeft.plan') is jpeft.plan and callable(jpeft.plan)


# ---- Backbones as shapes.


def test_described_backbones_are_those_that_are_loaded(backbone, tmp_path):
  loaded, described = (
    make(backbone, num_classes=3, seed=1, scan=True) for make in (models.load, models.describe)
  )
  shape = lambda tree: jax.tree.map(lambda x: (x.shape, x.dtype), tree)
  assert shape(loaded.variables) == shape(described.variables)
  assert loaded.model == described.model and loaded.preprocess == described.preprocess
  (tmp_path / 'config.json').write_text(json.dumps(VIT))
  bare = models.describe(tmp_path, num_classes=3, scan=True)  # no weights there at all
  assert shape(bare.variables) == shape(loaded.variables)


@pytest.mark.parametrize(
  ('products', 'facts', 'told'),
  [
    (60.0, {}, '60% of its cycles are of products: storing residuals takes time'),
    (60.0, {'saved_bits': 4}, 'packing residuals takes time, of which recomputing'),
    (60.0, {'saved_bits': 4, 'remat': True}, 'packing residuals takes time'),
    (60.0, {'remat': 'packed'}, 'coding the inputs of blocks takes time'),
    (60.0, {'remat': True}, 'the rest is of norms, softmax'),
    (60.0, {'memory_class': NO_BACKPROP}, 'the rest is of norms, softmax'),
    (90.0, {}, '90% of its cycles are of products; to take less time, a method without'),
    (90.0, {'memory_class': NO_BACKPROP}, 'most of them the forward pass'),
  ],
)
def test_what_costs_time_is_named(uncompiled, products, facts, told):
  found = jpeft.plan(vit(), 'lora', IMAGES, target='cpu')[0]
  assert found.time_advice is None  # it was not compiled
  schedule = programs.Schedule(100e6, products * 1e6, 3 * 2**30, 7.0)
  timed = dataclasses.replace(found, schedule=schedule, **facts)
  assert told in timed.time_advice and timed.row()['time_advice'] == timed.time_advice
  text = str(result.Plans([timed]))
  assert told in text and '100.0 + 7' in text and '3,072' in text and 'Mcycles' in text


@pytest.mark.parametrize(
  ('facts', 'told', 'left_out'),
  [
    ({'weights': 9e9}, 'in bfloat16 (model.param_dtype) or in 4 bits', 'more chips'),
    ({'weights': 9e9, 'narrow': True}, 'hold the backbone in 4 bits', 'bfloat16'),
    ({'weights': 9e9, 'storage': 'nf4', 'backbone': 'fsdp'}, 'over more chips', 'nf4'),
    (
      {'optimizer': 9e9, 'theta': 4e9},
      'less state (adamw_8bit, lion, adafactor), hold its state',
      'more',
    ),
    ({'optimizer': 9e9, 'theta': 9e9}, '(lora, lst), hold its state in host memory', 'lion'),
    ({'optimizer': 9e9, 'theta': 4e9, 'offload': True, 'devices': 2}, 'over more chips', 'host'),
    ({'temp': 9e9}, 'recompute blocks in the backward pass (--remat', 'packed4'),
    ({'temp': 9e9, 'saved_bits': 4}, 'from inputs in 8 or 4 bits', 'in the backward pass'),
    ({'temp': 9e9, 'remat': True}, 'from inputs in 8 or 4 bits', 'in the backward pass'),
    ({'temp': 9e9, 'remat': 'packed'}, 'take a smaller batch', 'recompute'),
  ],
)
def test_nothing_is_proposed_that_is_already_on(uncompiled, facts, told, left_out):
  found = jpeft.plan(vit(), 'lora', IMAGES, target='cpu')[0]
  plan = dataclasses.replace(found, **facts)
  assert told in plan.advice and left_out not in plan.advice
  assert told in str(result.Plans([plan]))


@pytest.mark.parametrize(
  ('method', 'bits'), [('lora', None), ('lora_packed', 4), ('s2a', 4), ('head2toe', None)]
)
def test_a_plan_knows_what_a_method_stores_in_few_bits(uncompiled, method, bits):
  assert jpeft.plan(vit(), method, IMAGES, target='cpu')[0].saved_bits == bits


# ---- The command.


def test_rows_as_json(command):
  code, out, _ = command('--methods=linear,full', '--batch=8', '--json')
  rows = json.loads(out)
  assert code == 0 and [r['method'] for r in rows] == ['linear', 'full']
  for row in rows:
    assert row['batch'] == 8 and row['target'] == 'cpu' and row['fits'] is None and row['exact']
    assert row['total_mib'] >= row['arguments_mib'] > 0 and row['gflop'] >= row['forward_gflop']
    assert {
      'trainable',
      'optimizer_mib',
      'temp_mib',
      'passes',
      'largest_batch',
      'dominant',
      'advice',
      'mcycles',
      'product_share',
      'kernel_calls',
      'moved_mib',
      'time_advice',
    } <= set(row)
    # The compiler of CPUs has no cycles; a step reads its weights at least.
    assert row['mcycles'] is None and row['time_advice'] is None
    assert row['moved_mib'] > row['weights_mib'] and row['kernel_calls'] == 0


@pytest.mark.parametrize(
  ('flag', 'told'), [('--remat', 'linear + remat '), ('--remat=dots', 'linear + remat dots')]
)
def test_the_table_and_the_plot(command, tmp_path, flag, told):
  pytest.importorskip('matplotlib')
  code, out, _ = command(flag, f'--plot={tmp_path / "plan.png"}')
  assert code == 0 and 'functional only' in out and told in out and 'most is' in out
  assert (tmp_path / 'plan.png').read_bytes().startswith(b'\x89PNG')


def test_what_would_fit_is_named_where_nothing_does(command, monkeypatch):
  held = lambda traced, known, options, mesh: dict(argument=known, temp=0, total=known, exact=True)
  monkeypatch.setattr(measure, 'compiled', held)
  full, linear = json.loads(command('--methods=full,linear', '--json')[1])
  cpu, between = targets.target('cpu'), (full['arguments_mib'] + linear['arguments_mib']) / 2
  for module in (targets, planning):
    monkeypatch.setattr(
      module, 'target', lambda name: targets.Target(name, cpu.devices, int(between * 2**20))
    )
  rows = json.loads(command('--methods=full', '--json')[1])
  assert [r['fits'] for r in rows] == [False] * (len(rows) - 1) + [True] and len(rows) > 1


@pytest.mark.parametrize(
  'flags, message',
  [
    (('--method=lst',), "unknown argument '--method'; did you mean '--methods'"),
    (('--methods=lts',), 'lts'),
    (('--batch=few',), 'few'),
    (('--methods=lst', '--seq=8'), 'image_size'),
    (('--config.mesh.data=64', '--batch=64'), 'needs 64 chips'),
  ],
)
def test_mistakes_are_one_sentence(command, flags, message):
  code, _, err = command(*flags)
  assert code == 2 and message in err and len(err.splitlines()) == 1


@pytest.mark.parametrize(
  'name, message',
  [
    ('tpu:v5', "did you mean 'tpu:v5"),
    ('gpu:h200', "did you mean 'gpu:h100'"),
    ('tpu', 'There are: tpu:v5e'),
  ],
)
def test_unknown_targets(name, message):
  with pytest.raises(ValueError, match=message):
    targets.target(name)


@pytest.mark.parametrize(
  'name, package, install',
  [
    ('tpu:v5e', 'libtpu', r"pip install 'jpeft\[plan\]'"),
    ('gpu:h100', 'cuda', 'pip install --no-deps jax-cuda13-plugin=='),
  ],
)
def test_a_missing_compiler_is_told_with_its_command(name, package, install, monkeypatch):
  real = importlib.util.find_spec
  monkeypatch.setattr(
    importlib.util, 'find_spec', lambda n, *a: None if package in n else real(n, *a)
  )
  with pytest.raises(ImportError, match=install):
    targets.target(name)


def test_a_target_that_nobody_named_is_told_with_its_reason(command, monkeypatch):
  real = importlib.util.find_spec
  there = set()

  def find_spec(name, *rest):
    if name == 'libtpu' or name.startswith('jax_cuda'):
      return real('json') if name in there else None
    return real(name, *rest)

  monkeypatch.setattr(importlib.util, 'find_spec', find_spec)
  (found,) = plans = jpeft.plan(vit(), 'linear', IMAGES)
  assert found.target == 'cpu' and "pip install 'jpeft[plan]'" in found.why
  told = str(plans).splitlines()
  assert told[0].startswith('cpu, 1 device') and told[1] == f'cpu because {found.why}'
  assert found.row()['target_reason'] == found.why and 'CUDA' not in found.why
  there.add('jax_cuda13_plugin')
  assert 'gpu:a100 and gpu:h100' in jpeft.plan(vit(), 'linear', IMAGES)[0].why
  named = jpeft.plan(vit(), 'linear', IMAGES, target='cpu')
  assert 'because' not in str(named) and not named[0].why
  code, out, _ = command(target=None)
  assert code == 0 and 'cpu because no target was named, and libtpu' in out


@pytest.mark.parametrize('kind', ['TPU v5 lite', 'TPU v5', 'TPU v6 lite'])
def test_a_tpu_that_is_there_is_the_target(kind, monkeypatch):
  class Device:
    device_kind = kind

  asked = []
  monkeypatch.setattr(jax, 'devices', lambda *platform: [Device()])
  monkeypatch.setattr(targets, '_tpu', lambda name, *rest: asked.append(name) or cpu)
  cpu = targets.Target('cpu', (), None)
  found = targets.target()
  assert targets.TPUS[asked[0].removeprefix('tpu:')].kind == kind and found.why.endswith(kind)


# ---- The trainer.


def test_training_says_what_an_update_asks_for(load, tmp_path, capsys):
  told = training.train(load('linear'), tmp_path)
  assert 'an update asks for' in capsys.readouterr().err
  parts = told['step_cost']
  assert parts['total_bytes'] >= parts['weights_bytes'] + parts['state_bytes'] > 0


def test_training_refuses_what_cannot_fit(load, tmp_path, monkeypatch):
  # ... before a device holds anything: the limit is what devices say, and CPUs say none.
  monkeypatch.setattr(fit, 'limit_of', lambda device: 10_000)
  monkeypatch.setattr(jax, 'device_put', lambda *args: pytest.fail('arrays were put on a device'))
  with pytest.raises(
    cli.Mistake, match=r'an update of 4 examples needs 0 MiB on a device that has 0 MiB: weights'
  ):
    training.train(load('full'), tmp_path / 'run')


# ---- TPU, ahead of time.


def test_what_devices_send_and_what_is_whole_is_told():
  options = {'target': 'cpu', 'mesh': (1, 8), 'sharded': True, 'whole_below': 1}
  plans = jpeft.plan(vit(2, scan=True), 'lora', IMAGES, **options)
  (found,) = plans
  uncut, heads = found.uncut
  assert heads.startswith('each device attends for all heads, as model=8 does not divide them: ')
  assert uncut.startswith('cut by rows, as model=8 does not divide the heads: ')
  (sums,) = (one for one in found.traffic if one.kind == 'all-reduce' and one.in_layers)
  assert sums.axes == ('model',) and sums.count >= 2 * 2 and sums.bytes >= 4 * 4 * 5 * 32 * 4
  told = str(plans).splitlines()
  assert f'lora: {uncut}' in told and f'lora: {sums}' in told
  assert found.row()['traffic'][0]['axes'] == ['model'] and found.row()['uncut'] == [uncut, heads]
  with pytest.raises(ValueError, match='one of replicated, sharded, fsdp'):
    jpeft.plan(vit(), 'lora', IMAGES, target='cpu', sharded='cut')


@pytest.mark.aot
@pytest.mark.parametrize('name', ['tpu:v5e', 'tpu:v5p', 'tpu:v6e'])
def test_one_chip(name):
  pytest.importorskip('libtpu')
  (found,) = jpeft.plan(vit(), 'lora', IMAGES, target=name)
  assert found.fits and found.exact and found.devices == 1
  assert 0 < found.schedule.products < found.schedule.cycles
  assert found.schedule.moved > 0 and found.time_advice
  tpu = targets.TPUS[name[4:]]
  assert found.limit == int(tpu.memory * 2**30)
  assert {device.device_kind for device in targets.target(name).devices} == {tpu.kind}


@pytest.mark.aot
def test_a_slice_shares_batch_and_backbone():
  pytest.importorskip('libtpu')
  options = {'target': 'tpu:v5e:2x2', 'sharded': True, 'whole_below': 1}
  one, spread = (
    jpeft.plan(vit(), 'lora', IMAGES, mesh=mesh, **options)[0] for mesh in ((1, 1), (2, 2))
  )
  assert spread.devices == 4 and spread.weights < 0.7 * one.weights and spread.flops == one.flops
  assert {'data', 'model'} == {name for sent in spread.traffic for name in sent.axes}
  assert one.traffic == ()


@pytest.mark.aot
def test_the_compiler_refuses_and_its_count_is_told():
  pytest.importorskip('libtpu')
  model = ViT(width=1024, depth=2, heads=16, mlp_dim=4096, patch_size=16, num_classes=10)
  batch = {
    'image': jax.ShapeDtypeStruct((2048, 224, 224, 3), jnp.float32),
    'label': jax.ShapeDtypeStruct((2048,), jnp.int32),
  }
  found, *instead = jpeft.plan(model, 'full', batch, target='tpu:v5e')
  assert instead and found.fits is False and found.exact and found.total > 15.75 * 2**30


@pytest.mark.aot
def test_state_on_the_host_takes_no_device_memory():
  pytest.importorskip('libtpu')
  here, there = (
    jpeft.plan(vit(), 'full', IMAGES, target='tpu:v5e', offload=offload)[0]
    for offload in (False, True)
  )
  assert there.optimizer == 0 and here.argument - there.argument > 0.9 * here.optimizer > 0


class Inference(nn.Module):
  @nn.compact
  def __call__(self, images, inference):
    return nn.Dense(3, name='head')(images.reshape(len(images), -1))


class Eval(nn.Module):
  @nn.compact
  def __call__(self, images, eval):
    return nn.Dense(3, name='head')(images.reshape(len(images), -1))


@pytest.mark.parametrize('model', (Inference(), Eval()), ids=('inference', 'eval'))
def test_every_name_of_a_train_flag_is_known(uncompiled, model):
  # The flag has no default: a call without it is a TypeError.
  (plan, *_) = jpeft.plan(model, {'full': jpeft.tune('head')}, IMAGES)
  assert plan.trainable == 8 * 8 * 3 * 3 + 3


def test_the_stage_that_needs_most_is_planned():
  """A method that trains more from an update on is planned as it is then."""
  low = jpeft.lora(8)
  rest = ('kernel/a', 'kernel/b')
  later = [
    (pattern, dataclasses.replace(rule, fixed=rest, stages=((0.5, ()),))) for pattern, rule in low
  ]
  plans = [
    jpeft.plan(vit(), {'method': method}, IMAGES, target='cpu')[0]
    for method in (low, jpeft.Method(later))
  ]
  assert plans[0].trainable == plans[1].trainable > 0
  assert plans[0].optimizer == plans[1].optimizer
