"""Emoji and their Unicode groups out of emoji-datasource-google."""

import io
import json
import tarfile
from pathlib import Path

import tensorflow_datasets as tfds
from PIL import Image

from jpeft.archives import Archive

from ..source import divided
from .builder import Example, PackagedBuilder, png

Row = dict[str, str]  # of an emoji, in the table of the package
TABLE = 'package/emoji.json'
IMAGES = 'package/img/google/64/'
GROUPS = [
  'Smileys & Emotion',
  'People & Body',
  'Animals & Nature',
  'Food & Drink',
  'Travel & Places',
  'Activities',
  'Objects',
  'Symbols',
  'Flags',
]


class EmojiGroups(PackagedBuilder):
  """Emoji [64, 64, RGBA] and their Unicode group, from npm's emoji-datasource-google 16.0.0.

  The drawings are Noto Emoji (Apache-2.0), the data around them MIT. 1,906 emoji without their skin
  tones, in 9 groups of 85 to 386: 1,324 train, those whose MD5 of the image file modulo 10 is below
  7, and 582 test, in the order of that MD5, so that emoji of one drawing (flags of territories,
  say) are in one split.
  """

  ARCHIVE = Archive(
    'emoji-datasource-google',
    '16.0.0',
    'emoji-datasource-google-16.0.0.tgz',
    'fb5fd131b362aab7a55542d2a147a79708cce0a8b1c1bbacd470172708b5c438',
  )
  FEATURES = {
    'image': tfds.features.Image(shape=(64, 64, 4)),
    'label': tfds.features.ClassLabel(names=GROUPS),
    'name': tfds.features.Text(),
  }
  SUPERVISED = ('image', 'label')

  def examples(self, archive: Path) -> dict[str, list[Example]]:
    splits = {}
    for split, drawn in drawings(archive).items():
      splits[split] = [example(row, Image.open(io.BytesIO(file))) for row, file in drawn]
    return splits


def drawings(archive: Path) -> dict[str, list[tuple[Row, bytes]]]:
  """{split: its emoji in their order}, as a row of the table and the file of a drawing."""
  files = {}
  with tarfile.open(archive) as tar:
    for member in tar:  # in its own order: to go back would unpack it all again
      if member.name == TABLE or member.name.startswith(IMAGES):
        files[member.name] = tar.extractfile(member).read()
  rows = [row for row in json.loads(files[TABLE]) if row['category'] != 'Component']
  rows.sort(key=lambda row: row['short_name'])  # the order of emoji that have one drawing
  drawn = [files[IMAGES + row['image']] for row in rows]
  splits = {}
  for split, order in divided(drawn, tenths=7).items():
    splits[split] = [(rows[i], drawn[i]) for i in order]
  return splits


def example(row: Row, image: Image.Image) -> Example:
  return {'image': png(image.convert('RGBA')), 'label': row['category'], 'name': row['short_name']}
