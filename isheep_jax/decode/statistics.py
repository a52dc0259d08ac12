"""What the engine did, in numbers: how full the slots were, how much of the prefill was padding, what the host cost."""

from dataclasses import dataclass, fields


@dataclass
class Statistics:
    """Counts over all calls of one engine. The difference of two says what happened in between."""

    slots: int = 0
    """Slots of the last call of `generate`, at its beginning; not a sum."""
    chunks: int = 0
    """Decode chunks."""
    steps: int = 0
    """Decode steps of all chunks."""
    slot_steps: int = 0
    """Sum over the steps of the slots, busy or not."""
    drawn: int = 0
    """Tokens drawn: slot-steps of busy slots, less those that only found a stop string."""
    prompt_tokens: int = 0
    """Tokens of prompts computed for generation and scoring, without shared heads and copies of equal prompts."""
    prompt_room: int = 0
    """The same with padding: tokens of the rows that were computed."""
    idle_seconds: float = 0.0
    """Time in which the devices had nothing to do because the host was not ready; an upper bound where a chunk is sent
    ahead."""

    @property
    def occupancy(self) -> float:
        """Share of the slot-steps that drew a token (0 to 1)."""
        return self.drawn / max(self.slot_steps, 1)

    @property
    def packing(self) -> float:
        """Share of the computed prompt tokens that are not padding (0 to 1)."""
        return self.prompt_tokens / max(self.prompt_room, 1)

    def __sub__(self, before: "Statistics") -> "Statistics":
        parts = {f.name: getattr(self, f.name) - getattr(before, f.name) for f in fields(self)}
        return Statistics(**parts | {"slots": self.slots})
