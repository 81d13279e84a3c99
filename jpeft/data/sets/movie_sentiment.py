"""Sentences of movie reviews out of vaderSentiment."""

import tarfile

import numpy as np
import tensorflow_datasets as tfds

from jpeft import archives

from ..source import digest

_VADER = archives.Archive(
  'vaderSentiment',
  '3.3.2',
  'vaderSentiment-3.3.2.tar.gz',
  '5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9',
)


class MovieSentiment(tfds.core.GeneratorBasedBuilder):
  """Sentences of movie reviews, negative or positive, from the source archive of vaderSentiment
  3.3.2.

  The score of a sentence is the mean of human ratings from -4 to 4 (Hutto and Gilbert, VADER: A
  Parsimonious Rule-based Model for Sentiment Analysis of Social Media Text, ICWSM 2014). Of 10,605
  sentences the 10,072 with abs(score) >= 0.5 stay: 7,030 train, those whose MD5 of the id modulo 10
  is below 7, and 3,042 test; in the order of that MD5, as the file is sorted by class.
  """

  VERSION = tfds.core.Version('1.0.0')

  def _info(self) -> tfds.core.DatasetInfo:
    features = {
      'text': tfds.features.Text(),
      'label': tfds.features.ClassLabel(names=['negative', 'positive']),
      'score': tfds.features.Scalar(np.float32),
      'id': tfds.features.Scalar(np.int32),
    }
    return tfds.core.DatasetInfo(
      builder=self,
      features=tfds.features.FeaturesDict(features),
      description=self.__doc__,
      supervised_keys=('text', 'label'),
      disable_shuffling=True,
    )

  def _split_generators(self, dl_manager):
    inner = 'vaderSentiment-3.3.2/additional_resources/hutto_ICWSM_2014.tar.gz'
    with (
      tarfile.open(archives.fetch(_VADER)) as outer,
      tarfile.open(fileobj=outer.extractfile(inner)) as tar,
    ):
      file = tar.extractfile('hutto_ICWSM_2014/movieReviewSnippets_GroundTruth.txt').read().decode()
    rows = [line.split('\t') for line in file.split('\r\n') if line]
    rows = sorted(
      (row for row in rows if abs(float(row[1])) >= 0.5), key=lambda row: digest(row[0])
    )
    return {
      'train': self._generate_examples(row for row in rows if digest(row[0]) % 10 < 7),
      'test': self._generate_examples(row for row in rows if digest(row[0]) % 10 >= 7),
    }

  def _generate_examples(self, rows):
    for key, (name, score, text) in enumerate(rows):
      yield (
        key,
        {'text': text, 'label': int(float(score) > 0), 'score': float(score), 'id': int(name)},
      )
