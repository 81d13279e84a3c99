"""Will it fit? Compiles a whole training step from shapes alone and says what it asks of a device.

    python -m jpeft.plan --config=configs/quickstart.py --methods=lst,lora,full --target=tpu:v5e

No accelerator and no weights are needed: TPUs are compiled for by topology (tpu:v5e, tpu:v5p, tpu:v6e, or
slices such as tpu:v5p:4x4x4 with the mesh of the config), GPUs by description (gpu:a100, gpu:h100). `cpu` is
functional only: its bytes say nothing of an accelerator's. The step is the trainer's own: forward, backward
and optimizer, its state donated.

    --methods=A,B     arguments of the config file, where it takes one, else methods of the registry or presets
                      of them (lora_all, lst_mlp); the config's own if left out
    --target=T        what to compile for (tpu:v5e)
    --batch=N --seq=N --remat[=dots]  in place of data.batch_size, data.max_length and model.remat of the config
    --search-batch    also find the largest batch that fits, to an eighth, by bisection
    --json            rows as JSON on stdout
    --plot=FILE.png   memory against FLOPs
    --config.KEY=VALUE            as for jpeft.train

In a notebook:

    jpeft.plan(model, ['lst', 'lora', 'full'], {'image': jnp.zeros((32, 224, 224, 3)), 'label': jnp.zeros(32, int)})
"""

import argparse
import dataclasses
import difflib
import functools
import inspect
import json
import sys
import time
import types
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import optax
from flax import nnx
from jax.sharding import Mesh

from . import config as config_lib
from . import methods as registry
from . import models, run, tasks
from .core import MEMORY_CLASSES, Method, Tuned, attach, backend_of, summary
from .methods.presets import preset
from .models.nn.blocks import REMATS, Remat
from .planning import devices as targets
from .programs import cost
from .quant import quantize
from .quant.formats import base as formats
from .training import optim, step

# What is tried, in this order, where nothing that was asked for fits.
INSTEAD = ('lst', 'linear')
CLASSES = 10  # of a head about which the config says nothing: its size hardly matters


@dataclasses.dataclass(frozen=True)
class Plan:
  """What one training step of a method asks of one device of a target.

  Attributes:
    method: its name.
    target: see `target.target`.
    batch: examples an update, over all devices.
    devices: of the mesh.
    remat: what is recomputed in the backward pass, see `models.blocks.run_blocks`.
    trainable: numbers that the optimizer sees.
    memory_class: what the backward pass must keep of the backbone.
    weights: bytes of the backbone, which is kept whether or not the step reads it.
    theta: bytes of what is trained.
    optimizer: bytes of the optimizer's state.
    argument: bytes of all that the step is called with.
    temp: bytes it allocates in between; None where it was not compiled.
    total: bytes it needs, at least those of the arguments.
    exact: False where `total` is that lower bound alone.
    limit: bytes of the device; None where there is no limit to speak of.
    flops: of the matrix products of a step, over all devices.
    forward: the same of the untouched model's forward pass.
    seconds: of tracing and compiling.
    largest: the largest batch that fits, where it was searched for; 0 where none does.
  """

  method: str
  target: str
  batch: int
  devices: int
  remat: Remat
  trainable: int
  memory_class: str
  weights: int
  theta: int
  optimizer: int
  argument: int
  temp: int | None
  total: int
  exact: bool
  limit: int | None
  flops: float
  forward: float
  seconds: float
  largest: int | None = None

  @property
  def fits(self) -> bool | None:
    """None where the target has no limit."""
    return None if self.limit is None else self.total <= self.limit

  @property
  def passes(self) -> float:
    """The step's FLOPs in forward passes."""
    return self.flops / self.forward

  @property
  def dominant(self) -> str:
    """The part that takes most of the memory."""
    parts = {'weights': self.weights, 'trained weights': self.theta, 'optimizer state': self.optimizer,
             'batch': self.argument - self.weights - self.theta - self.optimizer,
             'activations': self.total - self.argument if self.temp is None else self.temp}
    return max(parts, key=parts.get)

  @property
  def advice(self) -> str:
    """What to do about the part that dominates."""
    if self.dominant == 'weights':
      return ('hold the backbone in bfloat16 (model.param_dtype) or in 4 bits (model.quantize=nf4), or spread it over '
              'chips (mesh.backbone=sharded)')
    if self.dominant in ('trained weights', 'optimizer state'):
      return ('train fewer numbers (lora, lst), take an optimizer with less state (lion, adafactor), or hold its state '
              'in host memory (optimizer.offload)')
    if self.dominant == 'batch':
      return 'take a smaller batch, or shorter inputs'
    if self.memory_class == MEMORY_CLASSES[0]:
      return 'take a smaller batch, or a leaner side network (downsample=pool): the backbone stores nothing'
    if not self.remat:
      return 'recompute blocks in the backward pass (--remat[=dots]), or a method without backbone backprop (lst)'
    return 'take a smaller batch (optimizer.accumulate keeps the update), or a method without backbone backprop (lst)'

  def row(self) -> dict[str, Any]:
    """As JSON: sizes in MiB (2**20 bytes), FLOPs in 1e9."""
    size = lambda n: None if n is None else round(n / 2**20, 3)
    return {
      'method': self.method, 'target': self.target, 'batch': self.batch, 'devices': self.devices,
      'remat': self.remat, 'trainable': self.trainable, 'memory_class': self.memory_class,
      'weights_mib': size(self.weights), 'theta_mib': size(self.theta), 'optimizer_mib': size(self.optimizer),
      'arguments_mib': size(self.argument), 'temp_mib': size(self.temp), 'total_mib': size(self.total),
      'exact': self.exact, 'limit_mib': size(self.limit), 'fits': self.fits, 'largest_batch': self.largest,
      'gflop': self.flops / 1e9, 'forward_gflop': self.forward / 1e9,
      'passes': round(self.passes, 3), 'dominant': self.dominant, 'advice': self.advice,
      'compile_seconds': round(self.seconds, 1)}


class Plans(tuple[Plan, ...]):
  """Plans of several methods; prints as a table."""

  __slots__ = ()

  def __str__(self) -> str:
    head = ('method', 'trainable', 'optimizer', 'arguments', 'temp', 'total MiB', 'GFLOP', 'x forward', 'fits',
            'largest batch')
    size = lambda n: '-' if n is None else f'{n / 2**20:,.0f}'
    giga = lambda n: f'{n / 1e9:,.0f}' if n > 1e11 else f'{n / 1e9:.3g}'
    answer = {None: '-', True: 'yes', False: 'no'}
    remat = {False: '', True: ' + remat'}
    rows = [(p.method + remat.get(p.remat, f' + remat {p.remat}'), f'{p.trainable:,}', size(p.optimizer),
             size(p.argument), size(p.temp), size(p.total) if p.exact else f'over {size(p.total)}', giga(p.flops),
             f'{p.passes:.2f}', answer[p.fits], '-' if p.largest is None else str(p.largest)) for p in self]
    widths = [max(len(row[i]) for row in [head, *rows]) for i in range(len(head))]
    pad = lambda i, cell: cell.rjust(widths[i]) if i else cell.ljust(widths[i])
    line = lambda row: '  '.join(pad(i, cell) for i, cell in enumerate(row))
    first = self[0]
    limit = (f'{cost.mib(first.limit)} each' if first.limit is not None
             else 'functional only: its bytes say nothing of an accelerator')
    title = f'{first.target}, {first.devices} device{"s" * (first.devices > 1)}, {limit}; batch {first.batch}'
    notes = [f'{p.method}: most is {p.dominant}; to need less, {p.advice}' for p in self]
    return '\n'.join([title, line(head), *map(line, rows), *notes])


@dataclasses.dataclass(frozen=True)
class Work:
  """A model and its batches, as shapes.

  Attributes:
    model: the module.
    variables: what it holds.
    batch: size -> {name: shape}, as the trainer feeds them.
    size: examples an update.
    remat: of the model.
    mesh: (data, model) devices.
    sharded: whether the backbone is spread over the model axis.
    accumulate, smoothing: see `step.train_step`.
    offload: whether the optimizer's state lies in host memory.
  """

  model: Any
  variables: Any
  batch: Callable[[int], dict[str, jax.ShapeDtypeStruct]]
  size: int
  remat: Remat = False
  mesh: tuple[int, int] = (1, 1)
  sharded: bool = False
  accumulate: int = 1
  smoothing: float = 0.0
  offload: bool = False

  def mode(self, training: bool) -> dict[str, bool]:
    """The argument by which the model is told whether it trains; none where it takes none."""
    takes = inspect.signature(type(self.model).__call__).parameters
    return next(({name: training == trains} for name, trains in _MODES.items() if name in takes), {})

  def stored(self, storage: str | None) -> 'Work':
    """The same work on a backbone whose kernels are in 4 bits, by the name of the format; None for as they are."""
    if storage is None:
      return self
    args, kwargs = tasks.inputs(self.batch(1))
    coded = lambda held: quantize(self.model, formats.named(storage), held, *args, **kwargs, **self.mode(False))
    return dataclasses.replace(self, variables=jax.eval_shape(coded, self.variables))

  def tuned(self, method: Method) -> Tuned:
    args, kwargs = tasks.inputs(self.batch(1))
    return attach(self.model, method, self.variables, *args, **kwargs, **self.mode(False))

  def placed(self, mesh: Mesh, state, size: int) -> tuple[Any, Any, Any]:
    """(state, variables, batch) as shapes that lie where the trainer puts the arrays."""
    whole = step.replicated(mesh)
    backbone = step.over_model(mesh, self.variables) if self.sharded else whole
    state = step.laid(state, step.of_state(mesh, state, step.offloads(mesh, self.offload)))
    return state, step.laid(self.variables, backbone), step.laid(self.batch(size), step.over_data(mesh))

  def forward(self, size: int) -> float:
    """FLOPs of the untouched model's forward pass."""
    def fn(variables, batch):
      args, kwargs = tasks.inputs(batch)
      flat = backend.arrays(self.model, variables)
      return backend.run(self.model, variables, flat, {}, None, frozenset(), False, args,
                         {**kwargs, **self.mode(False)})
    backend = backend_of(self.model)
    return cost.flops(jax.jit(fn).trace(self.variables, self.batch(size))).all


_MODES = {'deterministic': False, 'train': True, 'training': True, 'is_training': True}


def measure(work: Work, name: str, tuned: Tuned, tx: optax.GradientTransformation, where: targets.Target,
            size: int | None = None) -> Plan:
  """The plan of one method at one batch size.

  Args:
    work: what is trained.
    name: of the method.
    tuned: `work.tuned` of the method.
    tx: the optimizer of its theta.
    where: the target.
    size: examples an update; those of the work if left out.

  Raises:
    ValueError: the mesh is larger than the target, or does not divide the batch.
  """
  start, size = time.perf_counter(), size or work.size
  mesh = where.mesh(*work.mesh)
  if size % (work.mesh[0] * work.accumulate):
    raise ValueError(f'a batch of {size} does not divide over {work.mesh[0]} devices and {work.accumulate} '
                     'micro-batches')
  state, held, batch = work.placed(mesh, step.state_shapes(tuned, tx, work.variables), size)
  fn = step.train_step(tuned, step.forward(tuned, True, work.mode(True)), tx, 0, work.smoothing, work.accumulate,
                       step.offloads(mesh, work.offload))
  traced = jax.jit(fn, donate_argnums=0, keep_unused=True).trace(state, held, batch)
  known = cost.nbytes((state, held, batch))
  found = {'argument': known, 'temp': None, 'total': known, 'exact': False}
  if where.memory is None or known <= where.memory:
    found = _compiled(traced, known, where.options)
  facts = summary(tuned)
  return Plan(
    method=name, target=where.name, batch=size, devices=mesh.size, remat=work.remat, trainable=facts.trainable,
    memory_class=facts.memory, weights=cost.nbytes(held), theta=cost.nbytes(state['theta']),
    optimizer=cost.nbytes(state['optimizer']), limit=where.memory, flops=cost.flops(traced).all,
    forward=work.forward(size), seconds=time.perf_counter() - start, **found)


def _compiled(traced, known: int, options: Mapping[str, Any]) -> dict[str, Any]:
  """The memory of a step; the compiler's own count where it refuses a step that does not fit."""
  try:
    memory = cost.memory(cost.compiled(traced, options, known))
  except cost.TooLarge as refused:
    return {'argument': known, 'temp': max(0, refused.bytes - known), 'total': refused.bytes, 'exact': True}
  return {'argument': memory.argument, 'temp': memory.temp, 'total': memory.total, 'exact': True}


def largest(fits: Callable[[int], bool], start: int, unit: int = 1, most: int = 2**20) -> int:
  """The largest multiple of `unit` that fits, to an eighth; 0 where not even `unit` does.

  Args:
    fits: whether a size fits; what is larger than one that does not, does not either.
    start: the first size to try.
    unit: sizes are its multiples.
    most: no size above it is tried.
  """
  low, high, size = 0, None, max(unit, start // unit * unit)
  while True:
    if fits(size):
      low = size
    else:
      high = size
    if high is None:
      if 2 * low > most:
        return low
      size = 2 * low
    elif high - low <= max(unit, low // 8):
      return low
    else:
      size = (low + high) // 2 // unit * unit
      size = size if size > low else low + unit


def _planned(work: Work, name: str, tuned: Tuned, tx, where: targets.Target, search: bool) -> Plan:
  """The plan at the batch of the work and, if asked for, the largest batch."""
  first = measure(work, name, tuned, tx, where)
  if not search or first.limit is None:
    return first
  fits = lambda size: first.fits if size == work.size else measure(work, name, tuned, tx, where, size).fits
  return dataclasses.replace(first, largest=largest(fits, work.size, work.mesh[0] * work.accumulate))


def plan(model, methods: str | Method | Sequence[str] | Mapping[str, Method], batch: Mapping[str, Any], *,
         variables=None, target: str = 'tpu:v5e', optimizer: str = 'adamw', accumulate: int = 1,
         mesh: tuple[int, int] = (1, 1), sharded: bool = False, search: bool = False, head: bool = True,
         storage: str | None = None, offload: bool = False) -> Plans:
  """What a training step of each method on a model asks of a device: nothing is run.

  Where none of them fits, what might is planned as well.

  Args:
    model: a Linen or an NNX module; an NNX one may be made by `nnx.eval_shape`.
    methods: names of the registry or of presets (`methods.presets`), or {name: method}.
    batch: arrays or shapes as the trainer feeds them: 'image' [B, ...] or 'tokens' [B, N] (with 'token_mask' and
      'types', or with 'decoder_tokens' and 'token_mask'), and 'label'.
    variables: what the model holds, or its shapes; for Linen those of its `init` if left out.
    target: 'tpu:v5e', 'tpu:v5p', 'tpu:v6e', a slice such as 'tpu:v5p:4x4x4', 'gpu:a100', 'gpu:h100' or 'cpu'.
    optimizer: 'adamw', 'adam', 'sgd', 'lion' or 'adafactor'.
    accumulate: micro-batches that a batch is cut into.
    mesh: (data, model) devices.
    sharded: spread the backbone over the model axis.
    search: also find the largest batch that fits.
    head: named methods also train the model's head.
    storage: the 4-bit format of the kernels (`quant.formats.FORMATS`); if left out, that of each named method.
    offload: the optimizer's state lies in host memory between updates.

  Returns:
    A tuple of Plan that prints as a table.

  Raises:
    ValueError: an unknown method or target, or a mesh that the target has not.
    ImportError: the compiler of the target is not installed.
  """
  shapes = {name: jax.ShapeDtypeStruct(x.shape, x.dtype) for name, x in batch.items()}
  resized = lambda size: {name: jax.ShapeDtypeStruct((size, *x.shape[1:]), x.dtype) for name, x in shapes.items()}
  told = getattr(model, 'remat', False)
  remat = told if told in REMATS else bool(told)
  work = Work(model, variables, resized, shapes['label'].shape[0], remat, mesh, sharded, accumulate,
              offload=offload)
  if variables is None:
    args, kwargs = tasks.inputs(shapes)
    init = functools.partial(model.init, **work.mode(False)) if isinstance(model, nn.Module) else None
    held = jax.eval_shape(init, jax.random.key(0), *args, **kwargs) if init else nnx.state(model)
    work = dataclasses.replace(work, variables=held)
  where = targets.target(target)

  def planned(name: str, method: Method, storage: str | None) -> Plan:
    held = work.stored(storage)
    tuned = held.tuned(method)
    tx = optim.optimizer(tuned, tuned.shapes, optax.constant_schedule(1e-3), name=optimizer)
    return _planned(held, name, tuned, tx, where, search)

  def named(name: str) -> Plan:
    method, values = preset(name)
    return planned(name, registry.make(method, head=head, **values), storage or registry.REGISTRY[method].storage)

  if isinstance(methods, Method):
    methods = {methods.names[0]: methods}
  if isinstance(methods, Mapping):
    plans = [planned(*pair, storage) for pair in methods.items()]
  else:
    plans = [named(name) for name in ([methods] if isinstance(methods, str) else methods)]
  return _or_instead(plans, named)


def _or_instead(plans: list[Plan], planned: Callable[[str], Plan]) -> Plans:
  """The plans and, where none fits, those of INSTEAD up to the first that does."""
  for name in INSTEAD:
    if any(p.fits is not False for p in plans):
      break
    if name not in [p.method for p in plans]:
      plans.append(planned(name))
  return Plans(plans)


def of_configs(configs: Mapping[str, Any], where: targets.Target, search: bool = False) -> Plans:
  """The plans of configurations; where none fits, also of what might.

  Args:
    configs: {name: configuration}, complete.
    where: the target.
    search: also find the largest batch that fits.

  Raises:
    ValueError, OSError, RuntimeError: whatever is wrong with a config.
  """
  plans = [_of_config(name, config, where, search) for name, config in configs.items()]
  last = list(configs.values())[-1]
  return _or_instead(plans, lambda name: _of_config(name, _with_method(last, name), where, search))


def _with_method(config, name: str):
  """The configuration with another method, at its preset."""
  values = {key: value for key, value in config_lib.flatten(config).items() if key.split('.')[0] != 'method'}
  method, hyperparameters = preset(name)
  chosen = {'method.name': method, **{f'method.{key}': value for key, value in hyperparameters.items()}}
  return config_lib.complete(config_lib.nest({**values, **chosen}))


def classes_of(config) -> int:
  """Outputs of the head of a configuration whose data are not read; 0 for a model that writes text."""
  return 0 if config.task == 'language' else config.model.num_classes or CLASSES


def _of_config(name: str, config, where: targets.Target, search: bool) -> Plan:
  pretrained, tuned = run.build(config, classes_of(config), models.describe)
  blank = tasks.of(config).blank(config, pretrained)
  _, tx = run.optimizer_of(config, tuned, steps=1000)
  work = Work(
    pretrained.model, pretrained.variables, lambda size: step.rows_of(blank, size, None), config.data.batch_size,
    config.model.remat, (config.mesh.data, config.mesh.model), config.mesh.backbone == 'sharded',
    config.optimizer.accumulate, config.loss.label_smoothing, config.optimizer.offload)
  return _planned(work, name, tuned, tx, where, search)


def plot(plans: Iterable[Plan], path: str) -> None:
  """Draws memory against FLOPs, one point a method, and the limit of the device.

  Raises:
    ImportError: matplotlib is not installed.
  """
  from matplotlib.backends.backend_agg import FigureCanvasAgg
  from matplotlib.figure import Figure
  plans = list(plans)
  figure = Figure(figsize=(7, 4.5), layout='constrained')
  FigureCanvasAgg(figure)
  axis = figure.subplots()
  for p in plans:
    axis.plot(p.total / 2**20, p.flops / 1e9, 'o' if p.exact else '>', color='C3' if p.fits is False else 'C0')
    axis.annotate(p.method, (p.total / 2**20, p.flops / 1e9), xytext=(4, 4), textcoords='offset points', fontsize=8)
  if plans[0].limit is not None:
    axis.axvline(plans[0].limit / 2**20, color='grey', linestyle='--', linewidth=1)
  axis.set(xlabel=f'MiB on {plans[0].target}', ylabel='GFLOP an update', xscale='log',
           title=f'batch {plans[0].batch}; red: does not fit')
  axis.set_ylim(0)
  axis.grid(alpha=0.3)
  figure.savefig(path, dpi=110)


def main(argv: list[str]) -> int:
  if '--help' in argv:
    print(__doc__)
    return 0
  with run.inputs_checked():
    flags, rest = _flags(argv)
    command = config_lib.parse(rest)
    where = targets.target(flags.target)
    plans = of_configs(_configs(command, flags), where, flags.search_batch)
    if flags.plot:
      plot(plans, flags.plot)
  print(json.dumps([p.row() for p in plans], indent=2) if flags.json else plans)
  return 0


def _flags(argv: list[str]) -> tuple[argparse.Namespace, list[str]]:
  """(what is the planner's, what is left for the config)."""
  parser = argparse.ArgumentParser(prog='jpeft.plan', add_help=False, allow_abbrev=False, exit_on_error=False)
  for name in ('--methods', '--plot'):
    parser.add_argument(name)
  parser.add_argument('--target', default='tpu:v5e')
  for name in ('--batch', '--seq'):
    parser.add_argument(name, type=int)
  parser.add_argument('--remat', nargs='?', const='true')
  for name in ('--search-batch', '--json'):
    parser.add_argument(name, action='store_true')
  known = [a for action in parser._actions for a in action.option_strings]
  for word in argv:
    flag = word.partition('=')[0]
    if flag.startswith('--') and flag not in known and not flag.startswith('--config'):
      near = difflib.get_close_matches(flag, [*known, '--config'], 1)
      raise ValueError(f'unknown argument {flag!r}' + (f'; did you mean {near[0]!r}?' if near else ''))
  try:
    return parser.parse_known_args(argv)
  except argparse.ArgumentError as error:
    raise ValueError(str(error)) from error


def _configs(command: config_lib.Command, flags) -> dict[str, Any]:
  """{name: configuration} of what the command line asks for."""
  asked = {'data.batch_size': flags.batch, 'data.max_length': flags.seq, 'model.remat': flags.remat}
  overrides = {key: str(value) for key, value in asked.items() if value is not None}
  command = dataclasses.replace(command, overrides={**command.overrides, **overrides})
  if not flags.methods:
    config = command.load()
    return {config.method.name: config}
  if flags.seq and models.describe(command.load().model.source).preprocess is not None:
    raise ValueError('--seq is for texts, and this backbone reads images: give --config.model.image_size=PIXELS')
  names = [name for name in flags.methods.split(',') if name]
  if command.takes_argument:
    return {name: command.baseline(name).load() for name in names}
  return {name: _with_method(command.load(), name) for name in names}


class _Callable(types.ModuleType):
  """`jpeft.plan` is this module, and the function of that name."""

  def __call__(self, *args, **kwargs) -> Plans:
    return plan(*args, **kwargs)


sys.modules[__name__].__class__ = _Callable

if __name__ == '__main__':
  if jax.config.jax_platforms is None:  # an accelerator that is there is left to those who use it
    jax.config.update('jax_platforms', 'cpu')
  sys.exit(run.command('jpeft.plan', main))
