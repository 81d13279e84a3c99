"""Writing text with a decoder: many prompts at once, greedy or sampled, in one compiled program.

    python -m jpeft.generate --run runs/llm --prompt 'abandon:' 'zebra:'
    python -m jpeft.generate --model smollm2-135m --chat --prompt 'Name 3 colors.' --max_tokens 40
    python -m jpeft.generate --run runs/llm --input prompts.txt --json    # a prompt a line; - reads stdin

--run takes the folder of a complete run, --model what `jpeft.load` takes. --chat gives a prompt as
a message of the user, by the tokenizer's template; a run that was trained on chats by
data.chat=true does so by itself. The completions come in the order of the prompts.
"""

import argparse
import json
import pathlib
import sys

import jax
import numpy as np

from jpeft import cli, models, training
from jpeft.decoding import completions


def main(argv: list[str]) -> int:
  parser = argparse.ArgumentParser('jpeft.generate', description=__doc__.splitlines()[0])
  of = parser.add_mutually_exclusive_group(required=True)
  of.add_argument('--run', type=pathlib.Path, help='folder of a complete run')
  of.add_argument('--model', help='a folder, a packaged name or a hub id, without a run')
  asked = parser.add_mutually_exclusive_group(required=True)
  asked.add_argument('--prompt', nargs='+', help='texts to continue')
  asked.add_argument('--input', help='file of prompts, one a line; - is stdin')
  parser.add_argument('--max_tokens', type=int, default=64, help='tokens written at most')
  parser.add_argument(
    '--temperature', type=float, default=0.0, help='0 for the likeliest token, else draws'
  )
  parser.add_argument(
    '--top_p', type=float, default=1.0, help='draw from the likeliest tokens of this probability'
  )
  parser.add_argument('--seed', type=int, default=0, help='of the draws')
  parser.add_argument('--chat', action='store_true', help='prompts are messages of the user')
  parser.add_argument(
    '--best', action='store_true', help='theta of the best evaluation, not of the end'
  )
  parser.add_argument('--json', action='store_true', help='a JSON object a line')
  flags = parser.parse_args(argv)

  with cli.inputs_checked():
    prompts = flags.prompt or read(flags.input)
    if flags.run:
      chat = training.describe(flags.run)[0].data.chat or flags.chat
      pretrained, model, theta = training.reopen(flags.run, flags.best)
    else:
      pretrained, theta, chat = models.load(flags.model, scan=True), None, flags.chat
      model = pretrained.model
    tokenizer = models.decoder_tokenizer(pretrained)
    if chat:
      prompts = [tokenizer.chat([{'role': 'user', 'content': text}]) for text in prompts]
    ids = [tokenizer.encode(text, begin=not chat) for text in prompts]
    longest, room = max(map(len, ids)), pretrained.config.get('max_position_embeddings', np.inf)
    if longest + flags.max_tokens > room:
      raise ValueError(
        f'the longest prompt has {longest} tokens and --max_tokens is {flags.max_tokens}: together '
        f'more than the {room} that the model was made for'
      )
    found = completions(
      model,
      pretrained.variables,
      ids,
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
      told = {'prompt': prompt, 'completion': text, 'tokens': len(new)}
      print(json.dumps(told) if flags.json else text, flush=True)
  return 0


def read(name: str) -> list[str]:
  """The lines of a file that are not empty; '-' is stdin.

  Raises:
    FileNotFoundError, ValueError: there is no such file, or no line in it.
  """
  if name != '-' and not pathlib.Path(name).is_file():
    raise FileNotFoundError(f'there is no file {name}')
  lines = sys.stdin if name == '-' else pathlib.Path(name).read_text().splitlines()
  found = [line.rstrip('\n') for line in lines if line.strip()]
  if not found:
    raise ValueError(f'there is no prompt in {name}')
  return found


if __name__ == '__main__':
  sys.exit(cli.command('jpeft.generate', main))
