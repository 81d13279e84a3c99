"""DeBERTa-v3: its distances, its heads, and methods by the names of the roles of BERT."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jpeft
from jpeft import models
from jpeft.models.deberta.model import Distances
from tests.fixtures import noisy
from tests.models.goldens import GOLDEN, golden

CONFIG = json.loads((GOLDEN / 'deberta' / 'config.json').read_text())


def test_near_distances_have_a_bucket_each_and_far_ones_share():
  """The buckets of the published models: 256 of each direction, distances up to 512."""
  rows = Distances().rows(512)
  first = rows[:, 0] - 256  # of a token 0, 1, 2, ... places behind
  np.testing.assert_array_equal(first[:129], np.arange(129))
  assert (np.diff(first) >= 0).all() and first[-1] == 255 and set(np.diff(first)) == {0, 1}
  np.testing.assert_array_equal(rows[0] - 256, -first)
  # 129 begins the part that widens: ceil(log(129 / 128) / log(511 / 128) * 127) + 128.
  assert (
    first[129] == 129 and first[300] == np.ceil(np.log(300 / 128) / np.log(511 / 128) * 127) + 128
  )


@pytest.mark.parametrize(
  ('method', 'roles'),
  [
    (jpeft.lora(2), ('query', 'value')),
    (jpeft.ia3(), ('key', 'value', 'fc2')),
    (jpeft.houlsby(4), ('out', 'fc2')),
    (jpeft.prefix(3), ('attention',)),
    (jpeft.lst(reduction=2), ('encoder',)),
  ],
  ids=['lora', 'ia3', 'houlsby', 'prefix', 'lst'],
)
def test_methods_find_their_places_and_train(method, roles):
  loaded = models.load(GOLDEN / 'deberta')
  inputs, arrays = golden('deberta')
  tuned = jpeft.attach(loaded.model, method, loaded.variables, **inputs)
  found = {path.split('/')[-1] for sites in tuned.shapes.values() for path in sites}
  assert set(roles) <= found
  theta = noisy(tuned.init(jax.random.key(0), loaded.variables), 0.1)

  def loss(theta):
    return jnp.square(tuned.apply(theta, loaded.variables, **inputs) - arrays['logits']).mean()

  value, slope = jax.jit(jax.value_and_grad(loss))(theta)
  assert value > 0 and any(np.abs(x).max() > 0 for x in jax.tree.leaves(slope))
  if tuned.mergeable:
    merged = loaded.model.apply(tuned.merge(theta, loaded.variables), **inputs)
    np.testing.assert_allclose(merged, tuned.apply(theta, loaded.variables, **inputs), atol=1e-5)


@pytest.mark.parametrize(
  ('changes', 'said'),
  [
    ({'position_biased_input': True}, 'position_biased_input=True is not supported, only False'),
    ({'share_att_key': False}, 'share_att_key=False'),
    ({'conv_kernel_size': 3}, 'conv_kernel_size=3'),
    ({'pos_att_type': 'c2p'}, 'pos_att_type='),
    ({'position_buckets': -1}, 'position_buckets must be at least 4'),
    ({'embedding_size': 6}, 'embedding_size=6'),
  ],
)
def test_what_version_2_has_beside_is_refused(changes, said):
  with pytest.raises(ValueError, match=said):
    models.from_config(CONFIG | changes, head=None)


def test_rows_that_are_too_long_are_told():
  model = models.from_config(CONFIG, head=None)
  with pytest.raises(ValueError, match='25 tokens are more than the 24 positions'):
    jax.eval_shape(lambda: model.init(jax.random.key(0), np.zeros((1, 25), np.int32)))
