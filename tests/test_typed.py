"""Public names as a user writes them: read by the type checker, run by a test."""

from typing import Any

import chex
import jax
import numpy as np
import optax

import jpeft


def adapted(model: Any, variables: Any, images: jax.Array) -> Any:
  """Trains LoRA and the head for one step, and returns merged weights."""
  method: jpeft.Method = jpeft.chain(jpeft.lora(rank=2), jpeft.tune('{head}'))
  tuned: jpeft.Tuned = jpeft.attach(model, method, variables, images)
  theta: dict = tuned.init(jax.random.key(0), variables)
  tx: optax.GradientTransformation = jpeft.freeze(optax.adam(1e-3), tuned.trainable(theta))
  state = tx.init(theta)
  gradients = jax.grad(lambda theta: tuned.apply(theta, variables, images).sum())(theta)
  updates, state = tx.update(gradients, state, theta)
  summary = jpeft.summary(tuned)
  assert summary.trainable == jpeft.count(theta)
  checks: jpeft.Checks = jpeft.check(tuned, variables, images)
  assert checks, str(checks)
  return tuned.merge(optax.apply_updates(theta, updates), variables)


def registered() -> None:
  """One of each door."""
  jpeft.register_method('typed_lora', jpeft.lora, title='LoRA once more', paper='2106.09685')
  jpeft.register_metric('typed_zero', lambda tally: 0.0, task='language', lower_is_better=True)
  jpeft.register_format('typed_nf4', jpeft.nf4)


def test_public_names_work_as_they_are_typed() -> None:
  import flax.linen as nn

  class Model(nn.Module):
    @nn.compact
    def __call__(self, x):
      return nn.Dense(3, name='head')(nn.relu(nn.Dense(4, name='q')(x)))

  jpeft.register_anatomy(jpeft.Anatomy('typed', {'block': 'q', 'q': 'q', 'v': 'q', 'head': 'head'}))
  try:
    model = Model()
    images = jax.numpy.asarray(np.random.default_rng(0).normal(size=(2, 5)), 'float32')
    variables = model.init(jax.random.key(0), images)
    chex.assert_trees_all_equal_shapes(adapted(model, variables, images), variables)
  finally:
    del jpeft.ANATOMIES['typed']
