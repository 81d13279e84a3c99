"""Emoji as three-dimensional drawings out of fluent-emoji-3d, for what was learned of flat ones."""

import io
import tarfile
from pathlib import Path

import tensorflow_datasets as tfds
from PIL import Image

from jpeft import archives

from .builder import Example, PackagedBuilder
from .emoji_groups import GROUPS, EmojiGroups, drawings, example

IMAGES = 'package/assets/'
SIDE = 128  # pixels


class Emoji3D(PackagedBuilder):
  """Emoji [128, 128, RGBA] and their Unicode group, from npm's @lobehub/fluent-emoji-3d 1.1.0.

  The drawings are Microsoft's Fluent Emoji, rendered from solids (MIT), made smaller; groups and
  names are those of `emoji_groups`, whose archive is read too. 1,852 emoji without their skin
  tones, in 9 groups. Each is in the split that it has in `emoji_groups`, so that a model of one
  set's training split can be tested on the other's test split.
  """

  ARCHIVE = archives.Archive(
    '@lobehub/fluent-emoji-3d',
    '1.1.0',
    'lobehub-fluent-emoji-3d-1.1.0.tgz',
    'c1bb7eee7de090205a232518a9ab4adb3df458bfbe8a1f78232991194c8b2e58',
  )
  FEATURES = {
    'image': tfds.features.Image(shape=(SIDE, SIDE, 4)),
    'label': tfds.features.ClassLabel(names=GROUPS),
    'name': tfds.features.Text(),
  }
  SUPERVISED = ('image', 'label')

  def examples(self, archive: Path) -> dict[str, list[Example]]:
    files = {}
    with tarfile.open(archive) as tar:
      for member in tar:
        if member.name.startswith(IMAGES):
          files[Path(member.name).stem] = tar.extractfile(member).read()
    splits = {}
    for split, drawn in drawings(archives.fetch(EmojiGroups.ARCHIVE)).items():
      named = [(row, row['unified'].lower()) for row, _ in drawn]
      splits[split] = [example(row, _small(files[code])) for row, code in named if code in files]
    return splits


def _small(file: bytes) -> Image.Image:
  image = Image.open(io.BytesIO(file)).convert('RGBA')
  return image.resize((SIDE, SIDE), Image.Resampling.LANCZOS)
