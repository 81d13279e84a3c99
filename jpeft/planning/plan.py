"""The plan of a model that is given in Python."""

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import optax
from flax import nnx

from jpeft import methods as registry
from jpeft import tasks, training
from jpeft.core import Method, Tuned, flags_of
from jpeft.methods import preset
from jpeft.models import REMATS, Remat

from . import devices
from .result import Plan, Plans
from .search import or_instead, planned
from .work import Work


def plan(
  model,
  methods: str | Method | Sequence[str] | Mapping[str, Method],
  batch: Mapping[str, Any],
  *,
  variables=None,
  target: str | None = None,
  optimizer: str = 'adamw',
  accumulate: int = 1,
  mesh: tuple[int, ...] = (1, 1),
  sharded: bool | str = False,
  whole_below: int = training.WHOLE_BELOW,
  search: bool = False,
  head: bool = True,
  storage: str | None = None,
  offload: bool = False,
  implementation: str = 'auto',
) -> Plans:
  """What a training step of each method on a model needs of a device: nothing is run.

  If none of them fits, methods that might are planned as well.

  Args:
    model: a Linen or an NNX module; an NNX one may be made by `nnx.eval_shape`.
    methods: names of the registry or of presets (`methods.presets`), or {name: method}.
    batch: arrays or shapes as the trainer feeds them: 'image' [B, ...] or 'tokens' [B, N] (with
      'token_mask' and 'types', or with 'decoder_tokens' and 'token_mask'), and 'label'.
    variables: the model's variables, or their shapes; for Linen those of its `init` if left out.
    target: 'tpu:v5e', 'tpu:v5p', 'tpu:v6e', a slice such as 'tpu:v5p:4x4x4', 'gpu:a100', 'gpu:h100'
      or 'cpu'. If left out, the TPU that JAX runs on, else 'tpu:v5e' where libtpu, the TPU
      compiler, is installed, else 'cpu'; the table says which, and why.
    optimizer: 'adamw', 'adamw_8bit', 'adam', 'sgd', 'lion' or 'adafactor'.
    accumulate: micro-batches that a batch is cut into.
    mesh: (data, model) or (data, model, sequence) devices, see `training.Layout`.
    sharded: how the backbone is cut over the mesh, 'replicated', 'sharded' or 'fsdp'; True for
      'sharded'.
    whole_below: arrays with fewer numbers in one layer are whole on each device.
    search: also find the largest batch that fits.
    head: named methods also train the model's head.
    storage: the 4-bit format of the kernels (`quant.formats.FORMATS`); if left out, that of each
      named method.
    offload: the optimizer's state is in host memory between updates.
    implementation: of the products with 4-bit kernels, see `quant.quantize`.

  Returns:
    A tuple of Plan that prints as a table.

  Raises:
    ValueError: an unknown method or target, or a mesh that the target does not have.
    ImportError: the compiler of the target is not installed.
  """
  shapes = {name: jax.ShapeDtypeStruct(x.shape, x.dtype) for name, x in batch.items()}

  def resized(size: int) -> dict[str, jax.ShapeDtypeStruct]:
    return {name: jax.ShapeDtypeStruct((size, *x.shape[1:]), x.dtype) for name, x in shapes.items()}

  if variables is None:
    variables = _variables_of(model, shapes)
  work = Work(
    model=model,
    variables=variables,
    batch=resized,
    size=shapes['label'].shape[0],
    memory=training.Memory(remat=_remat_of(model), implementation=implementation, offload=offload),
    mesh=mesh,
    backbone=_layout(sharded),
    whole_below=whole_below,
    accumulate=accumulate,
  )
  where = devices.target(target)

  def made(tuned: Tuned) -> optax.GradientTransformation:
    rate = optax.constant_schedule(1e-3)
    return training.optimizer(tuned, tuned.shapes, rate, name=optimizer)

  def plan_of(name: str, method: Method, storage: str | None) -> Plan:
    stored = work.stored(storage)
    tuned = stored.tuned(method)
    return planned(stored, name, tuned, made, where, search)

  def plan_of_name(name: str) -> Plan:
    method, hyperparameters = preset(name)
    made = registry.make(method, head=head, **hyperparameters)
    return plan_of(name, made, storage or registry.REGISTRY[method].storage)

  if isinstance(methods, str):
    methods = [methods]
  if isinstance(methods, Method):
    methods = {methods.names[0]: methods}
  if isinstance(methods, Mapping):
    plans = [plan_of(name, method, storage) for name, method in methods.items()]
  else:
    plans = [plan_of_name(name) for name in methods]
  return or_instead(plans, plan_of_name)


def _layout(sharded: bool | str) -> str:
  """The name of a layout.

  Raises:
    ValueError: there is none of this name.
  """
  if isinstance(sharded, bool):
    return 'sharded' if sharded else 'replicated'
  if sharded not in training.BACKBONES:
    raise ValueError(
      f'sharded={sharded!r} must be a bool or one of {", ".join(training.BACKBONES)}'
    )
  return sharded


def _variables_of(model, shapes: Mapping[str, jax.ShapeDtypeStruct]):
  """The shapes of a model's variables."""
  if not isinstance(model, nn.Module):
    return nnx.state(model)
  args, kwargs = tasks.inputs(shapes)
  init = functools.partial(model.init, **flags_of(type(model).__call__, False))
  return jax.eval_shape(init, jax.random.key(0), *args, **kwargs)


def _remat_of(model) -> Remat:
  """What a model recomputes in the backward pass, by its own field."""
  remat = getattr(model, 'remat', False)
  if remat in REMATS:
    return remat
  return bool(remat)
