"""Emoji and their Unicode groups out of emoji-datasource-google."""

import io
import json
import tarfile

import tensorflow_datasets as tfds
from PIL import Image

from jpeft import archives

from ..source import digest
from .mnist5k import _png

_EMOJI = archives.Archive(
  'emoji-datasource-google',
  '16.0.0',
  'emoji-datasource-google-16.0.0.tgz',
  'fb5fd131b362aab7a55542d2a147a79708cce0a8b1c1bbacd470172708b5c438',
)


class EmojiGroups(tfds.core.GeneratorBasedBuilder):
  """Emoji [64, 64, RGBA] and the Unicode group they belong to, from npm's emoji-datasource-google
  16.0.0.

  The drawings are Noto Emoji (Apache-2.0), the data around them MIT. 1,906 emoji without their skin
  tones, in 9 groups of 85 to 386: 1,324 train, those whose MD5 of the image file modulo 10 is below
  7, and 582 test, in the order of that MD5, so that emoji of one drawing (flags of territories,
  say) are in one split.
  """

  VERSION = tfds.core.Version('1.0.0')

  def _info(self) -> tfds.core.DatasetInfo:
    names = [
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
    features = {
      'image': tfds.features.Image(shape=(64, 64, 4)),
      'label': tfds.features.ClassLabel(names=names),
      'name': tfds.features.Text(),
    }
    return tfds.core.DatasetInfo(
      builder=self,
      features=tfds.features.FeaturesDict(features),
      description=self.__doc__,
      supervised_keys=('image', 'label'),
      disable_shuffling=True,
    )

  def _split_generators(self, dl_manager):
    folder = 'package/img/google/64/'
    with tarfile.open(
      archives.fetch(_EMOJI)
    ) as tar:  # in its own order: to go back unpacks it all again
      files = {
        member.name: tar.extractfile(member).read()
        for member in tar
        if member.name == 'package/emoji.json' or member.name.startswith(folder)
      }
    rows = [
      (row['short_name'], row['category'], files[folder + row['image']])
      for row in json.loads(files['package/emoji.json'])
      if row['category'] != 'Component'
    ]
    part = {name: digest(file) for name, _, file in rows}
    rows.sort(key=lambda row: (part[row[0]], row[0]))
    return {
      'train': self._generate_examples(row for row in rows if part[row[0]] % 10 < 7),
      'test': self._generate_examples(row for row in rows if part[row[0]] % 10 >= 7),
    }

  def _generate_examples(self, rows):
    for key, (name, group, file) in enumerate(rows):
      yield (
        key,
        {'image': _png(Image.open(io.BytesIO(file)).convert('RGBA')), 'label': group, 'name': name},
      )
