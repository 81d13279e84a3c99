"""Writing text with a decoder: many prompts at once, greedy or sampled, in one compiled program.

    python -m jpeft.generate --run runs/llm --prompt 'abandon:' 'zebra:'
    python -m jpeft.generate --model smollm2-135m --chat --prompt 'Name 3 colors.' --max_tokens 40
    python -m jpeft.generate --run runs/llm --input prompts.txt --json

--run takes the folder of a complete run, --model what `jpeft.load` takes. --input has a prompt a
line; - reads stdin. --chat gives a prompt as a message of the user, by the tokenizer's template; a
run that was trained on chats by data.chat=true does so by itself. The completions come in the order
of the prompts.
"""

import argparse
import json
import pathlib
import sys

import jax

from jpeft import cli, decoding, models, training

# Their old place, for one release.
from jpeft.decoding import completions, generate, pad_left  # noqa: F401


def main(argv: list[str]) -> int:
  flags = _parser().parse_args(argv)
  with cli.inputs_checked():
    prompts = flags.prompt or read(flags.input)
    chat = flags.chat
    if flags.run:
      config, _ = training.describe(flags.run)
      chat = config.data.chat or chat
      pretrained, model, theta = training.reopen(flags.run, flags.best)
    else:
      pretrained = models.load(flags.model, scan=True)
      model = pretrained.model
      theta = None
    tokenizer = models.decoder_tokenizer(pretrained)
    if chat:
      prompts = [tokenizer.chat([{'role': 'user', 'content': text}]) for text in prompts]
    tokens = [tokenizer.encode(text, begin=not chat) for text in prompts]
    _check_room(tokens, flags.max_tokens, pretrained.config)
    found = decoding.completions(
      model,
      pretrained.variables,
      tokens,
      new_tokens=flags.max_tokens,
      theta=theta,
      temperature=flags.temperature,
      top_p=flags.top_p,
      stop=(tokenizer.eos,),
      pad=tokenizer.pad,
      key=jax.random.key(flags.seed),
    )
    for prompt, new in zip(prompts, found, strict=True):
      text = tokenizer.decode(new)
      if flags.json:
        text = json.dumps({'prompt': prompt, 'completion': text, 'tokens': len(new)})
      print(text, flush=True)
  return 0


def _parser() -> argparse.ArgumentParser:
  parser = cli.parser('jpeft.generate', __doc__)
  source = parser.add_mutually_exclusive_group(required=True)
  source.add_argument('--run', type=pathlib.Path, help='folder of a complete run')
  source.add_argument('--model', help='a folder, a packaged name or a hub id, without a run')
  prompts = parser.add_mutually_exclusive_group(required=True)
  prompts.add_argument('--prompt', nargs='+', help='texts to continue')
  prompts.add_argument('--input', help='file of prompts, one a line; - is stdin')
  parser.add_argument('--max_tokens', type=int, default=64, help='tokens written at most')
  parser.add_argument(
    '--temperature', type=float, default=0.0, help='0 for the likeliest token, else draws'
  )
  parser.add_argument(
    '--top_p', type=float, default=1.0, help='draw from the likeliest tokens of this probability'
  )
  parser.add_argument('--seed', type=int, default=0, help='of the draws')
  parser.add_argument('--chat', action='store_true', help='prompts are messages of the user')
  cli.add_best(parser)
  parser.add_argument('--json', action='store_true', help='a JSON object a line')
  return parser


def read(name: str) -> list[str]:
  """The prompts in a file, one a line; '-' is stdin.

  Raises:
    FileNotFoundError, ValueError: there is no such file, or no line in it.
  """
  prompts = cli.lines(name)
  if not prompts:
    raise ValueError(f'there is no prompt in {name}')
  return prompts


def _check_room(tokens: list[list[int]], max_tokens: int, config: dict) -> None:
  """Raises a ValueError if prompts and completions may be longer than the model was made for."""
  longest = max(map(len, tokens))
  room = config.get('max_position_embeddings')
  if room is not None and longest + max_tokens > room:
    raise ValueError(
      f'the longest prompt has {longest} tokens and --max_tokens is {max_tokens}: together '
      f'more than the {room} that the model was made for'
    )


if __name__ == '__main__':
  sys.exit(cli.command('jpeft.generate', main))
