"""The methods of jpeft in the adapter folders of Hugging Face's peft, where both have them.

Such a folder has adapter_config.json and adapter_model.safetensors. peft names an array by a module
of the base model, and keeps the factors of a matrix [out, in] transposed: `lora_A` [r, in] and
`lora_B` [out, r], where jpeft has a [in, r] and b [r, out].

What is read and what is written is compared with the rules: for every matrix, what peft computes by
the config of the folder is what the rule makes of it. Where rules do other things than that
(prompts, prefixes, rules without theta), the model is run with the method and with the folder.
"""

import json
import pathlib
from collections.abc import Mapping

import numpy as np

from jpeft.core import Method, Tuned
from jpeft.models import Pretrained, read_tensors, write_tensors
from jpeft.writing import filled, write

from .bottlenecks import is_of_adapters, load_bottlenecks, save_bottlenecks
from .peft_config import CONFIG, read_config
from .peft_fields import adapter_config
from .peft_folder import FILE, base_of, read_folder
from .peft_names import NEW, Arrays
from .peft_rules import as_rules
from .peft_writing import as_stored_in, content_of
from .peft_written import check_run, check_written

PEFT, ADAPTERS = LAYOUTS = ('peft', 'adapters')


def save_adapter(
  folder: str | pathlib.Path,
  pretrained: Pretrained,
  theta: Mapping,
  alpha: float | None = None,
  rslora: bool = False,
  base: str | None = None,
  tuned: Tuned | None = None,
  names: str = NEW,
  layout: str = PEFT,
) -> None:
  """Writes theta as peft does: of one method, and of modules trained whole beside it.

  The method is LoRA, DoRA, VeRA, (IA)^3, prompt tuning, prefix tuning of a decoder, or one of
  `peft_kin`, such as LoHa. Norms that are trained without any of them are written as peft's
  LN_TUNING, and rows of a table as TRAINABLE_TOKENS. VeRA of kernels of several shapes, each
  around a random pair of its own, is written as VeRA of as many times the rank around one.

  Rules at different sites may differ in rank and scale: the folder says so in rank_pattern and
  alpha_pattern. A start that takes the matrix apart (PiSSA, OLoRA) is written as LoRA of twice the
  rank: the base model holds the whole matrix. A table that is the head as well is written with
  ensure_weight_tying.

  Args:
    folder: where to; made if needed.
    pretrained: the backbone that theta was trained on.
    theta: {rule: {site path: arrays}}.
    alpha: of a method with one rule; left out it is asked of the rules of `tuned`.
    rslora: of the method: the config then gives scales as alpha / sqrt(rank).
    base: name or path of the base model, for whoever opens the folder.
    tuned: the method on the backbone. Needed unless theta is of one rule that acts in all layers,
      whose alpha is given.
    layout: 'peft'; or 'adapters' for houlsby, pfeiffer, parallel and adaptformer as the `adapters`
      library writes them, with the head if it was trained.
    names: of the modules: 'transformers>=5' as transformers from 5 on calls them in memory,
      'transformers<5' as files do. They differ for ViTs of any kind, and for towers of images
      without a head (`CLIPVisionModel`).

  Raises:
    ValueError: theta holds what such folders cannot.
  """
  if layout not in LAYOUTS:
    raise ValueError(f'layout={layout!r} is none of {", ".join(map(repr, LAYOUTS))}')
  if layout == ADAPTERS:
    if alpha is not None or rslora:
      raise ValueError("save_adapter: alpha and rslora are of LoRA, not of layout='adapters'")
    save_bottlenecks(pathlib.Path(folder), pretrained, theta, tuned, base)
    return
  arrays = Arrays(pretrained, names)
  trained = theta
  if tuned is not None:
    theta = tuned.expand(theta)
  folder = pathlib.Path(folder)
  kept = theta if tuned is None else as_stored_in(trained, theta, tuned)
  content = content_of(folder / FILE, arrays, kept, alpha, rslora, tuned)
  config = adapter_config(content, arrays, rslora, base)
  start = base_of(config)
  tensors = {start + key: x for key, x in content.tensors.items()} | content.shared
  tensors = {name: np.asarray(x, np.float32) for name, x in tensors.items()}
  written = read_folder(folder / FILE, config, tensors, arrays)
  if tuned is not None:
    check_written(written, arrays, theta, tuned)
    check_run(written, config, arrays, theta, tuned, trained)
  with filled(folder) as part:
    write_tensors(part / FILE, tensors)
    write(part / CONFIG, json.dumps(config, indent=2) + '\n')


def load_adapter(
  folder: str | pathlib.Path, pretrained: Pretrained, name: str | None = None
) -> tuple[Method, dict]:
  """(method, theta) of an adapter folder: LoRA, DoRA, (IA)^3, VeRA, prompts, a prefix, modules.

  Further kinds, such as LoHa, OFT and AdaLoRA, are read of linear layers alone.

  Layers of a scanned stack share a rule: where the folder has other ranks or alphas in some of
  them, factors are padded by zeros and b is scaled.

  Args:
    folder: as peft, `save_adapter` or the `adapters` library writes it; of the latter bottleneck
      adapters and the head.
    pretrained: the backbone to put it on. Of PiSSA, OLoRA, lora_bias and trained rows of a
      table its weights are read.
    name: of the adapter in theta; another for each of several that are chained. Left out it is
      'lora', 'ia3', 'vera', 'loha' and so on, 'prefix' or 'prompt_tuning', and modules saved whole
      are 'modules'.

  Returns:
    The method to `attach` to `pretrained.model`, and its theta in float32.

  Raises:
    FileNotFoundError: a file is missing.
    ValueError: the adapter is of another kind, damaged, or not of this backbone.
  """
  folder = pathlib.Path(folder)
  if is_of_adapters(folder):
    return load_bottlenecks(folder, pretrained, name)
  config = read_config(folder)
  arrays = Arrays(pretrained)
  found = read_folder(folder / FILE, config, read_tensors(folder / FILE), arrays)
  return as_rules(found, config, arrays, name)
