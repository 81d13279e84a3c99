"""VB-LoRA: mixtures by hand, one bank for all layers, and the paper's counts."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jpeft
from jpeft.methods import mixed
from tests.methods import small
from tests.methods.golden import full_size

BANK = jnp.array([[1.0, 2.0], [3.0, 4.0], [0.0, 1.0]])


def test_a_piece_is_a_mixture_of_the_largest():
  # ln 3 beside 0: shares of 3/4 and 1/4 of the two vectors; the third has no part in it.
  logits = jnp.array([0, np.log(3), -5])
  other = jnp.array([-9.0, 0, 0])
  t = {'logits_a': jnp.stack([logits, other])[None], 'logits_b': other[None, None]}
  found = mixed(t, BANK, 2)
  np.testing.assert_allclose(found['a'], [[2.5], [3.5], [1.5], [2.5]], rtol=1e-6)
  np.testing.assert_allclose(found['b'], [[1.5, 2.5]], rtol=1e-6)

  gradient = jax.grad(lambda t, bank: mixed(t, bank, 2)['a'].sum(), (0, 1))(t, BANK)
  assert gradient[0]['logits_a'][0, 0, 2] == 0 and gradient[0]['logits_a'][0, 0, 1] > 0
  np.testing.assert_allclose(gradient[1][:, 0], [0.25, 1.25, 0.5], rtol=1e-6)


def test_all_layers_mix_one_bank():
  model, held = small.vit(scan=True)
  tuned, theta = small.attached(
    model, held, jpeft.vb_lora(2, 5, 8, targets='{q}|{fc2}'), small.IMAGES
  )
  shapes = jax.tree.map(jnp.shape, theta['vb_lora'])
  assert shapes['']['bank'] == (5, 8)
  assert shapes['encoder/blocks/mlp/fc2']['kernel'] == {
    'logits_a': (3, 2, 8, 5),
    'logits_b': (3, 4, 2, 5),
  }
  read = tuned.expand(theta)['vb_lora']['encoder/blocks/mlp/fc2']['kernel']
  own = theta['vb_lora']['encoder/blocks/mlp/fc2']['kernel']
  alone = mixed(jax.tree.map(lambda x: x[1], own), theta['vb_lora']['']['bank'], 2)
  np.testing.assert_allclose(read['a'][1], alone['a'], rtol=1e-6)
  np.testing.assert_allclose(read['b'][1], alone['b'], rtol=1e-6)


def test_counts_on_roberta_base():
  """24 kernels of 24 pieces; stored are 2 numbers and a weight a piece, 0.02 M in the paper."""
  roberta = full_size.roberta_base()
  method = jpeft.vb_lora(4, 90, 256, 2)
  trained = jpeft.summary(jpeft.attach(roberta.model, method, *roberta.shapes)).trainable
  assert trained == 90 * 256 + 24 * 24 * 90


def test_hyperparameters_are_checked():
  with pytest.raises(ValueError, match='topk=3 must be at most vectors=2'):
    jpeft.vb_lora(vectors=2, topk=3)
  model, held = small.vit()
  with pytest.raises(ValueError, match='length=5 does not divide 32, a side of encoder/block_0'):
    jpeft.attach(model, jpeft.vb_lora(length=5), held, small.IMAGES)
  model, held = small.t5()
  with pytest.raises(ValueError, match="vb_lora: 'embed' is an embedding table"):
    method = jpeft.vb_lora(length=2, targets='embed')
    jpeft.attach(model, method, held, small.TOKENS, small.TOKENS)
