"""The studies' tests run on the loop's scripted model."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent / "loop"))
