"""TFDS builders of the packaged data sets, by name."""

from .emoji_groups import EmojiGroups
from .mnist5k import Mnist5k
from .movie_sentiment import MovieSentiment
from .phonemes import Phonemes

BUILDERS = {
  'mnist5k': Mnist5k,
  'movie_sentiment': MovieSentiment,
  'emoji_groups': EmojiGroups,
  'phonemes': Phonemes,
}
