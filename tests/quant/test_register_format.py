"""A 4-bit format from outside jpeft: registered, it is one like the others, from load to merge."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jpeft
from jpeft import config, quant
from jpeft.quant.formats import registry
from tests.core.small import Blocks, X, backbone


@dataclasses.dataclass(frozen=True)
class Even(quant.Blocks):
  """Sixteen even steps between the least and the largest weight of a block."""

  name = 'even'

  def code(self, blocks):
    low = blocks.min(1)
    step = (blocks.max(1) - low) / 15
    codes = jnp.round((blocks - low[:, None]) / jnp.where(step == 0, 1, step)[:, None])
    return codes.astype(jnp.uint8), {'absmax': step, 'zero': low}

  def value(self, codes, scale, zero):
    return codes.astype(jnp.float32) * scale + zero


def even():
  return Even(block=None)


@pytest.fixture
def registered(monkeypatch):
  monkeypatch.setattr(registry, 'FORMATS', dict(registry.FORMATS))
  monkeypatch.setattr(registry, '_MODULES', {})
  jpeft.register_format('even', even)


def test_it_is_found_by_name_and_says_where_it_came_from(registered):
  assert quant.named('even') == Even(block=None)
  assert quant.registered_module('even') == __name__
  assert quant.registered_module('nf4') is None
  with pytest.raises(ValueError, match="no 4-bit format is called 'eveen'; did you mean 'even'"):
    quant.named('eveen')


def test_a_config_takes_it(registered):
  values = {
    'model': {'source': 'x', 'quantize': 'even'},
    'data': {'name': 'folder:x'},
    'method': {'name': 'lora'},
    'steps': 1,
  }
  assert config.complete(values).model.quantize == 'even'


def test_names_of_jpeft_are_taken():
  with pytest.raises(ValueError, match="'nf4' is a 4-bit format of jpeft"):
    jpeft.register_format('nf4', even)


@pytest.mark.parametrize('scan', (False, True))
def test_a_model_in_it_adapts_and_merges(registered, scan):
  model = Blocks(stack='scan' if scan else '')
  held = backbone(model)
  coded = jpeft.quantize(model, quant.named('even'), held, X, targets='.*/fc')
  assert jpeft.nbytes(coded) < jpeft.nbytes(held)
  decoded = jax.tree.map(
    lambda x: x.unbox() if isinstance(x, jpeft.Box) else x,
    coded,
    is_leaf=lambda x: isinstance(x, jpeft.Box),
  )
  method = jpeft.lora(2, targets='.*/fc')
  tuned = jpeft.attach(model, method, coded, X)
  plain = jpeft.attach(model, method, decoded, X)
  theta = jax.tree.map(lambda x: x + 0.1, tuned.init(jax.random.key(0), coded))
  out = tuned.apply(theta, coded, X)
  np.testing.assert_allclose(out, plain.apply(theta, decoded, X), atol=1e-5)
  np.testing.assert_allclose(out, model.apply(tuned.merge(theta, coded), X), atol=1e-5)
