"""Texts packed into one row see each other in no method: what is said of one hangs on that one
alone.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jpeft
from jpeft import models
from tests.fixtures import noisy
from tests.models.goldens import GOLDEN

ONE, TWO = [5, 9, 3, 40, 22], [7, 8, 30]
METHODS = {
  'lora': jpeft.lora(2, targets='{linear}'),
  'prefix': jpeft.prefix(3),
  'lst': jpeft.lst(3, block='own'),
  'lean': jpeft.lst(2, block='attention', downsample='pool'),
  'unipt': jpeft.unipt(),
}


# 8 rows of 8 tokens: a mask as square as a map of tokens.
@pytest.mark.parametrize('name,batch', (*((name, 2) for name in METHODS), ('lean', 8)))
def test_what_is_said_of_a_text_is_what_is_said_of_it_alone(name, batch):
  loaded = models.load(GOLDEN / 'llama', scan=True)
  example = jnp.zeros((1, 8), jnp.int32)
  tuned = jpeft.attach(loaded.model, METHODS[name], loaded.variables, example, mask=example)
  theta = noisy(jax.jit(tuned.init)(jax.random.key(0), loaded.variables), 0.3)
  run = jax.jit(lambda tokens, mask: tuned.apply(theta, loaded.variables, tokens, mask=mask))
  rows = lambda *parts: jnp.tile(jnp.array([sum(parts, [])]), (batch, 1))
  packed = run(rows(ONE, TWO), rows([1] * 5, [2] * 3))
  alone = (
    run(rows(ONE, [0] * 3), rows([1] * 5, [0] * 3)),
    run(rows(TWO, [0] * 5), rows([1] * 3, [0] * 5)),
  )
  np.testing.assert_allclose(packed[:, :5], alone[0][:, :5], atol=2e-5)
  np.testing.assert_allclose(packed[:, 5:], alone[1][:, :3], atol=2e-5)
  together = run(rows(ONE, TWO), rows([1] * 8))
  assert np.abs(packed[:, 5:] - together[:, 5:]).max() > 1e-3
