"""Where the arrays of a run lie on a mesh of devices."""

import math
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec


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
    raise ValueError(
      f'mesh.data={data} x mesh.model={model} needs {data * model} devices, there '
      f'{"is" if len(devices) == 1 else "are"} {len(devices)}'
    )
  return Mesh(np.array(devices[: data * model]).reshape(data, model), ('data', 'model'))


def replicated(mesh: Mesh) -> NamedSharding:
  return NamedSharding(mesh, PartitionSpec())


def offloads(mesh: Mesh, asked: bool) -> bool:
  """Whether the optimizer's state goes to host memory: where that is asked for, and the devices are
  no CPUs.
  """
  return asked and mesh.devices.flat[0].platform != 'cpu'


def of_state(mesh: Mesh, state: Mapping[str, Any], offload: bool = False) -> dict:
  """Shardings of a training state, whole on each device; the optimizer's part in pinned host memory
  if `offload`.
  """
  whole = replicated(mesh)
  places = {'optimizer': whole.with_memory_kind('pinned_host')} if offload else {}
  return {
    name: jax.tree.map(lambda _: places.get(name, whole), tree) for name, tree in state.items()
  }


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
