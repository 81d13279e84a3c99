"""DINO: balanced targets and the loss by another way, views, and runs that a teacher tells."""

import itertools
import json

import jax
import numpy as np
import pytest
from safetensors import safe_open

import jpeft
from jpeft import cli, data, training
from jpeft.models import ViT
from jpeft.tasks.dino import STUDENT, TEACHER, balanced, dino, losses, momentum
from jpeft.training.checkpoints import fingerprint
from tests.contract.anatomies import described
from tests.fixtures import BACKBONES, noisy
from tests.training import killing

RNG = np.random.default_rng(0)
LOGITS = RNG.uniform(-1, 1, size=(6, 4, 8)).astype(np.float32)
balanced_of = jax.jit(balanced)
losses_of = jax.jit(losses)


def test_targets_by_another_way():
  table = np.exp(np.asarray(LOGITS[:, :2], float) / TEACHER).reshape(12, 8).T  # [K, rows]
  table /= table.sum()
  for _ in range(3):
    table /= table.sum(1, keepdims=True) * 8
    table /= table.sum(0, keepdims=True) * 12
  found = np.asarray(balanced_of(LOGITS[:, :2]))
  np.testing.assert_allclose(found.reshape(12, 8), (table * 12).T, rtol=1e-4, atol=1e-6)
  np.testing.assert_allclose(found.sum(-1), 1, rtol=1e-5)


def test_images_that_fill_a_batch_up_do_not_count():
  counted = np.array([1, 1, 0, 1, 0, 1])
  found = np.asarray(balanced_of(LOGITS, counted))
  there = np.flatnonzero(counted)
  np.testing.assert_allclose(found[there], balanced_of(LOGITS[there]), rtol=1e-4)
  assert np.all(np.isfinite(found))


def test_the_loss_by_another_way():
  told = np.asarray(balanced_of(LOGITS[:, :2]))
  found = np.asarray(losses_of(LOGITS, told))
  scaled = np.asarray(LOGITS, float) / STUDENT
  says = scaled - np.log(np.exp(scaled).sum(-1, keepdims=True))
  for image in range(6):
    pairs = [
      -(told[image, u] * says[image, v]).sum()
      for u, v in itertools.product(range(2), range(4))
      if u != v
    ]
    assert len(pairs) == 6
    np.testing.assert_allclose(found[image], np.mean(pairs), rtol=1e-4)


def test_what_tells_all_images_alike_has_the_loss_log_k():
  alike = np.broadcast_to(LOGITS[:1, :1], LOGITS.shape)
  told = balanced_of(alike[:, :2])
  np.testing.assert_allclose(told, 1 / 8, rtol=1e-5)
  uniform = np.zeros_like(alike)
  np.testing.assert_allclose(losses_of(uniform, told), np.log(8), rtol=1e-5)
  assert np.all(losses_of(alike, told) > np.log(8))


@pytest.mark.slow
@pytest.mark.parametrize('name', ['nnx_vit_scan', 'linen_vit'])
def test_views_are_images_of_a_batch(name):
  b = BACKBONES[name]
  with described(b):
    method = jpeft.chain(jpeft.explora(rank=2), dino(16, 32, 2))
    tuned = jpeft.attach(b.model, method, b.backbone, *b.args, **b.kwargs)
    theta = noisy(jax.jit(tuned.init)(jax.random.key(0), b.backbone), 0.05)
    images = np.asarray(b.args[0])
    others = np.cos(images), images[:, ::-1]
    views = np.stack(others, 1)
    run = jax.jit(lambda x, **more: tuned.apply(theta, b.backbone, x, **more, **b.kwargs))
    whole = run(images, views=views)
    assert whole['logits'].shape == (2, 3, 16) and 'losses' not in whole
    for i, view in enumerate((images, *others)):
      np.testing.assert_allclose(whole['logits'][:, i], run(view)['logits'][:, 0], atol=1e-5)
    assert np.abs(whole['logits']).max() <= 1 + 1e-5  # cosines


def test_views():
  image = RNG.integers(0, 255, (40, 30, 3), dtype=np.uint8)
  transform = data.views_transform(8, 0.5, 0.5, small=3, flip=False)
  one = transform({'image': image, 'label': 0}, np.random.default_rng(1))
  again = transform({'image': image, 'label': 0}, np.random.default_rng(1))
  other = transform({'image': image, 'label': 0}, np.random.default_rng(2))
  assert one['image'].shape == (8, 8, 3) and one['views'].shape == (4, 8, 8, 3)
  assert one['label'] == 0
  np.testing.assert_array_equal(one['views'], again['views'])
  assert np.any(one['views'] != other['views'])
  assert one['views'].min() >= -1 and one['views'].max() <= 1


def test_small_views_show_less_and_nothing_is_mirrored():
  ramp = np.broadcast_to(np.arange(200, dtype=np.uint8)[None, :, None], (200, 200, 3))
  transform = data.views_transform(16, 0.0, 1 / 255, small=4, flip=False)
  shown = []
  for seed in range(20):
    made = transform({'image': ramp}, np.random.default_rng(seed))
    views = [made['image'], *made['views']]
    assert all(view[0, -1, 0] > view[0, 0, 0] for view in views)
    shown.append([view[0, -1, 0] - view[0, 0, 0] for view in views])
  shown = np.array(shown)
  assert shown[:, :2].min() > 90 and shown[:, 2:].max() < 130
  flipping = data.views_transform(16, 0.0, 1 / 255, small=0)
  seen = [flipping({'image': ramp}, np.random.default_rng(seed))['image'] for seed in range(8)]
  assert {bool(view[0, -1, 0] > view[0, 0, 0]) for view in seen} == {True, False}


def test_the_momentum_rises_to_one(load):
  at_update = momentum(load('explora', **DINO), 100)
  np.testing.assert_allclose(at_update(0), 0.9, rtol=1e-6)
  np.testing.assert_allclose(at_update(50), 0.95, rtol=1e-6)
  np.testing.assert_allclose(at_update(100), 1.0, rtol=1e-6)


DINO = {
  'task': 'dino',
  'method.layers': -1,
  'method.rank': 2,
  'pretraining.prototypes': 8,
  'pretraining.width': 16,
  'pretraining.depth': 2,
  'pretraining.crops': 1,
  'pretraining.momentum': 0.9,
}


def test_a_run_is_taught_and_leaves_the_backbone_alone(load, tmp_path, monkeypatch):
  alone = training.train(load('explora', **DINO), tmp_path / 'alone')
  assert set(alone['eval']) == {'loss'} and alone['mergeable']
  _, tuned, theta = training.reopen(tmp_path / 'alone')
  assert set(theta) == {'explora', 'explora_lora', 'explora_norm'}
  assert fingerprint(theta) == alone['theta_sha256']

  # Stopped on the way, it goes on with the same teacher.
  with monkeypatch.context() as patched:
    killing.interrupt(patched, 8)
    with pytest.raises(cli.Stopped):
      training.train(load('explora', **DINO), tmp_path / 'stopped')
  training.train(load('explora', **DINO), tmp_path / 'stopped')
  states = [
    json.loads((tmp_path / name / 'checkpoints/12/about/metadata').read_text())['sha256']
    for name in ('alone', 'stopped')
  ]
  assert states[0] == states[1]
  for name in ('theta.safetensors', 'best.safetensors'):
    one, two = (contents(tmp_path / run / name) for run in ('alone', 'stopped'))
    assert one == two


def contents(file):
  """(notes, {name: (shape, dtype, bytes)}) of a file, whose header may have them in any order."""
  with safe_open(file, 'numpy') as opened:
    arrays = {name: opened.get_tensor(name) for name in opened.keys()}
    notes = opened.metadata()
  return notes, {name: (x.shape, str(x.dtype), x.tobytes()) for name, x in arrays.items()}


@pytest.mark.slow
def test_a_mesh_teaches_the_same(load, tmp_path):
  rows = {'data.eval_batch_size': 2, 'optimizer.accumulate': 2}
  one = training.train(load('explora', **DINO, **rows), tmp_path / 'one')
  two = training.train(load('explora', **DINO, **rows, **{'mesh.data': 2}), tmp_path / 'two')
  np.testing.assert_allclose(one['eval']['loss'], two['eval']['loss'], rtol=1e-3)


def test_a_model_without_one_feature_an_image_is_refused():
  model = ViT(width=8, depth=1, heads=2, mlp_dim=8, patch_size=4, image_size=8, pool='tokens')
  images = np.zeros((2, 8, 8, 3), np.float32)
  held = jax.eval_shape(model.init, jax.random.key(0), images)
  with pytest.raises(ValueError, match='dino: the model must return one feature for each image'):
    jpeft.attach(model, dino(8, 16, 2), held, images)
