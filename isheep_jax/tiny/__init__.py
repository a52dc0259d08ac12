"""The embedded default: a small world with checkable answers, its corpus, its pre-training and its base model."""

from pathlib import Path

CHECKPOINT = Path(__file__).parent / "checkpoint"
