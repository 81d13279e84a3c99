"""What a run does to need less memory, as one value.

A further way to save memory is one field here, read from the configuration in `Memory.of`, and the
one place that acts on it:

| field | acts in |
| --- | --- |
| remat | `build`: the model is made with it |
| saved_bits | `method_of`: the method is chained with `packed` |
| storage | `build`: the kernels are loaded in this format |
| implementation | `build`: of the products with them |
| mlp_tokens | `method_of`: the method is chained with `tiled` |
| offload | `Layout.of_state` and `step.train_step` |
| cached_features | `loop`: parts are replaced by their `feature_cache.cached` |
"""

import dataclasses

from jpeft import methods
from jpeft.models import Remat


@dataclasses.dataclass(frozen=True)
class Memory:
  """The ways of a run to need less memory; the defaults save nothing.

  Attributes:
    remat: which values of a block are recomputed in the backward pass, see `models`.
    saved_bits: bits of a value that the backward pass stores of a block; None for whole values.
    storage: name of the 4-bit format of the backbone's kernels; None for the kernels as loaded.
    implementation: of the products with these, see `quant.quantize`.
    mlp_tokens: tokens of each example that an MLP runs on at a time; None for all.
    offload: whether the optimizer's state is in host memory between updates.
    cached_features: whether what comes before theta runs once an example and not once a step.
  """

  remat: Remat = False
  saved_bits: int | None = None
  storage: str | None = None
  implementation: str = 'auto'
  mlp_tokens: int | None = None
  offload: bool = False
  cached_features: bool = False

  @classmethod
  def of(cls, config) -> 'Memory':
    """What a configuration asks for; where it names no storage, that of its method."""
    storage = config.model.quantize
    entry = methods.REGISTRY.get(config.method.name)  # an unknown method is reported by `method_of`
    if storage is None and entry is not None:
      storage = entry.storage
    return cls(
      remat=config.model.remat,
      saved_bits=config.method.saved_bits,
      storage=storage,
      implementation=config.model.kernels,
      mlp_tokens=config.model.mlp_tokens,
      offload=config.optimizer.offload,
      cached_features=config.data.cache_features,
    )
