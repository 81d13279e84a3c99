"""What a training step costs, in forward passes: the memory class of the registry is no mere
word.
"""

import functools

import jax
import jax.numpy as jnp
import pytest

import jpeft
from jpeft.methods import REGISTRY
from jpeft.programs import cost
from jpeft.quant import named
from tests.contract.anatomies import described
from tests.contract.table import made, row
from tests.fixtures import BACKBONES
from tests.fixtures.linen_models import VisionTransformer

# Wide and deep enough that adapters, heads and the block that nothing crosses weigh little.
MODEL = VisionTransformer(num_layers=5, hidden_size=128)
X = jax.ShapeDtypeStruct((2, 16, 16, 3), jnp.float32)
HELD = jax.eval_shape(lambda x: MODEL.init(jax.random.key(0), x, train=False), X)
SIZES = {'lst': {'reduction': 8}, 'qst': {'reduction': 8}}


def lowered(fn, *args) -> float:
  """FLOPs before XLA optimises, with all rounds of loops; some percent off the compiled, and
  nothing is compiled.
  """
  traced = jax.jit(fn).trace(*args)
  return traced.lower().cost_analysis()['flops'] + cost.uncounted(traced)


def compiled(fn, *args) -> float:
  """FLOPs as XLA leaves them, with all rounds of loops."""
  traced = jax.jit(fn).trace(*args)
  return traced.lower().compile().cost_analysis()['flops'] + cost.uncounted(traced)


@functools.cache
def backbone(storage: str | None):
  """The shapes of what the model holds."""
  if storage is None:
    return HELD
  return jax.eval_shape(
    lambda held: jpeft.quantize(MODEL, named(storage), held, X, train=False), HELD
  )


@functools.cache
def forward(storage: str | None, measure) -> float:
  """FLOPs of the untouched forward pass."""
  return measure(lambda held, x: MODEL.apply(held, x, train=False), backbone(storage), X)


def passes(method: str, measure) -> float:
  """FLOPs of output and gradients over those of the untouched forward pass."""
  storage = REGISTRY[method].storage if row(method).stored else None
  held = backbone(storage)
  with described(BACKBONES['linen_vit']):
    tuned = jpeft.attach(
      MODEL, made(method, 'linen_vit', **SIZES.get(method, {})), held, X, train=False
    )
  loss = lambda theta, held, x: jnp.sum(tuned.apply(theta, held, x, train=False) ** 2)
  return measure(jax.value_and_grad(loss), tuned.shapes, held, X) / forward(storage, measure)


@pytest.mark.parametrize('measure', [lowered, pytest.param(compiled, marks=pytest.mark.slow)])
@pytest.mark.parametrize('method', REGISTRY)
def test_the_cost_of_a_step(method, measure):
  low, high = {
    'no backbone backprop': (1, 1.35),
    'partial re-entry': (1, 2),
    'full crossing': (1.8, 3.1),
  }[REGISTRY[method].memory]
  assert low <= passes(method, measure) <= high
