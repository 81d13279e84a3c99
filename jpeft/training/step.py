"""One update of theta and one evaluation step, as functions to be compiled."""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jpeft import tasks
from jpeft.core import NotAtHead, Tuned

from . import ema, hosts, sharding

STREAM_THETA, STREAM_STEP, STREAM_UPDATE = range(3)
PLAIN = tasks.softmax()


def initial_state(
  tuned: Tuned,
  tx: optax.GradientTransformation,
  backbone,
  seed: int,
  start: Callable | None = None,
  shardings: Mapping[str, Any] | None = None,
  taught: bool = False,
) -> dict:
  """The arrays that an update changes.

  These are theta, the optimizer's state, the step, and the sums since the last line of the log.

  Args:
    tuned: from `attach`.
    tx: what the optimizer's state is of.
    backbone: which theta may start from.
    seed: of theta.
    start: fresh theta -> theta, such as `Start.put`; theta stays fresh if left out.
    shardings: of the state, from `Layout.of_state`: no device makes more than its part. Where the
      compiler puts them, if left out.
    taught: whether a moving average of the model teaches it, which is then a part of the state.
  """
  shardings = shardings or {}
  key = jax.random.fold_in(jax.random.key(seed), STREAM_THETA)
  # Copied: a theta that starts as the backbone's own array would be donated with it.
  where = shardings.get('theta')
  made = jax.jit(tuned.init, out_shardings=_on_device(where))(key, backbone)
  theta = jax.tree.map(jnp.copy, made)
  if start is not None:
    theta = start(theta)
  if where is not None:
    theta = jax.device_put(theta, where)
  trained, _ = tuned.split(theta)
  state = {
    'theta': theta,
    'optimizer': _begun(tx, trained, shardings.get('optimizer')),
    'step': jnp.zeros((), jnp.int32),
    'sums': zero_sums(),
  }
  if taught:
    state['teacher'] = ema.begun(trained)
  return state


def _on_device(shardings):
  """The same shardings in the memory of the device."""

  def moved(sharding):
    is_host = sharding.memory_kind == 'pinned_host'
    return sharding.with_memory_kind('device') if is_host else sharding

  return jax.tree.map(moved, shardings)


def _begun(tx: optax.GradientTransformation, trained, shardings):
  """The state of an optimizer that has seen nothing, made where it stays."""
  if shardings is None:
    return tx.init(trained)
  return jax.device_put(tx.init(trained), shardings)


def state_shapes(
  tuned: Tuned, tx: optax.GradientTransformation, backbone, taught: bool = False
) -> dict:
  """The shapes of `initial_state`; nothing is computed."""
  return jax.eval_shape(
    lambda backbone: initial_state(tuned, tx, backbone, 0, taught=taught), backbone
  )


def zero_sums() -> dict:
  """The sums of no update."""
  return {'loss': jnp.zeros(()), 'correct': jnp.zeros(()), 'labels': jnp.zeros(())}


def means(sums: dict, objective: tasks.Objective = PLAIN) -> dict[str, float]:
  """loss and accuracy over the labels that were summed; the loss alone where none is right."""
  count = float(sums['labels'])
  found = {'loss': float(sums['loss']) / count}
  if objective.right is not None:
    found['accuracy'] = float(sums['correct']) / count
  return found


def batch_shapes(
  example: dict[str, np.ndarray], size: int, mesh: jax.sharding.Mesh | None
) -> dict[str, jax.ShapeDtypeStruct]:
  """The shapes of a batch of `size`, from a batch of one example, with their places on a mesh."""
  shapes = {
    name: jax.ShapeDtypeStruct((size, *x.shape[1:]), x.dtype) for name, x in example.items()
  }
  if mesh is None:
    return shapes
  return sharding.with_sharding(shapes, sharding.of_batch(mesh, shapes))


@dataclasses.dataclass(frozen=True)
class Forward:
  """The forward pass of a method on batches.

  Attributes:
    tuned: from `attach`.
    training: whether keys are read, for dropout.
    mode: the argument by which the model knows whether it trains; `deterministic` if left out.
    gather: theta as it is stored -> as the model reads it, see `Layout.gather`.
    untuned: the model without the method, which a loss of pairs compares with; `tuned.only()` if
      left out.
    parts: devices that the tokens of a row are cut over.
  """

  tuned: Tuned
  training: bool
  mode: Mapping[str, bool] | None = None
  gather: Callable | None = None
  untuned: Tuned | None = None
  parts: int = 1

  def __call__(self, theta, backbone, batch, key, aux=False, **takes):
    """logits [B, C], or [B, N, V] of texts; with `aux` (logits, aux), see `Tuned.apply`.

    `takes` are arguments that the method's rules take for themselves.
    """
    return self._apply(self.tuned, theta, backbone, batch, key, aux, **takes)

  def losses(self, theta, backbone, batch, key, objective=PLAIN, aux: bool = False):
    """(the loss of each label, whether the output gives it); with `aux` (these two, aux).

    The second is None where the objective does not know. Logits of texts are not made whole where
    they are large, see `in_pieces`.
    """
    labels = batch['label']
    if objective.pairs is not None:
      rewards, beside = self.rewards(theta, backbone, batch, key, objective.pairs)
      scored = objective.losses(rewards, labels), objective.right(rewards, labels)
      return (scored, beside) if aux else scored
    pieces, _ = self.in_pieces(batch, objective)
    if pieces is None:
      out = self(theta, backbone, batch, key, aux)
    else:
      out = self._apply(pieces, theta, backbone, batch, key, aux, labels=labels)
    found, beside = out if aux else (out, None)
    if pieces is None:
      right = None if objective.right is None else objective.right(found, labels)
      scored = objective.losses(found, labels), right
    else:
      scored = found[..., 0], found[..., 1] > 0
    return (scored, beside) if aux else scored

  def rewards(self, theta, backbone, batch, key, pairs: tasks.Pairs):
    """(the rewards of both texts of each row [B, 2], aux).

    The model without the method says of the same texts, without gradients, how likely they were.
    """
    texts = pairs.texts(batch)
    untuned = self.tuned.only() if self.untuned is None else self.untuned
    told, _ = Forward(untuned, training=False, parts=self.parts).losses({}, backbone, texts, key)
    (losses, _), beside = self.losses(theta, backbone, texts, key, aux=True)
    return pairs.rewards(losses, jax.lax.stop_gradient(told), texts['label']), beside

  def in_pieces(self, batch, objective: tasks.Objective = PLAIN) -> tuple[Tuned | None, str]:
    """(the method with losses in place of logits, '') where whole logits are large.

    Else (None, '') or, where they are large and cannot be avoided, (None, why).
    """
    if objective.pairs is not None:
      batch, objective = jax.eval_shape(objective.pairs.texts, batch), PLAIN
    if objective.smoothing is None:
      return None, ''
    labels = batch['label']
    out = self.tuned.sites[''].out
    if len(labels.shape) != 2 or math.prod(labels.shape) * out.shape[-1] <= tasks.MOST_LOGITS:
      return None, ''
    made, why = tasks.in_pieces(self.tuned, objective.smoothing, parts=self.parts)
    if why:
      return None, why
    shapes = jax.eval_shape(lambda: (self.tuned.shapes, self.tuned.backbone, batch))
    try:
      key = jax.random.key(0)
      jax.eval_shape(
        lambda theta, backbone, batch: self._apply(
          made, theta, backbone, batch, key, True, labels=batch['label']
        ),
        *shapes,
      )
    except NotAtHead as error:
      return None, str(error)
    return made, ''

  def _apply(self, tuned, theta, backbone, batch, key, aux, **takes):
    if self.gather is not None:
      theta = self.gather(theta)
    options = {'deterministic': not self.training} if self.mode is None else self.mode
    args, kwargs = tasks.inputs(batch)
    takes = tasks.taken(tuned.method, batch) | takes
    if self.training:
      kwargs = kwargs | {'rngs': {'dropout': key}}
    return tuned.apply(theta, backbone, *args, aux=aux, **kwargs, **options, **takes)


def train_step(
  tuned: Tuned,
  forward: Callable,
  tx: optax.GradientTransformation,
  seed: int,
  objective: tasks.Objective = PLAIN,
  accumulate: int = 1,
  offload: bool = False,
  steps: int | None = None,
  teaching: ema.Ema | None = None,
) -> Callable:
  """(state, backbone, batch) -> (state, {'loss', 'grad_norm'}): one update of theta.

  Only what is trained of theta is differentiated, and seen by the optimizer.

  Args:
    tuned: from `attach`.
    forward: a `Forward` in training, or a function that is called like it.
    tx: from `optim.optimizer`.
    seed: of dropout and of the method's own edits; the step is folded in.
    objective: the loss, from `Task.objective`.
    accumulate: micro-batches that a batch is cut into, one after the other.
    offload: the optimizer's state is in host memory, and on the device only while it is read and
      written.
    steps: updates in all, for edits that follow a share of them.
    teaching: how a moving average of the model teaches it; the state then has 'teacher'.
  """

  # Micro-batches are summed. What a method adds to the loss is a mean, so that it is divided by
  # their number, and the task's loss, which is a sum over the whole weight already, is not.
  rounds = accumulate if tuned.has_loss else 1

  def loss_of(trained, held, backbone, batch, key, weight):
    theta = tuned.join(trained, held)
    labels = batch['label']

    def run(**takes):
      return forward(theta, backbone, batch, key, aux=True, **takes)

    def loss(outputs):
      return objective.sum(outputs, labels) / weight * rounds

    def between(outputs, told):
      return objective.distance(outputs, told, labels) / weight * rounds

    if isinstance(forward, Forward) and not tuned.has_loss:
      (losses, right), aux = forward.losses(theta, backbone, batch, key, objective, aux=True)
      value = (objective.weights(labels) * losses).sum() / weight
    else:
      value, outputs, aux = tuned.objective(run, loss, between)
      right = None if objective.right is None else objective.right(outputs, labels)
    correct = jnp.zeros((), jnp.int32)
    if right is not None:
      correct = (right & (objective.weights(labels) > 0)).sum()
    _, held = tuned.split(tuned.write_back(theta, aux))
    return value / rounds, (correct, held)

  differentiate = jax.value_and_grad(loss_of, has_aux=True)

  def gradient(trained, held, backbone, batch, key, weight):
    """((loss, correct, gradient) of a batch, the state of theta after it)."""
    (loss, (correct, held)), grads = differentiate(trained, held, backbone, batch, key, weight)
    return (loss, correct, grads), held

  def accumulated_gradient(trained, held, backbone, batch, key, weight):
    # [accumulate, B / accumulate, ...] each
    parts = jax.tree.map(lambda x: x.reshape(accumulate, -1, *x.shape[1:]), batch)

    def add(carry, numbered):
      total, held = carry
      i, part = numbered
      new, held = gradient(trained, held, backbone, part, jax.random.fold_in(key, i), weight)
      return (jax.tree.map(jnp.add, total, new), held), None

    first = jax.tree.map(lambda x: x[0], parts)
    shapes, _ = jax.eval_shape(gradient, trained, held, backbone, first, key, weight)
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
    carry, _ = jax.lax.scan(add, (zeros, held), (jnp.arange(accumulate), parts))
    return carry

  def step(state, backbone, batch):
    number = state['step']
    trained, held = tuned.split(state['theta'])
    held, idle = tuned.active(held)
    optimizer = state['optimizer']
    key = jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), STREAM_STEP), number)

    if teaching is not None:
      taught_by = ema.theta_of(tuned, state['teacher'], state['theta'])
      batch = batch | {'told': teaching.told(taught_by, backbone, batch, key, accumulate)}

    # Losses are divided by the weight of the whole batch, not of each micro-batch: micro-batches of
    # texts have different numbers of labels, and a mean of means would be another loss.
    weights = objective.weights(batch['label'])
    weight = weights.sum()
    count = (weights > 0).sum()
    gradient_of = gradient if accumulate == 1 else accumulated_gradient
    (loss, correct, grads), held = gradient_of(trained, held, backbone, batch, key, weight)

    if offload:
      optimizer = jax.device_put(optimizer, jax.memory.Space.Device)
    updates, optimizer = tx.update(grads, optimizer, trained)
    theta = tuned.join(optax.apply_updates(trained, updates), tuned.join(held, idle))
    if tuned.edits:
      theta, optimizer = tuned.edit(
        state['theta'],
        theta,
        optimizer,
        grads,
        number + 1,
        jax.random.fold_in(key, STREAM_UPDATE),
        steps,
        backbone,
      )
    if offload:
      optimizer = jax.device_put(optimizer, jax.memory.Space.Host)

    new = {'loss': loss * count, 'correct': correct, 'labels': count}
    sums = jax.tree.map(lambda total, x: total + x, state['sums'], new)
    norm = jnp.sqrt(sum(jnp.square(g).sum() for g in jax.tree.leaves(grads)))
    new_state = {'theta': theta, 'optimizer': optimizer, 'step': number + 1, 'sums': sums}
    if teaching is not None:
      trained, _ = tuned.split(theta)
      new_state['teacher'] = teaching.moved(state['teacher'], trained, number)
    return new_state, {'loss': loss, 'grad_norm': norm}

  return step


def eval_step(
  forward: Callable,
  tally: Callable,
  tally_losses: Callable | None = None,
  pairs: tasks.Pairs | None = None,
) -> Callable:
  """(theta, backbone, batch) -> the tally of one batch.

  Args:
    forward: of evaluation.
    tally, tally_losses: of a task.
    pairs: of its objective; the tally then is of rewards.
  """

  def step(theta, backbone, batch):
    key = jax.random.key(0)
    if pairs is not None:
      rewards, _ = forward.rewards(theta, backbone, batch, key, pairs)
      return tally(rewards, batch['label'], batch['mask'])
    if isinstance(forward, Forward) and tally_losses is not None:
      losses, right = forward.losses(theta, backbone, batch, key)
      return tally_losses(losses, right, batch['label'], batch['mask'])
    logits = forward(theta, backbone, batch, key)
    return tally(logits, batch['label'], batch['mask'])

  return step


def evaluate(
  eval_step: Callable,
  theta,
  backbone,
  batches,
  rows: hosts.Rows,
  stop: Callable[[], Any],
  kept: Sequence[str] = (),
) -> dict[str, np.ndarray] | None:
  """The tally of all batches.

  Args:
    eval_step: compiled.
    theta: what is evaluated.
    backbone: beside it.
    batches: one pass, the last batch filled up.
    rows: those of a batch, and where they go.
    stop: called between batches; when it returns true there is no tally.
    kept: entries [B, ...] of a tally that are kept for each example; the others are added.
  """
  total = None
  rows_of: dict[str, list[np.ndarray]] = {name: [] for name in kept}
  for batch in batches:
    if stop():
      return None
    batch.pop('index')
    batch = rows.put(batch)
    tally = hosts.fetched(eval_step(theta, backbone, batch))
    if kept:
      real = hosts.fetched(batch['mask']) > 0  # False for rows that fill up the last batch
    for name, parts in rows_of.items():
      parts.append(tally.pop(name)[real])
    if total is None:
      total = tally
    else:
      total = jax.tree.map(np.add, total, tally)
  if total is None:
    return None
  return total | {name: np.concatenate(parts) for name, parts in rows_of.items()}
