"""The plan of a model that is given in Python."""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import optax
from flax import nnx

from jpeft import methods as registry
from jpeft import tasks, training
from jpeft.core import Method
from jpeft.methods import preset
from jpeft.models import REMATS

from . import devices as targets
from .result import Plan, Plans
from .search import _or_instead, _planned
from .work import Work


def plan(
  model,
  methods: str | Method | Sequence[str] | Mapping[str, Method],
  batch: Mapping[str, Any],
  *,
  variables=None,
  target: str = 'tpu:v5e',
  optimizer: str = 'adamw',
  accumulate: int = 1,
  mesh: tuple[int, int] = (1, 1),
  sharded: bool = False,
  search: bool = False,
  head: bool = True,
  storage: str | None = None,
  offload: bool = False,
) -> Plans:
  """What a training step of each method on a model asks of a device: nothing is run.

  Where none of them fits, what might is planned as well.

  Args:
    model: a Linen or an NNX module; an NNX one may be made by `nnx.eval_shape`.
    methods: names of the registry or of presets (`methods.presets`), or {name: method}.
    batch: arrays or shapes as the trainer feeds them: 'image' [B, ...] or 'tokens' [B, N] (with
      'token_mask' and 'types', or with 'decoder_tokens' and 'token_mask'), and 'label'.
    variables: what the model holds, or its shapes; for Linen those of its `init` if left out.
    target: 'tpu:v5e', 'tpu:v5p', 'tpu:v6e', a slice such as 'tpu:v5p:4x4x4', 'gpu:a100', 'gpu:h100'
      or 'cpu'.
    optimizer: 'adamw', 'adam', 'sgd', 'lion' or 'adafactor'.
    accumulate: micro-batches that a batch is cut into.
    mesh: (data, model) devices.
    sharded: spread the backbone over the model axis.
    search: also find the largest batch that fits.
    head: named methods also train the model's head.
    storage: the 4-bit format of the kernels (`quant.formats.FORMATS`); if left out, that of each
      named method.
    offload: the optimizer's state lies in host memory between updates.

  Returns:
    A tuple of Plan that prints as a table.

  Raises:
    ValueError: an unknown method or target, or a mesh that the target has not.
    ImportError: the compiler of the target is not installed.
  """
  shapes = {name: jax.ShapeDtypeStruct(x.shape, x.dtype) for name, x in batch.items()}
  resized = lambda size: {
    name: jax.ShapeDtypeStruct((size, *x.shape[1:]), x.dtype) for name, x in shapes.items()
  }
  told = getattr(model, 'remat', False)
  remat = told if told in REMATS else bool(told)
  work = Work(
    model,
    variables,
    resized,
    shapes['label'].shape[0],
    remat,
    mesh,
    sharded,
    accumulate,
    offload=offload,
  )
  if variables is None:
    args, kwargs = tasks.inputs(shapes)
    init = (
      functools.partial(model.init, **work.mode(False)) if isinstance(model, nn.Module) else None
    )
    held = jax.eval_shape(init, jax.random.key(0), *args, **kwargs) if init else nnx.state(model)
    work = dataclasses.replace(work, variables=held)
  where = targets.target(target)

  def planned(name: str, method: Method, storage: str | None) -> Plan:
    held = work.stored(storage)
    tuned = held.tuned(method)
    tx = training.optimizer(tuned, tuned.shapes, optax.constant_schedule(1e-3), name=optimizer)
    return _planned(held, name, tuned, tx, where, search)

  def named(name: str) -> Plan:
    method, values = preset(name)
    return planned(
      name, registry.make(method, head=head, **values), storage or registry.REGISTRY[method].storage
    )

  if isinstance(methods, Method):
    methods = {methods.names[0]: methods}
  if isinstance(methods, Mapping):
    plans = [planned(*pair, storage) for pair in methods.items()]
  else:
    plans = [named(name) for name in ([methods] if isinstance(methods, str) else methods)]
  return _or_instead(plans, named)
