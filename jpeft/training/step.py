"""The compiled parts of a run: one update of theta, one evaluation step, and where arrays are put."""

import dataclasses
import math
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jpeft import programs as costs
from jpeft import tasks
from jpeft.core import Tuned

STREAM_THETA, STREAM_STEP, STREAM_UPDATE = range(3)


def initial_state(tuned: Tuned, tx: optax.GradientTransformation, backbone, seed: int) -> dict:
  """What an update changes: theta, the optimizer's state, the step, sums since the last log line."""
  key = jax.random.fold_in(jax.random.key(seed), STREAM_THETA)
  # Copied: a theta that starts as the backbone's own array would be donated with it.
  theta = jax.tree.map(jnp.copy, jax.jit(tuned.init)(key, backbone))
  return {'theta': theta, 'optimizer': tx.init(theta), 'step': jnp.zeros((), jnp.int32), 'sums': no_sums()}


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


def train_step(tuned: Tuned, forward: Callable, tx: optax.GradientTransformation, seed: int,
               smoothing: float = 0.0, accumulate: int = 1, offload: bool = False) -> Callable:
  """(state, backbone, batch) -> (state, {'loss', 'grad_norm'}): one update; differentiates theta alone.

  Args:
    tuned: from `attach`.
    forward: (theta, backbone, batch, key) -> logits, in training.
    tx: from `optim.optimizer`.
    seed: of dropout and of the method's own edits; the step is folded in.
    smoothing: of the labels.
    accumulate: micro-batches that a batch is cut into, one after the other.
    offload: the optimizer's state lies in host memory, and is on the device only while it is read and written.
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
    shapes = jax.eval_shape(gradient, theta, backbone, jax.tree.map(lambda x: x[0], cut), key, count)
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
    return jax.lax.scan(add, zeros, (jnp.arange(accumulate), cut))[0]

  def step(state, backbone, batch):
    number, theta = state['step'], state['theta']
    key = jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), STREAM_STEP), number)
    run = gradient if accumulate == 1 else accumulated
    count = (batch['label'] >= 0).sum()
    (loss, correct), grads = run(theta, backbone, batch, key, count)
    optimizer = jax.device_put(state['optimizer'], jax.memory.Space.Device) if offload else state['optimizer']
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
  """(theta, backbone, batch) -> the tally of one batch, by a `forward` of evaluation and the `tally` of a task."""
  def step(theta, backbone, batch):
    logits = forward(theta, backbone, batch, jax.random.key(0))
    return tally(logits, batch['label'], batch['mask'])
  return step


def evaluate(mark: Callable, scores: Callable, theta, backbone, batches, rows: NamedSharding,
             stop: Callable[[], Any]) -> dict[str, float] | None:
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
  return {k: jax.ShapeDtypeStruct((size, *x.shape[1:]), x.dtype, sharding=sharding) for k, x in blank.items()}


def compiled(fn: Callable, *args, donate: tuple[int, ...] = ()) -> tuple[Callable, dict[str, float]]:
  """(fn compiled for these arguments, what XLA says it costs).

  The costs: flops (with every round of its loops) and bytes_accessed of one call on one device, bytes of
  arguments, output, alias, temporaries and of all, and seconds of compilation. A backend that does not say leaves
  them out. What the program does not read is an argument all the same: it is kept on the device.

  Raises:
    cost.TooLarge: it does not fit the device, and the compiler says so.
  """
  start = time.perf_counter()
  traced = jax.jit(fn, donate_argnums=donate, keep_unused=True).trace(*args)
  program = costs.compiled(traced, arguments=costs.nbytes(args))
  cost: dict[str, float] = {'compile_seconds': round(time.perf_counter() - start, 2)}
  analysis, memory = program.cost_analysis() or {}, costs.memory(program)
  if 'flops' in analysis:
    shardings = [x.sharding for x in jax.tree.leaves(args) if getattr(x, 'sharding', None)]
    devices = max((len(s.device_set) for s in shardings), default=1)
    cost['flops'] = analysis['flops'] + costs.uncounted(traced, devices)
  if 'bytes accessed' in analysis:
    cost['bytes_accessed'] = analysis['bytes accessed']
  if memory is not None:
    cost |= {f'{part}_bytes': size for part, size in dataclasses.asdict(memory).items()}
    cost['total_bytes'] = memory.total
  return program, cost


def limit_of(device) -> int | None:
  """The bytes that a device lets a program have; None where it does not say."""
  return (device.memory_stats() or {}).get('bytes_limit')


def fitting(update: Callable, state, backbone, batch) -> tuple[Callable, dict[str, float]]:
  """`compiled` for an update whose state is donated, and whose memory its devices have.

  Args:
    update: from `train_step`.
    state, backbone, batch: shapes, as `laid`.

  Returns:
    (program, costs); the costs also say the bytes of weights, state and all, where the compiler does.

  Raises:
    ValueError: it needs more than a device has; says how much, and for what.
  """
  limit = limit_of(next(iter(jax.tree.leaves(batch)[0].sharding.device_set)))
  parts = {'weights_bytes': costs.nbytes(backbone), 'state_bytes': costs.nbytes(state)}
  try:
    program, cost = compiled(update, state, backbone, batch, donate=(0,))
    total = cost.get('total_bytes', 0)
    if limit is None or total <= limit:
      return program, cost | parts
  except costs.TooLarge as refused:
    total = refused.bytes
  size, has = batch['label'].shape[0], costs.mib(limit) if limit else 'less'
  raise ValueError(
    f'an update of {size} examples needs {costs.mib(total)} on a device that has {has}: weights '
    f'{costs.mib(parts["weights_bytes"])}, what is trained and its optimizer {costs.mib(parts["state_bytes"])}, the '
    'rest activations; take a smaller data.batch_size, model.remat=true or a method that keeps less: python -m '
    'jpeft.plan with the same --config says what fits')


def laid(tree, sharding) -> Any:
  """A tree as shapes that lie where a sharding, or a tree of shardings, says."""
  shape = lambda x, where: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where)
  if isinstance(sharding, NamedSharding):
    return jax.tree.map(lambda x: shape(x, sharding), tree)
  return jax.tree.map(shape, tree, sharding)


def mesh(data: int, model: int) -> Mesh:
  """A mesh of data x model devices.

  Raises:
    ValueError: there are not that many devices.
  """
  devices = jax.devices()
  if data * model > len(devices):
    raise ValueError(f'mesh.data={data} x mesh.model={model} needs {data * model} devices, there '
                     f'{"is" if len(devices) == 1 else "are"} {len(devices)}')
  return Mesh(np.array(devices[:data * model]).reshape(data, model), ('data', 'model'))


def replicated(mesh: Mesh) -> NamedSharding:
  return NamedSharding(mesh, PartitionSpec())


def offloads(mesh: Mesh, asked: bool) -> bool:
  """Whether the optimizer's state goes to host memory: where that is asked for, and the devices are no CPUs."""
  return asked and mesh.devices.flat[0].platform != 'cpu'


def of_state(mesh: Mesh, state: Mapping[str, Any], offload: bool = False) -> dict:
  """Shardings of a training state, whole on each device; the optimizer's part in pinned host memory if `offload`."""
  whole = replicated(mesh)
  places = {'optimizer': whole.with_memory_kind('pinned_host')} if offload else {}
  return {name: jax.tree.map(lambda _: places.get(name, whole), tree) for name, tree in state.items()}


def over_data(mesh: Mesh) -> NamedSharding:
  return NamedSharding(mesh, PartitionSpec('data'))


def over_model(mesh: Mesh, tree) -> Any:
  """Shardings of a backbone: of each array the largest axis that the model axis divides."""
  parts = mesh.shape['model']
  def leaf(x):
    axes = [i for i, n in enumerate(x.shape) if n % parts == 0] if math.prod(x.shape) > 1 else []
    spec = [None] * len(x.shape)
    if axes:
      spec[max(axes, key=lambda i: x.shape[i])] = 'model'
    return NamedSharding(mesh, PartitionSpec(*spec))
  return jax.tree.map(leaf, tree)
