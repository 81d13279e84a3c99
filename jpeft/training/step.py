"""The compiled parts of a run: one update of theta, one evaluation step, and where arrays are
put.
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import NamedSharding

from jpeft import tasks
from jpeft.core import Tuned

STREAM_THETA, STREAM_STEP, STREAM_UPDATE = range(3)


def initial_state(tuned: Tuned, tx: optax.GradientTransformation, backbone, seed: int) -> dict:
  """What an update changes: theta, the optimizer's state, the step, sums since the last log
  line.
  """
  key = jax.random.fold_in(jax.random.key(seed), STREAM_THETA)
  # Copied: a theta that starts as the backbone's own array would be donated with it.
  theta = jax.tree.map(jnp.copy, jax.jit(tuned.init)(key, backbone))
  return {
    'theta': theta,
    'optimizer': tx.init(theta),
    'step': jnp.zeros((), jnp.int32),
    'sums': no_sums(),
  }


def state_shapes(tuned: Tuned, tx: optax.GradientTransformation, backbone) -> dict:
  """The shapes of `initial_state`; nothing is computed."""
  return jax.eval_shape(lambda held: initial_state(tuned, tx, held, 0), backbone)


def no_sums() -> dict:
  return {'loss': jnp.zeros(()), 'correct': jnp.zeros(()), 'labels': jnp.zeros(())}


def forward(tuned: Tuned, training: bool, mode: Mapping[str, bool] | None = None) -> Callable:
  """(theta, backbone, batch, key) -> logits [B, C], or [B, N, V] of texts.

  Args:
    tuned: from `attach`.
    training: whether the key is read, for dropout.
    mode: the argument by which the model is told whether it trains; `deterministic` if left out.
  """
  mode = {'deterministic': not training} if mode is None else mode

  def run(theta, backbone, batch, key):
    args, kwargs = tasks.inputs(batch)
    rngs = {'rngs': {'dropout': key}} if training else {}
    return tuned.apply(theta, backbone, *args, **kwargs, **mode, **rngs)

  return run


def train_step(
  tuned: Tuned,
  forward: Callable,
  tx: optax.GradientTransformation,
  seed: int,
  smoothing: float = 0.0,
  accumulate: int = 1,
  offload: bool = False,
) -> Callable:
  """(state, backbone, batch) -> (state, {'loss', 'grad_norm'}): one update; differentiates theta
  alone.

  Args:
    tuned: from `attach`.
    forward: (theta, backbone, batch, key) -> logits, in training.
    tx: from `optim.optimizer`.
    seed: of dropout and of the method's own edits; the step is folded in.
    smoothing: of the labels.
    accumulate: micro-batches that a batch is cut into, one after the other.
    offload: the optimizer's state lies in host memory, and is on the device only while it is read
      and written.
  """

  def objective(theta, backbone, batch, key, count):
    logits = forward(theta, backbone, batch, key)
    loss = tasks.loss(logits, batch['label'], smoothing).sum() / count
    return loss, (logits.argmax(-1) == batch['label']).sum()

  gradient = jax.value_and_grad(objective, has_aux=True)

  def accumulated(theta, backbone, batch, key, count):
    cut = jax.tree.map(lambda x: x.reshape(accumulate, -1, *x.shape[1:]), batch)

    def add(total, micro):
      i, part = micro
      new = gradient(theta, backbone, part, jax.random.fold_in(key, i), count)
      return jax.tree.map(jnp.add, total, new), None

    shapes = jax.eval_shape(
      gradient, theta, backbone, jax.tree.map(lambda x: x[0], cut), key, count
    )
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
    return jax.lax.scan(add, zeros, (jnp.arange(accumulate), cut))[0]

  def step(state, backbone, batch):
    number, theta = state['step'], state['theta']
    key = jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), STREAM_STEP), number)
    run = gradient if accumulate == 1 else accumulated
    count = (batch['label'] >= 0).sum()
    (loss, correct), grads = run(theta, backbone, batch, key, count)
    optimizer = (
      jax.device_put(state['optimizer'], jax.memory.Space.Device) if offload else state['optimizer']
    )
    updates, optimizer = tx.update(grads, optimizer, theta)
    if offload:
      optimizer = jax.device_put(optimizer, jax.memory.Space.Host)
    theta = optax.apply_updates(theta, updates)
    if tuned.updates:
      theta = tuned.update(theta, number + 1, jax.random.fold_in(key, STREAM_UPDATE))
    new = {'loss': loss * count, 'correct': correct, 'labels': count}
    sums = jax.tree.map(lambda total, x: total + x, state['sums'], new)
    # Entries that the method holds fixed have a gradient of zero.
    norm = jnp.sqrt(sum(jnp.square(g).sum() for g in jax.tree.leaves(grads)))
    out = {'loss': loss, 'grad_norm': norm}
    return {'theta': theta, 'optimizer': optimizer, 'step': number + 1, 'sums': sums}, out

  return step


def eval_step(forward: Callable, tally: Callable) -> Callable:
  """(theta, backbone, batch) -> the tally of one batch, by a `forward` of evaluation and the
  `tally` of a task.
  """

  def step(theta, backbone, batch):
    logits = forward(theta, backbone, batch, jax.random.key(0))
    return tally(logits, batch['label'], batch['mask'])

  return step


def evaluate(
  mark: Callable,
  scores: Callable,
  theta,
  backbone,
  batches,
  rows: NamedSharding,
  stop: Callable[[], Any],
) -> dict[str, float] | None:
  """The scores over all batches.

  Args:
    mark: a compiled `eval_step`.
    scores: of its task.
    theta: what is evaluated.
    backbone: beside it.
    batches: one pass, filled up.
    rows: where a batch is put.
    stop: asked between batches; when true there are no scores.
  """
  total = None
  for batch in batches:
    if stop():
      return None
    batch.pop('index')
    found = jax.device_get(mark(theta, backbone, jax.device_put(batch, rows)))
    total = found if total is None else jax.tree.map(np.add, total, found)
  return scores(total)


def means(sums: dict) -> dict[str, float]:
  """loss and accuracy over the labels that were summed."""
  held = {name: float(x) for name, x in sums.items()}
  return {'loss': held['loss'] / held['labels'], 'accuracy': held['correct'] / held['labels']}


def rows_of(blank: dict[str, np.ndarray], size: int, sharding) -> dict[str, jax.ShapeDtypeStruct]:
  """The shapes of a batch of `size`, from one of one example."""
  return {
    k: jax.ShapeDtypeStruct((size, *x.shape[1:]), x.dtype, sharding=sharding)
    for k, x in blank.items()
  }
