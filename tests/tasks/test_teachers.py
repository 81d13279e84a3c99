"""Losses in pieces that a teacher has a part in: equal to those of whole logits of both."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.interpreters import partial_eval as pe

import jpeft
from jpeft import tasks
from jpeft.models import Llama
from tests.fixtures import BACKBONES, noisy
from tests.traced import variables_of

TOKENS = jax.random.randint(jax.random.key(0), (2, 11), 0, 50)
LABELS = jnp.where(TOKENS % 5 == 0, -1, (TOKENS * 7) % 50)
SIZES = {'vocab': 50, 'width': 16, 'depth': 2, 'heads': 2, 'kv_heads': 1, 'mlp_dim': 24}
TEACHERS = {
  'wider': Llama(**{**SIZES, 'width': 24}),
  'tied': Llama(**SIZES, tied=True, scan=True),
}
SETTINGS = {'temperature': 2.5, 'weight': 0.3}


def by_hand(logits, told, labels, temperature, weight):
  """The same loss by NumPy-like steps: entropies of whole distributions, in float32."""
  of_label = tasks.loss(logits, labels)
  p = jax.nn.softmax(told / temperature)
  q = jax.nn.softmax(logits / temperature)
  divergence = (p * jnp.log(p)).sum(-1) - (p * jnp.log(q)).sum(-1)
  mixed = (1 - weight) * of_label + weight * temperature**2 * divergence
  return jnp.where(labels < 0, 0, mixed)


def attached(model, method, seed):
  variables = noisy(model.init(jax.random.key(seed), TOKENS), 0.1)
  tuned = jpeft.attach(model, method, variables, TOKENS)
  return tuned, noisy(tuned.init(jax.random.key(seed + 1), variables)), variables


@pytest.mark.parametrize(
  'method', [jpeft.lora(2), jpeft.qst(), jpeft.full()], ids=['lora', 'qst', 'full']
)
@pytest.mark.parametrize('name', TEACHERS)
def test_equal_to_whole_logits(name, method):
  """The teacher has a method of its own, also at its head, and pieces of other sizes."""
  taught_by, teacher_theta, teacher = attached(
    TEACHERS[name], jpeft.lora(2, targets='{q}|{head}' if name == 'wider' else '{q}'), 5
  )
  tuned, theta, variables = attached(Llama(**SIZES), method, 1)
  student, why = tasks.in_pieces(tuned, most=2 * 50 * 4)
  states, unreached = tasks.head_states(taught_by, most=2 * 50 * 3)
  assert why == unreached == ''
  weights = jnp.linspace(0.5, 1.5, LABELS.size).reshape(LABELS.shape)

  def cut(theta, teacher_theta):
    told = states.apply(teacher_theta, teacher, TOKENS, states=True)
    labels = tasks.Taught(LABELS, told, **SETTINGS)
    out = student.apply(theta, variables, TOKENS, labels=labels)
    return (out[..., 0] * weights).sum(), out[..., 1]

  def whole(theta, teacher_theta):
    told = jax.lax.stop_gradient(taught_by.apply(teacher_theta, teacher, TOKENS))
    logits = tuned.apply(theta, variables, TOKENS)
    losses = by_hand(logits, told, LABELS, **SETTINGS)
    right = (logits.argmax(-1) == LABELS) & (LABELS >= 0)
    return (losses * weights).sum(), right.astype(jnp.float32)

  both = []
  for fn in (cut, whole):
    run = jax.jit(jax.value_and_grad(fn, argnums=(0, 1), has_aux=True))
    both.append(run(theta, teacher_theta))
  jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-5), *both)
  assert not any(x.any() for x in jax.tree.leaves(both[0][1][1]))  # none reaches the teacher


def test_a_teacher_of_another_framework():
  """And its states give its logits."""
  b = BACKBONES['nnx_llama']
  tuned = jpeft.attach(b.model, jpeft.chain(), b.backbone, *b.args, **b.kwargs)
  states, why = tasks.head_states(tuned, most=1)
  assert why == ''
  told = jax.jit(states.apply, static_argnames='states')(
    {}, b.backbone, *b.args, states=True, **b.kwargs
  )
  whole = tuned.apply({}, b.backbone, *b.args, **b.kwargs)
  np.testing.assert_allclose(told.logits(), whole, rtol=1e-5, atol=1e-6)
  assert told.size == 1


def test_a_teacher_like_the_model_changes_nothing():
  """The divergence is 0, and so is its slope."""
  tuned, theta, variables = attached(Llama(**SIZES), jpeft.lora(2), 1)
  student, _ = tasks.in_pieces(tuned)
  states, _ = tasks.head_states(tuned)
  told = states.apply(theta, variables, TOKENS, states=True)

  def loss(theta):
    labels = tasks.Taught(LABELS, told, temperature=3.0, weight=1.0)
    return student.apply(theta, variables, TOKENS, labels=labels)[..., 0].sum()

  value, slopes = jax.value_and_grad(loss)(theta)
  assert abs(value) < 1e-4
  assert all(abs(x).max() < 1e-4 for x in jax.tree.leaves(slopes))


def test_no_logits_are_whole():
  taught_by, teacher_theta, teacher = attached(TEACHERS['wider'], jpeft.chain(), 5)
  tuned, theta, variables = attached(Llama(**SIZES), jpeft.lora(2), 1)
  student, _ = tasks.in_pieces(tuned)
  states, _ = tasks.head_states(taught_by, most=2 * 50 * 2)

  def cut(theta):
    told = states.apply(teacher_theta, teacher, TOKENS, states=True)
    labels = tasks.Taught(LABELS, told)
    return student.apply(theta, variables, TOKENS, labels=labels)[..., 0].sum()

  traced = jax.make_jaxpr(jax.grad(cut))(theta)
  live, _ = pe.dce_jaxpr(traced.jaxpr, [True] * len(traced.jaxpr.outvars))
  found = [v.aval for v in variables_of(live) if 50 in v.aval.shape and v.aval.ndim == 3]
  assert found and max(x.size for x in found) <= 2 * 50 * 2


@pytest.mark.parametrize(
  ('teacher', 'tokens', 'message'),
  [
    (Llama(**{**SIZES, 'vocab': 60}), TOKENS, 'the teacher knows 60 words and the model 50'),
    (Llama(**SIZES), TOKENS[:, :7], r'the teacher read \[2, 7\] tokens, and there are \[2, 11\]'),
  ],
)
def test_what_does_not_fit_is_refused(teacher, tokens, message):
  taught_by, teacher_theta, teacher_variables = attached(teacher, jpeft.chain(), 5)
  tuned, theta, variables = attached(Llama(**SIZES), jpeft.lora(2), 1)
  student, _ = tasks.in_pieces(tuned)
  states, _ = tasks.head_states(taught_by)
  told = states.apply(teacher_theta, teacher_variables, tokens, states=True)
  with pytest.raises(ValueError, match=message):
    student.apply(theta, variables, TOKENS, labels=tasks.Taught(LABELS, told))
