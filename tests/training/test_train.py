"""What a run leaves, and that its options mean what they say."""

import json
import os
import re
import shutil
import signal
import sys

import jax
import numpy as np
import pytest

from jpeft import cli, data, group_lasso, train, training
from jpeft.tasks import classification
from jpeft.training import feature_cache
from jpeft.training.checkpoints import fingerprint, load_theta
from jpeft.training.metrics import read_metrics


def loss_of(folder):
  return [row['loss'] for row in read_metrics(folder / 'metrics.jsonl') if row['split'] == 'train']


def test_run_folder_is_complete(load, tmp_path):
  told = training.train(load('linear'), tmp_path / 'run')
  kept = {p.name for p in (tmp_path / 'run').iterdir()}
  assert {
    'config.json',
    'run.json',
    'metrics.jsonl',
    'report.json',
    'report.md',
    'curves.png',
    'confusion.json',
    'theta.safetensors',
    'best.safetensors',
    'checkpoints',
  } <= kept
  assert json.loads((tmp_path / 'run/report.json').read_text()) == told
  assert told['trainable'] == 16 * 2 + 2 and told['steps'] == 12 and told['method'] == 'linear'
  assert told['step_cost']['flops'] > 0 and told['step_cost']['temp_bytes'] > 0
  rows = read_metrics(tmp_path / 'run/metrics.jsonl')
  assert [r['step'] for r in rows if r['split'] == 'train'] == [2, 4, 6, 8, 10, 12]
  assert [r['step'] for r in rows if r['split'] == 'test'] == [6, 12]
  _, tuned, theta = training.reopen(tmp_path / 'run')
  assert fingerprint(theta) == told['theta_sha256']
  best, about = load_theta(tmp_path / 'run/best.safetensors', tuned.shapes)
  assert about['step'] == told['best']['step'] and about['accuracy'] == told['best']['value']
  assert jax.tree.structure(best) == jax.tree.structure(theta)


def test_a_run_reports_the_metrics_that_it_is_asked_for(load, tmp_path):
  changes = {'eval.metric': 'matthews', 'eval.also': "('f1', 'balanced_accuracy')"}
  told = training.train(load('linear', **changes), tmp_path)
  assert told['best']['metric'] == 'matthews'
  kept = json.loads((tmp_path / 'confusion.json').read_text())
  (a, b), (c, d) = kept['confusion']
  assert kept['labels'] == ['blue', 'red'] and kept['step'] == 12 and a + b == c + d == 5
  assert told['eval']['f1'] == pytest.approx(2 * d / (2 * d + b + c) if d else 0)
  assert told['eval']['balanced_accuracy'] == pytest.approx((a + d) / 10)
  assert told['eval']['accuracy'] == pytest.approx((a + d) / 10)
  assert '## Classes, at step 12' in (tmp_path / 'report.md').read_text()
  assert training.train(load('linear', **changes), tmp_path) == told


def test_a_run_ends_when_it_gets_no_better(load, tmp_path):
  # At this rate theta all but stays, so that no evaluation is better than the first.
  changes = {'optimizer.lr': 1e-12, 'eval.every': 2, 'eval.metric': 'accuracy', 'steps': 12}
  told = training.train(load('linear', **changes, **{'eval.patience': 2}), tmp_path / 'run')
  assert told['steps'] == 6 and told['best']['step'] == 2
  rows = read_metrics(tmp_path / 'run/metrics.jsonl')
  assert [r['step'] for r in rows if r['split'] == 'test'] == [2, 4, 6]
  # Killed before its report, it ends there again.
  for name in ('report.json', 'theta.safetensors'):
    (tmp_path / 'run' / name).unlink()
  again = training.train(load('linear', **changes, **{'eval.patience': 2}), tmp_path / 'run')
  assert again['theta_sha256'] == told['theta_sha256'] and again['steps'] == 6


def test_an_evaluation_each_epoch_unless_it_is_said(load, tmp_path):
  training.train(load('linear', **{'steps': 15, 'eval.every': None}), tmp_path)
  rows = read_metrics(tmp_path / 'metrics.jsonl')
  # 24 examples are 6 batches an epoch.
  assert [r['step'] for r in rows if r['split'] == 'test'] == [6, 12, 15]


def test_it_learns(load, tmp_path):
  told = training.train(
    load('full', **{'steps': 60, 'optimizer.lr': 3e-3, 'eval.every': 60}), tmp_path
  )
  assert loss_of(tmp_path)[0] > 0.6 > 0.2 > loss_of(tmp_path)[-1]
  assert told['eval']['accuracy'] >= 0.9


def test_a_penalty_of_the_method_is_trained(load, tmp_path):
  lengths = {}
  for lasso in (0.0, 1.0):
    training.train(load('head2toe', **{'method.lasso': lasso}), tmp_path / str(lasso))
    _, _, theta = training.reopen(tmp_path / str(lasso))
    lengths[lasso] = float(group_lasso(theta['head2toe']))
  assert lengths[1.0] < 0.9 * lengths[0.0]


def test_a_complete_run_is_not_trained_again(load, tmp_path):
  first = training.train(load(), tmp_path)
  before = (tmp_path / 'report.json').stat().st_mtime_ns
  assert training.train(load(), tmp_path) == first
  assert (tmp_path / 'report.json').stat().st_mtime_ns == before


def test_equal_seeds_give_equal_bits_and_others_do_not(load, tmp_path):
  told = [
    training.train(load(seed=seed), tmp_path / name)
    for name, seed in (('a', 0), ('b', 0), ('c', 1))
  ]
  first, again, other = (t['theta_sha256'] for t in told)
  assert first == again != other


def test_micro_batches_give_the_update_of_the_whole_batch(load, backbone, tmp_path):
  still = shutil.copytree(backbone, tmp_path / 'still')  # without dropout, whose masks would differ
  described = json.loads((still / 'config.json').read_text())
  (still / 'config.json').write_text(json.dumps(described | {'hidden_dropout_prob': 0.0}))
  settings = {'model.source': still, 'steps': 3, 'log.every': 1, 'optimizer.name': 'sgd'}
  training.train(load('full', **settings), tmp_path / 'whole')
  training.train(load('full', **settings, **{'optimizer.accumulate': 2}), tmp_path / 'cut')
  np.testing.assert_allclose(loss_of(tmp_path / 'whole'), loss_of(tmp_path / 'cut'), rtol=1e-5)
  thetas = [training.reopen(tmp_path / name)[2] for name in ('whole', 'cut')]
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), *thetas)


def test_a_mesh_gives_the_same_run(load, tmp_path):
  # With a larger eps a step of Adam is no sign of a gradient, noise and all.
  settings = {'steps': 4, 'log.every': 1, 'optimizer.eps': 1e-2, 'mesh.whole_below': 1}
  meshes = {
    'alone': {},
    'data': {'mesh.data': 2},
    'both': {'mesh.data': 4, 'mesh.model': 2, 'mesh.backbone': 'sharded'},
  }
  told = {
    n: training.train(load('full', **settings, **mesh), tmp_path / n) for n, mesh in meshes.items()
  }
  assert [t['device'][0] for t in told.values()] == ['1', '2', '8']
  alone = training.reopen(tmp_path / 'alone')[2]
  for name in ('data', 'both'):
    np.testing.assert_allclose(loss_of(tmp_path / name), loss_of(tmp_path / 'alone'), rtol=1e-5)
    theta = training.reopen(tmp_path / name)[2]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), theta, alone)


def test_a_baseline_stands_beside_it(config_file, tmp_path, capsys):
  argv = [
    f'--config={config_file}:bitfit',
    '--config.baseline=linear',
    '--config.steps=4',
    '--config.method.targets={fc1}',
    f'--workdir={tmp_path / "run"}',
  ]
  assert train.main(argv) == 0
  table = capsys.readouterr().out.splitlines()
  assert len(table) == 4 and table[2].startswith('| bitfit') and table[3].startswith('| linear')
  assert (tmp_path / 'run/linear/report.json').exists()


def test_a_run_without_matplotlib_says_that_curves_are_left_out(
  load, tmp_path, monkeypatch, capsys
):
  for name in ('matplotlib.backends.backend_agg', 'matplotlib.figure', 'matplotlib.ticker'):
    monkeypatch.setitem(sys.modules, name, None)
  training.train(load(**{'steps': 2}), tmp_path)
  told = (
    "curves.png is left out: this needs the package matplotlib: pip install 'jpeft[quickstart]'"
  )
  assert told in capsys.readouterr().err.splitlines()
  assert told in (tmp_path / 'report.md').read_text().splitlines()
  assert not (tmp_path / 'curves.png').exists()


def test_tensorboard_files_on_demand(load, tmp_path):
  pytest.importorskip('tensorboardX')
  training.train(load(**{'log.tensorboard': True, 'steps': 2}), tmp_path)
  assert list((tmp_path / 'tensorboard').glob('events*'))


def test_what_is_not_finite_stops_with_the_batch_named(load, tmp_path):
  # A learning rate that no float32 survives: the loss is infinite after a few updates.
  settings = {
    'optimizer.name': 'sgd',
    'optimizer.lr': 1e30,
    'checkpoint.every': 1,
    'schedule.name': 'constant',
  }
  with pytest.raises(cli.Diverged) as told:
    training.train(load('full', **settings), tmp_path)
  found = re.search(
    r'at update (\d+), on the examples ([\d, ]+) of \'train\'; (.*?);', str(told.value)
  )
  number, examples = int(found[1]), [int(i) for i in found[2].split(', ')]
  assert number > 1 and len(set(examples)) == 4 and all(0 <= i < 24 for i in examples)
  assert found[3] == f'the checkpoint of update {number - 1} is intact'
  # The batch is the one that this update of a seed of 0 saw.
  source = classification.Numbered(classification.source(load('full'), 'train'))
  order = data.Batches(source, 4, lambda example, rng: {'i': example['index']})
  batches = [next(order)['i'].tolist() for _ in range(number)]
  assert batches[-1] == examples
  assert not (tmp_path / 'theta.safetensors').exists()


def test_half_precision_scan_and_remat(load, tmp_path):
  kinds = {
    'model.dtype': 'bfloat16',
    'model.param_dtype': 'bfloat16',
    'model.scan': True,
    'model.remat': True,
  }
  told = training.train(
    load('lora', **kinds, **{'steps': 4, 'eval.every': 4, 'log.every': 1}), tmp_path
  )
  _, tuned, theta = training.reopen(tmp_path)
  assert all(leaf.dtype == 'float32' for leaf in jax.tree.leaves(theta))
  assert {leaf.dtype.name for leaf in jax.tree.leaves(tuned.backbone)} == {'bfloat16'}
  assert told['trainable'] == 2 * 2 * 8 * (16 + 16) + 34 and np.isfinite(loss_of(tmp_path)).all()


def test_help_lists_every_key(capsys):
  assert train.main(['--help']) == 0
  out = capsys.readouterr().out
  assert '--config=configs/quickstart.py' in out and '\n  optimizer.lora_plus ' in out


def test_features_kept_give_the_run_that_recomputes_them(load, tmp_path, capsys):
  settings = {'steps': 8, 'log.every': 1, 'model.dropout': 0.0, 'eval.every': 4}
  plain, kept = (
    training.train(load('lst', **settings, **{'data.cache_features': flag}), tmp_path / str(flag))
    for flag in (False, True)
  )
  np.testing.assert_allclose(loss_of(tmp_path / 'True'), loss_of(tmp_path / 'False'), rtol=1e-4)
  np.testing.assert_allclose(kept['eval']['loss'], plain['eval']['loss'], rtol=1e-4)
  assert kept['step_cost']['flops'] < 0.5 * plain['step_cost']['flops']
  told = capsys.readouterr().err.splitlines()
  assert sum('; compiled in ' in line for line in told) == 2
  assert sum('features of 34 examples: ' in line for line in told) == 1


def test_a_run_on_features_that_was_stopped_ends_with_the_same_bits(load, tmp_path, monkeypatch):
  settings = {'model.dropout': 0.0, 'data.cache_features': True}
  whole = training.train(load('linear', **settings), tmp_path / 'whole')
  fill, caught = feature_cache.Features.__getitem__, []

  def interrupted(self, i):
    caught.append(i)
    if len(caught) == 30:
      os.kill(os.getpid(), signal.SIGTERM)
    return fill(self, i)

  monkeypatch.setattr(feature_cache.Features, '__getitem__', interrupted)
  with pytest.raises(cli.Stopped):
    training.train(load('linear', **settings), tmp_path / 'cut')
  assert (
    training.train(load('linear', **settings), tmp_path / 'cut')['theta_sha256']
    == whole['theta_sha256']
  )


@pytest.mark.parametrize(
  ('settings', 'message'),
  [
    ({'data.augment': 'vtab'}, 'must be .none.'),
    ({}, r'\d+% of the FLOPs .* set config.model.dropout=0'),
  ],
)
def test_features_that_cannot_be_kept(load, tmp_path, settings, message):
  with pytest.raises((ValueError, cli.Mistake), match=message):
    training.train(load('full', **settings, **{'data.cache_features': True}), tmp_path)
