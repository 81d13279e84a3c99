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
from tests.contract.table import error_of, made, row
from tests.fixtures import BACKBONES
from tests.fixtures.linen_models import VisionTransformer
from tests.fixtures.linen_text import Bert

# Wide and deep enough that adapters, heads and the block that nothing crosses weigh little, and
# with enough tokens that what a method does to each entry of a kernel does too.
# {backbone: (model, example, options of its call)}; the second serves what the first cannot.
MODELS = {
  'linen_vit': (
    VisionTransformer(num_layers=5, hidden_size=128),
    jax.ShapeDtypeStruct((16, 16, 16, 3), jnp.float32),
    {'train': False},
  ),
  'linen_bert': (Bert(depth=5, width=128), jax.ShapeDtypeStruct((16, 12), jnp.int32), {}),
}
# With so few tokens the search for the smallest entries of all kernels weighs as a product does.
SIZES = {'lst': {'reduction': 8}, 'qst': {'reduction': 8}, 'pst': {'targets': '{fc1}|{fc2}'}}


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
def backbone(name: str, storage: str | None):
  """The shapes of what a model holds."""
  model, x, options = MODELS[name]
  held = jax.eval_shape(lambda x: model.init(jax.random.key(0), x, **options), x)
  if storage is None:
    return held
  return jax.eval_shape(
    lambda held: jpeft.quantize(model, named(storage), held, x, **options), held
  )


@functools.cache
def forward(name: str, storage: str | None, measure) -> float:
  """FLOPs of the untouched forward pass."""
  model, x, options = MODELS[name]
  return measure(lambda held, x: model.apply(held, x, **options), backbone(name, storage), x)


def passes(method: str, measure) -> float:
  """FLOPs of output and gradients over those of the untouched forward pass."""
  storage = REGISTRY[method].storage if row(method).stored else None
  name = next(name for name in MODELS if error_of(method, name) is None)
  model, x, options = MODELS[name]
  held = backbone(name, storage)
  with described(BACKBONES[name]):
    tuned = jpeft.attach(model, made(method, name, **SIZES.get(method, {})), held, x, **options)
  trained, state = tuned.split(tuned.shapes)

  def loss(trained, state, held, x):
    return jnp.sum(tuned.apply(tuned.join(trained, state), held, x, **options) ** 2)

  step = measure(jax.value_and_grad(loss), trained, state, held, x)
  return step / forward(name, storage, measure)


# Which products a gradient crosses is found for every method in every run, see
# test_memory_class.py; what that costs, for a third of them.
METHODS = [
  pytest.param(method, marks=[pytest.mark.slow] if i % 3 else [])
  for i, method in enumerate(REGISTRY)
]


@pytest.mark.parametrize('measure', [lowered, pytest.param(compiled, marks=pytest.mark.slow)])
@pytest.mark.parametrize('method', METHODS)
def test_the_cost_of_a_step(method, measure):
  low, high = {
    'no backbone backprop': (1, 1.35),
    'partial re-entry': (1, 2),
    'full crossing': (1.8, 3.1),
  }[REGISTRY[method].memory]
  assert low <= passes(method, measure) <= high
