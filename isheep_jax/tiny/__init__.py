"""The tiny world: a small base model, and tasks with answers that can be checked, to try the loop on a laptop.

`world` defines the instructions, their correct responses and the held-out splits; `corpus` and `vocabulary` make the
text that the embedded models in `checkpoint/` and `checkpoint_pages/` were trained on; `prompts/` holds their prompt
templates and seeds. These import only each other. `pretrain` and `pages` are the commands that made the two models;
like all commands they may import any room.
"""

from pathlib import Path

CHECKPOINT = Path(__file__).parent / "checkpoint"
PAGES_CHECKPOINT = Path(__file__).parent / "checkpoint_pages"

# The models that come with the package, by the name that stands for a path. 'tiny_pages' follows the examples in its
# context: it is 'tiny' after reading pages of questions with answers.
EMBEDDED = {"tiny": CHECKPOINT, "tiny_pages": PAGES_CHECKPOINT}
