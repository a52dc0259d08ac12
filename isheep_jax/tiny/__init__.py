"""The embedded default: a small world with checkable answers, its corpus, its pre-training and its base model."""

from pathlib import Path

CHECKPOINT = Path(__file__).parent / "checkpoint"
# The same, after reading pages of questions with answers: it takes its manners from examples.
PAGES_CHECKPOINT = Path(__file__).parent / "checkpoint_pages"
