"""Accelerators to compile for, none of which need be there.

TPUs are described by topology, GPUs by a text of facts that XLA compiles by.
"""

import contextlib
import dataclasses
import importlib.util
import os
import re
from collections.abc import Mapping
from typing import Any

import jax
from jax.experimental import topologies
from jax.sharding import Mesh

from jpeft import training
from jpeft.messages import did_you_mean

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Tpu:
  """A generation of TPUs.

  Attributes:
    topology: the smallest one that libtpu describes.
    memory: GiB of one chip that programs can use.
    kind: of its devices, as JAX names them.
  """

  topology: str
  memory: float
  kind: str


@dataclasses.dataclass(frozen=True)
class Gpu:
  """Facts of a GPU that XLA compiles by.

  Attributes:
    title: as its driver names it.
    capability: of CUDA.
    cores: multiprocessors.
    fpus: floating-point units of a multiprocessor.
    shared: bytes of shared memory of a multiprocessor; a block may ask for 1 KiB less.
    bandwidth: of its memory, bytes a second.
    l2: bytes of its cache.
    clock: GHz.
    memory: GiB.
  """

  title: str
  capability: tuple[int, int]
  cores: int
  fpus: int
  shared: int
  bandwidth: int
  l2: int
  clock: float
  memory: float


TPUS = {
  'v5e': Tpu('2x2', 15.75, 'TPU v5 lite'),
  'v5p': Tpu('2x2x1', 95.74, 'TPU v5'),
  'v6e': Tpu('2x2', 31.25, 'TPU v6 lite'),
}
GPUS = {
  'a100': Gpu(
    'NVIDIA A100-SXM4-40GB', (8, 0), 108, 64, 167936, 1555 * 10**9, 40 * 2**20, 1.41, 39.4
  ),
  'h100': Gpu(
    'NVIDIA H100 80GB HBM3', (9, 0), 132, 128, 233472, 3352 * 10**9, 50 * 2**20, 1.98, 79.1
  ),
}


@dataclasses.dataclass(frozen=True)
class Target:
  """What a program is compiled for.

  Attributes:
    name: such as 'tpu:v5e' or 'tpu:v5p:4x4x4'.
    devices: as the compiler describes them.
    memory: bytes of one device; None if there is no limit to speak of.
    options: of the compiler.
    why: why it was taken, if nobody named it.
  """

  name: str
  devices: tuple[Any, ...]
  memory: int | None
  options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
  why: str = ''

  def mesh(self, data: int = 1, model: int = 1, sequence: int = 1) -> Mesh:
    """A mesh of data x sequence x model devices.

    Raises:
      ValueError: the target has fewer.
    """
    needed = data * model * sequence
    if needed > len(self.devices):
      raise ValueError(
        f'{training.named(data, model, sequence)} needs {needed} chips, and {self.name} has '
        f'{len(self.devices)}: name a larger topology, such as tpu:v5p:4x4x4'
      )
    return training.mesh_of(self.devices, data, model, sequence)


def target(name: str | None = None) -> Target:
  """A target by name: 'tpu:v5e', 'tpu:v5p:4x4x4', 'gpu:h100' or 'cpu'.

  Without a name it is the TPU that JAX runs on, else 'tpu:v5e' where the compiler of TPUs is
  installed, else 'cpu'; `why` says which of these.

  Raises:
    ValueError: an unknown name or topology.
    ImportError: the compiler of the platform is not installed; says the command that installs it.
  """
  if name is None:
    name, why = _chosen()
    return dataclasses.replace(target(name), why=why)
  match = re.fullmatch(r'(?:(tpu):(\w+)(?::(\d+(?:x\d+)*))?|(gpu):(\w+)|(cpu))', name)
  if match:
    tpu, shape, gpu, cpu = match[2], match[3], match[5], match[6]
    if tpu in TPUS:
      return _tpu(name, tpu, shape)
    if gpu in GPUS:
      return _gpu(name, GPUS[gpu])
    if cpu:
      return Target(name, tuple(jax.devices('cpu')), None)
  kinds = [*(f'tpu:{kind}' for kind in TPUS), *(f'gpu:{kind}' for kind in GPUS), 'cpu']
  raise ValueError(
    f'no target is called {name!r}{did_you_mean(name, kinds)} There are: {", ".join(kinds)}, '
    'and TPU topologies such as tpu:v5p:4x4x4'
  )


def _chosen() -> tuple[str, str]:
  """(the target where none is named, why it is that one)."""
  here = jax.devices()[0].device_kind
  for name, tpu in TPUS.items():
    if tpu.kind == here:
      return f'tpu:{name}', f'no target was named, and JAX runs on a {here}'
  if _has_libtpu():
    return 'tpu:v5e', 'no target was named, and libtpu, the TPU compiler, is installed'
  way = "with pip install 'jpeft[plan]' it is tpu:v5e, and no TPU is needed"
  if _has_cuda():
    gpus = ' and '.join(f'gpu:{kind}' for kind in GPUS)
    way += f'; the CUDA plugin that is installed compiles for {gpus}'
  return 'cpu', f'no target was named, and libtpu, the TPU compiler, is not installed: {way}'


def _has_libtpu() -> bool:
  return importlib.util.find_spec('libtpu') is not None


def _has_cuda() -> bool:
  return any(importlib.util.find_spec(f'jax_cuda{version}_plugin') for version in (12, 13))


def leave_accelerators() -> None:
  """Runs this process on the CPU, so that an accelerator that is there stays free for others.

  Not if the user chose a platform (JAX_PLATFORMS).
  """
  if jax.config.jax_platforms is None:
    jax.config.update('jax_platforms', 'cpu')


def _tpu(name: str, kind: str, shape: str | None) -> Target:
  """One chip of a generation, or all chips of a topology."""
  if not _has_libtpu():
    raise ImportError(
      f'compiling for {name} needs libtpu, the TPU compiler (no TPU is needed): '
      "pip install 'jpeft[plan]'"
    )
  tpu = TPUS[kind]
  topology = f'{kind}:{shape or tpu.topology}'
  with _described():
    try:
      devices = topologies.get_topology_desc(platform='tpu', topology_name=topology).devices
    except Exception as error:  # of libtpu, whose types differ by version
      if shape is None or 'INVALID_ARGUMENT' not in str(error):
        raise
      raise ValueError(
        f'libtpu knows no topology {shape} of {kind}: {str(error).splitlines()[0]}'
      ) from error
  if shape is None:
    devices = devices[:1]
  return Target(name, tuple(devices), int(tpu.memory * GIB))


@contextlib.contextmanager
def _described():
  """The environment in which libtpu describes topologies on a machine without a TPU.

  Without it libtpu asks a metadata server for the machine's own TPU, and lets one process at a time
  load it.
  """
  wanted = {}
  if jax.default_backend() != 'tpu':
    wanted = {
      'TPU_SKIP_MDS_QUERY': '1',
      'TPU_ACCELERATOR_TYPE': 'v5litepod-4',
      'TPU_WORKER_HOSTNAMES': 'localhost',
      'ALLOW_MULTIPLE_LIBTPU_LOAD': '1',
    }
  added = {key: value for key, value in wanted.items() if key not in os.environ}
  os.environ.update(added)
  try:
    yield
  finally:
    for key in added:
      del os.environ[key]


def _gpu(name: str, gpu: Gpu) -> Target:
  if not _has_cuda():
    raise ImportError(
      f'compiling for {name} needs the CUDA plugin (no GPU is needed): pip install --no-deps '
      f'jax-cuda13-plugin=={jax.__version__} jax-cuda13-pjrt=={jax.__version__}'
    )
  devices = topologies.get_topology_desc(
    platform='cuda', target_config=_description(gpu), topology='1x1x1'
  ).devices
  # Without a GPU XLA cannot time kernels, and the tiles that it guesses instead do not fit all
  # shapes.
  untimed = {'xla_gpu_autotune_level': 0, 'xla_gpu_enable_triton_gemm': False}
  return Target(name, (devices[0],), int(gpu.memory * GIB), untimed)


def _description(gpu: Gpu) -> str:
  """A GpuTargetConfigProto as text."""
  major, minor = gpu.capability
  feature = 'ACCELERATED_FEATURES' if major >= 9 else 'NONE'
  facts = {
    'threads_per_block_limit': 1024,
    'threads_per_warp': 32,
    'shared_memory_per_block': 49152,
    'shared_memory_per_core': gpu.shared,
    'shared_memory_per_block_optin': gpu.shared - 1024,
    'threads_per_core_limit': 2048,
    'core_count': gpu.cores,
    'fpus_per_core': gpu.fpus,
    'block_dim_limit_x': 2**31 - 1,
    'block_dim_limit_y': 65535,
    'block_dim_limit_z': 65535,
    'thread_dim_limit_x': 1024,
    'thread_dim_limit_y': 1024,
    'thread_dim_limit_z': 64,
    'registers_per_core_limit': 65536,
    'registers_per_block_limit': 65536,
    'memory_bandwidth': gpu.bandwidth,
    'l2_cache_size': gpu.l2,
    'clock_rate_ghz': gpu.clock,
    'device_memory_size': int(gpu.memory * GIB),
    'device_address_bits': 64,
    'name': f'"{gpu.title}"',
    'device_vendor': '"NVIDIA Corporation"',
    'platform_version': f'"Compute Capability {major}.{minor}"',
    'driver_version': '"13.0.0"',
    'runtime_version': '"13.0.0"',
    'compile_time_toolkit_version': '"13.0.0"',
    'dnn_version': '"9.12.0"',
  }
  lines = ' '.join(f'{key}: {value}' for key, value in facts.items())
  return (
    f'gpu_device_info {{ {lines} cuda_compute_capability {{ major: {major} minor: {minor} '
    f'feature_extension: {feature} }} }} platform_name: "CUDA" '
    f'dnn_version_info {{ major: 9 minor: 12 patch: 0 }} device_description_str: "{gpu.title}"'
  )
