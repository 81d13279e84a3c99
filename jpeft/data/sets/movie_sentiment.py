"""Sentences of movie reviews out of vaderSentiment."""

import tarfile
from pathlib import Path

import numpy as np
import tensorflow_datasets as tfds

from jpeft.archives import Archive

from ..source import divided
from .builder import Example, PackagedBuilder

INNER = 'vaderSentiment-3.3.2/additional_resources/hutto_ICWSM_2014.tar.gz'
RATINGS = 'hutto_ICWSM_2014/movieReviewSnippets_GroundTruth.txt'


class MovieSentiment(PackagedBuilder):
  """Sentences of movie reviews, negative or positive, from the source archive of vaderSentiment.

  Version 3.3.2. The score of a sentence is the mean of human ratings from -4 to 4 (Hutto and
  Gilbert, VADER: A Parsimonious Rule-based Model for Sentiment Analysis of Social Media Text, ICWSM
  2014). Of 10,605 sentences the 10,072 with abs(score) >= 0.5 stay: 7,030 train, those whose MD5 of
  the id modulo 10 is below 7, and 3,042 test; in the order of that MD5, as the file is sorted by
  class.
  """

  ARCHIVE = Archive(
    'vaderSentiment',
    '3.3.2',
    'vaderSentiment-3.3.2.tar.gz',
    '5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9',
  )
  FEATURES = {
    'text': tfds.features.Text(),
    'label': tfds.features.ClassLabel(names=['negative', 'positive']),
    'score': tfds.features.Scalar(np.float32),
    'id': tfds.features.Scalar(np.int32),
  }
  SUPERVISED = ('text', 'label')

  def examples(self, archive: Path) -> dict[str, list[Example]]:
    with (
      tarfile.open(archive) as outer,
      tarfile.open(fileobj=outer.extractfile(INNER)) as inner,
    ):
      file = inner.extractfile(RATINGS).read().decode()
    rows = []  # (id, score, sentence)
    for line in file.split('\r\n'):
      if line:
        number, score, text = line.split('\t')
        if abs(float(score)) >= 0.5:
          rows.append((number, float(score), text))
    splits = divided([number for number, _, _ in rows], tenths=7)
    return {split: [_example(*rows[i]) for i in order] for split, order in splits.items()}


def _example(number: str, score: float, text: str) -> Example:
  return {'text': text, 'label': int(score > 0), 'score': score, 'id': int(number)}
