"""A poem, a tiny GPT-2 over its characters, the Trainer of transformers: as it is, and with SpectralClip(1.0) as a callback.

    python examples/transformers_text.py

Needs `pip install "spectral_hooks[transformers]"`. The text stands in this file; nothing is downloaded, nothing is saved.
Prints one table. Within a minute on one idle core.
"""

import argparse
import math
import time
import warnings
from tempfile import TemporaryDirectory

import torch
import transformers
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainerCallback, TrainingArguments, set_seed
from transformers.pytorch_utils import Conv1D

import spectral_hooks as sh
from spectral_hooks.integrations.transformers import SpectralClip

parser = argparse.ArgumentParser(description="A poem without and with SpectralClip.")
parser.add_argument("--steps", type=int, default=300)
parser.add_argument("--quick", action="store_true", help="a tenth of the steps: not for figures")
args = parser.parse_args()
steps = args.steps // 10 if args.quick else args.steps

MAX_NORM, LENGTH, NOISE = 1.0, 32, 0.5

torch.set_num_threads(1)
transformers.logging.set_verbosity_error()
warnings.filterwarnings("ignore", module=r"torch|transformers|accelerate")

# -- data: Lewis Carroll, "Jabberwocky" and "The Walrus and the Carpenter" (1871), in the public domain ------------------

TEXT = """\
'Twas brillig, and the slithy toves
Did gyre and gimble in the wabe:
All mimsy were the borogoves,
And the mome raths outgrabe.

"Beware the Jabberwock, my son!
The jaws that bite, the claws that catch!
Beware the Jubjub bird, and shun
The frumious Bandersnatch!"

He took his vorpal sword in hand:
Long time the manxome foe he sought,
So rested he by the Tumtum tree,
And stood awhile in thought.

And, as in uffish thought he stood,
The Jabberwock, with eyes of flame,
Came whiffling through the tulgey wood,
And burbled as it came!

One, two! One, two! And through and through
The vorpal blade went snicker-snack!
He left it dead, and with its head
He went galumphing back.

"And hast thou slain the Jabberwock?
Come to my arms, my beamish boy!
O frabjous day! Callooh! Callay!"
He chortled in his joy.

'Twas brillig, and the slithy toves
Did gyre and gimble in the wabe:
All mimsy were the borogoves,
And the mome raths outgrabe.

The sun was shining on the sea,
Shining with all his might:
He did his very best to make
The billows smooth and bright,
And this was odd, because it was
The middle of the night.

The moon was shining sulkily,
Because she thought the sun
Had got no business to be there
After the day was done.
"It's very rude of him," she said,
"To come and spoil the fun!"

The sea was wet as wet could be,
The sands were dry as dry.
You could not see a cloud, because
No cloud was in the sky:
No birds were flying overhead,
There were no birds to fly.

The Walrus and the Carpenter
Were walking close at hand;
They wept like anything to see
Such quantities of sand:
"If this were only cleared away,"
They said, "it would be grand!"

"If seven maids with seven mops
Swept it for half a year,
Do you suppose," the Walrus said,
"That they could get it clear?"
"I doubt it," said the Carpenter,
And shed a bitter tear.

"O Oysters, come and walk with us!"
The Walrus did beseech.
"A pleasant walk, a pleasant talk,
Along the briny beach:
We cannot do with more than four,
To give a hand to each."

The eldest Oyster looked at him,
But never a word he said:
The eldest Oyster winked his eye,
And shook his heavy head,
Meaning to say he did not choose
To leave the oyster-bed.

But four young Oysters hurried up,
All eager for the treat:
Their coats were brushed, their faces washed,
Their shoes were clean and neat,
And this was odd, because, you know,
They hadn't any feet.

Four other Oysters followed them,
And yet another four;
And thick and fast they came at last,
And more, and more, and more,
All hopping through the frothy waves,
And scrambling to the shore.

The Walrus and the Carpenter
Walked on a mile or so,
And then they rested on a rock
Conveniently low:
And all the little Oysters stood
And waited in a row.

"The time has come," the Walrus said,
"To talk of many things:
Of shoes, and ships, and sealing-wax,
Of cabbages, and kings,
And why the sea is boiling hot,
And whether pigs have wings."

"But wait a bit," the Oysters cried,
"Before we have our chat;
For some of us are out of breath,
And all of us are fat!"
"No hurry!" said the Carpenter.
They thanked him much for that.

"A loaf of bread," the Walrus said,
"Is what we chiefly need:
Pepper and vinegar besides
Are very good indeed.
Now if you're ready, Oysters dear,
We can begin to feed."

"But not on us!" the Oysters cried,
Turning a little blue.
"After such kindness, that would be
A dismal thing to do!"
"The night is fine," the Walrus said.
"Do you admire the view?"

"It was so kind of you to come!
And you are very nice!"
The Carpenter said nothing but
"Cut us another slice:
I wish you were not quite so deaf,
I've had to ask you twice!"

"It seems a shame," the Walrus said,
"To play them such a trick,
After we've brought them out so far,
And made them trot so quick!"
The Carpenter said nothing but
"The butter's spread too thick!"

"I weep for you," the Walrus said:
"I deeply sympathize."
With sobs and tears he sorted out
Those of the largest size,
Holding his pocket-handkerchief
Before his streaming eyes.

"O Oysters," said the Carpenter,
"You've had a pleasant run!
Shall we be trotting home again?"
But answer came there none,
And this was scarcely odd, because
They'd eaten every one.
"""

characters = sorted(set(TEXT))
codes = torch.tensor([characters.index(character) for character in TEXT])
split = len(codes) * 4 // 5  # the end of the second poem is for testing
train, test = codes[:split].unfold(0, LENGTH, 3), codes[split:].unfold(0, LENGTH, LENGTH)


# -- what is measured ----------------------------------------------------------------------------------------------------


@torch.no_grad()
def largest_norm(model: nn.Module) -> float:
    """The largest operator norm of all linear layers; GPT-2's are `Conv1D`."""
    layers = [layer for layer in model.modules() if isinstance(layer, (nn.Linear, Conv1D))]
    return max(float(sh.spectral_norm(sh.as_operator(layer))) for layer in layers)


@torch.no_grad()
def bits(model: GPT2LMHeadModel, rows: torch.Tensor, noise: float = 0.0) -> float:
    """Bits per character, with Gaussian noise on the embeddings, relative to their size."""
    embedded = model.transformer.wte(rows)
    generator = torch.Generator().manual_seed(0)
    embedded = embedded + noise * embedded.std() * torch.randn(embedded.shape, generator=generator)
    return float(model(inputs_embeds=embedded, labels=rows).loss) / math.log(2)


# -- train twice: same seed, same everything, but for the callback -------------------------------------------------------

rows = []
runs: dict[str, list[TrainerCallback]] = {"plain": [], f"SpectralClip({MAX_NORM})": [SpectralClip(MAX_NORM)]}
for name, callbacks in runs.items():
    print(name, flush=True)
    set_seed(0)
    config = GPT2Config(
        vocab_size=len(characters), n_positions=LENGTH, n_layer=2, n_head=2, n_embd=32, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    model = GPT2LMHeadModel(config)
    norm_at_start = largest_norm(model)
    with TemporaryDirectory() as folder:
        settings = TrainingArguments(
            folder, max_steps=steps, per_device_train_batch_size=32, learning_rate=6e-3, seed=0, use_cpu=True,
            save_strategy="no", logging_strategy="no", report_to="none", disable_tqdm=True,
        )  # fmt: skip
        trainer = Trainer(
            model, settings, train_dataset=[{"input_ids": row, "labels": row} for row in train], callbacks=callbacks
        )
        trainer.remove_callback(transformers.PrinterCallback)
        began = time.perf_counter()
        trainer.train()
        seconds = time.perf_counter() - began
    model.eval()
    seen, unseen, noisy = bits(model, train), bits(model, test), bits(model, test, NOISE)
    rows.append((name, seen, unseen, noisy, norm_at_start, largest_norm(model), seconds / steps))

# -- one table -----------------------------------------------------------------------------------------------------------

print("""
                     bits per character           largest operator norm   seconds
                     seen   unseen   with noise     at start     at end   per step""")
for name, seen, unseen, noisy, start, end, seconds in rows:
    print(f"{name:<18}{seen:>7.2f}{unseen:>9.2f}{noisy:>13.2f}{start:>13.3f}{end:>11.3f}{seconds:>11.3f}")
