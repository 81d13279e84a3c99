"""Where the arrays of a run are on a mesh of devices."""

import math
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec


def mesh(data: int, model: int) -> Mesh:
  """A mesh of data x model devices.

  Raises:
    ValueError: there are not that many devices.
  """
  devices = jax.devices()
  count = len(devices)
  if data * model > count:
    verb = 'is' if count == 1 else 'are'
    raise ValueError(
      f'mesh.data={data} x mesh.model={model} needs {data * model} devices, there {verb} {count}'
    )
  grid = np.array(devices[: data * model]).reshape(data, model)
  return Mesh(grid, ('data', 'model'))


def with_sharding(tree, sharding) -> Any:
  """The shapes of a tree with a sharding, or with a tree of shardings."""
  if isinstance(sharding, NamedSharding):
    sharding = jax.tree.map(lambda _: sharding, tree)
  return jax.tree.map(
    lambda x, where: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where), tree, sharding
  )


def replicated(mesh: Mesh) -> NamedSharding:
  """The whole array on each device."""
  return NamedSharding(mesh, PartitionSpec())


def over_data(mesh: Mesh) -> NamedSharding:
  """The first axis, that of examples, over the data axis of the mesh."""
  return NamedSharding(mesh, PartitionSpec('data'))


def over_model(mesh: Mesh, tree) -> Any:
  """Shardings of a backbone: of each array the largest axis that the model axis divides."""
  parts = mesh.shape['model']

  def leaf(x):
    spec = [None] * len(x.shape)
    divisible = [i for i, size in enumerate(x.shape) if size % parts == 0]
    if divisible and math.prod(x.shape) > 1:
      largest = max(divisible, key=lambda i: x.shape[i])
      spec[largest] = 'model'
    return NamedSharding(mesh, PartitionSpec(*spec))

  return jax.tree.map(leaf, tree)


def of_backbone(mesh: Mesh, tree, sharded: bool) -> Any:
  """Shardings of a backbone: spread over the model axis, or whole on each device."""
  if sharded:
    return over_model(mesh, tree)
  return replicated(mesh)


def offloads(mesh: Mesh, wanted: bool) -> bool:
  """Whether the optimizer's state goes to host memory: if wanted, and the devices are no CPUs."""
  return wanted and mesh.devices.flat[0].platform != 'cpu'


def state_sharding(mesh: Mesh, state: Mapping[str, Any], offload: bool = False) -> dict:
  """Shardings of a training state, whole on each device.

  With `offload` the optimizer's part is in pinned host memory.
  """
  shardings = dict.fromkeys(state, replicated(mesh))
  if offload:
    shardings['optimizer'] = replicated(mesh).with_memory_kind('pinned_host')
  return {
    name: jax.tree.map(lambda _, where=shardings[name]: where, tree) for name, tree in state.items()
  }
