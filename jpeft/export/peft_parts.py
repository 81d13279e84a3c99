"""Tensors of an adapter folder, added to what it says of each matrix."""

from collections.abc import Mapping

import numpy as np

from .peft_config import CONFIG, alpha_of, rank_of, rows_trained, scaled
from .peft_found import Folder
from .peft_kin import KIN, Adapted, Making
from .peft_kind import Kin
from .peft_matrices import Factors
from .peft_names import Arrays, Fold


def add_factor(
  found: Folder, module: str, part: str, x: np.ndarray, config: Mapping, arrays: Arrays
) -> None:
  path, layer = arrays.home(f'{module}.weight', found.where)
  layers = found.factors.setdefault(path, {})
  if layer not in layers:
    rank, alpha = rank_of(config, module), alpha_of(config, module)
    scale = scaled(rank, alpha, bool(config.get('use_rslora')))
    layers[layer] = Factors(module, rank, alpha, scale, {})
  layers[layer].parts[part] = Fold(arrays.places[path][0]).ours(part, x)


def add_kin_part(
  found: Folder, module: str, part: str, x: np.ndarray, config: Mapping, arrays: Arrays
) -> None:
  path, layer = arrays.home(f'{module}.weight', found.where)
  layers = found.kin.setdefault(path, {})
  if layer not in layers:
    shape = arrays.places[path][0].shape
    kin = KIN[config['peft_type']]
    if len(shape) != 2 or path.endswith('/embedding'):
      raise ValueError(
        f'{found.where}: {kin.kind} of {path!r}: kinds other than LoRA are read of linear layers '
        'alone'
      )
    making = Making(kin.kind, tuple(kin.told(config, module).items()))
    layers[layer] = Adapted(module, making, (shape[0], shape[1]), {})
  layers[layer].parts[part] = x


def check_factors(found: Folder, path: str, factors: Factors, config: Mapping) -> None:
  """Raises a ValueError if a part is missing, or the config has another rank."""
  needed = set('abm' if config.get('use_dora') else 'ab')
  missing = needed - factors.parts.keys()
  if missing:
    raise ValueError(f'{found.where}: {path!r} lacks {", ".join(sorted(missing))}')
  rank = factors.parts['a'].shape[-1]
  if rank != factors.rank:
    raise ValueError(
      f'{found.where}: {path!r} is of rank {rank}, and adapter_config.json says {factors.rank}'
    )


def check_base(where, key: str, x: np.ndarray, arrays: Arrays) -> None:
  """Raises a ValueError if a table that is stored beside its factors is not the backbone's."""
  path, layer = arrays.home(key.replace('.base_layer.', '.'), where)
  place, _ = arrays.places[path]
  same = place.leaf.ours(x).shape == place.shape
  base = arrays.layers(path)
  if same and base is not None:
    # It may be stored in bfloat16.
    same = np.allclose(place.leaf.ours(x), base[layer], atol=0.01 * np.abs(base[layer]).max())
  if not same:
    raise ValueError(
      f'{where}: {key!r} is not what this backbone has there (a vocabulary that was resized?): '
      'load the backbone that the adapter was trained on'
    )


def add_start(
  found: Folder, path: str, layer: int, factors: Factors, start: str, arrays: Arrays
) -> None:
  """Adds a0 and b0: what peft took out of a kernel before it trained a and b."""
  place, _ = arrays.places[path]
  if path.endswith('/embedding') or len(place.shape) != 2:
    return  # peft takes the kernels of linear layers apart, and no other
  base = arrays.layers(path)
  if base is None:
    raise ValueError(
      f'{found.where}: init_lora_weights={start!r} needs the kernel {path!r} of the backbone '
      'itself, neither its shape nor its 4-bit codes'
    )
  if not factors.scale > 0:
    raise ValueError(
      f'{found.where}: {path!r} has alpha={factors.alpha}, and {start} no start of such a scale'
    )
  w = np.asarray(base[layer], np.float32)
  if start == 'pissa':
    u, s, vt = np.linalg.svd(w, full_matrices=False)
    root = np.sqrt(s[: factors.rank] / factors.scale)
    a, b = u[:, : factors.rank] * root, root[:, None] * vt[: factors.rank]
  else:  # OLoRA: of the transpose, w.T = q r
    q, r = np.linalg.qr(w.T)
    a, b = r[: factors.rank].T, q[:, : factors.rank].T
  factors.parts |= {'a0': a, 'b0': b}


def add_bias(found: Folder, path: str, layer: int, factors: Factors, arrays: Arrays) -> None:
  """Adds what is added to the output of a layer to the layer's own bias."""
  added = factors.scale * factors.parts.pop('bias')
  bias = f'{path.rpartition("/")[0]}/bias'
  if bias not in arrays.places:
    raise ValueError(f'{found.where}: lora_bias adds to {path!r}, whose layer has no bias here')
  own = found.whole.setdefault(bias, {})
  if layer not in own:
    base = arrays.layers(bias)
    if base is None:
      raise ValueError(f'{found.where}: lora_bias needs {bias!r} of the backbone, not its shape')
    own[layer] = base[layer]
  own[layer] = own[layer] + added


def add_pair(found: Folder, config: Mapping, arrays: Arrays) -> None:
  """Adds to the vectors of each matrix what it has of the shared pair."""
  if not found.vectors:
    return
  if found.pair.keys() != {'a', 'b'}:
    raise ValueError(
      f'{found.where} lacks the projections vera_A and vera_B, which torch alone can draw again: '
      'have peft save them (save_projection=True)'
    )
  a, b = found.pair['a'], found.pair['b']
  for path, layers in found.vectors.items():
    for vectors in layers.values():
      missing = {'d', 'e'} - vectors.parts.keys()
      if missing:
        raise ValueError(f'{found.where}: {path!r} lacks {", ".join(sorted(missing))}')
      if a.shape[1] != config['r'] or len(vectors.parts['d']) != config['r']:
        raise ValueError(f'{found.where}: {path!r} is not of the rank {config["r"]} of {CONFIG}')
      fan_in, fan_out = arrays.places[path][0].shape
      vectors.parts |= {'a': a[:fan_in], 'b': b[:, :fan_out]}


def add_shared(found: Folder, kin: Kin | None) -> None:
  """Gives each kernel of a kind what all of them share.

  Raises:
    ValueError: it is not in the folder.
  """
  if kin is None or kin.shared is None or not found.kin:
    return
  missing = [name for part, name in kin.shared.tensors.items() if part not in found.shared]
  if missing:
    raise ValueError(
      f'{found.where} lacks {" and ".join(missing)}, which all kernels of {kin.kind} share: have '
      'peft save it (save_projection=True, where there is this choice)'
    )
  for layers in found.kin.values():
    for adapted in layers.values():
      adapted.shared = found.shared


def add_tokens(
  found: Folder, tokens: Mapping[str, np.ndarray], config: Mapping, arrays: Arrays
) -> None:
  """Adds tables some rows of which were trained, as wholes."""
  named = config.get('token_indices') or config.get('trainable_token_indices')
  if named and not tokens:
    raise ValueError(f'{found.where} lacks the rows of tables that {CONFIG} names: {named}')
  own = {module: x for module, x in tokens.items() if module not in arrays.copies}
  for module, x in own.items():
    path, layer = arrays.home(f'{module}.weight', found.where)
    rows = list(rows_trained(config, module))
    base = arrays.layers(path)
    if len(rows) != len(x):
      raise ValueError(
        f'{found.where} has {len(x)} rows for {module!r}, and {CONFIG} names {len(rows)}'
      )
    if base is None:
      raise ValueError(
        f'{found.where}: rows of {module!r} go into those of the backbone, which has only the '
        'shape of it'
      )
    if path in found.factors or path in found.whole:
      raise ValueError(
        f'{found.where}: {module!r} is trained both whole, or by factors, and by rows'
      )
    leaf = arrays.places[path][0].leaf
    new = np.array(leaf.theirs(base[layer]), np.float32)
    new[rows] = x
    found.whole[path] = {layer: leaf.ours(new)}
  for module in tokens.keys() - own.keys():
    if not any(np.array_equal(tokens[module], x) for x in own.values()):
      raise ValueError(
        f'{found.where}: {module!r} is the word table of this backbone, and its rows change alone: '
        'train them in the table itself'
      )
