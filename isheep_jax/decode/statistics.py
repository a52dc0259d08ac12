"""Counts of what the engine did: calls, tokens, occupancy of the slots, padding of the prefill, idle time."""

from dataclasses import dataclass, fields


@dataclass
class Statistics:
    """Sums over all calls of one engine. The difference of two counts what happened in between."""

    slots: int = 0
    """Slots of the last call of `generate` when it began; not a sum."""
    calls: int = 0
    """Calls of the decode program, each of several steps."""
    steps: int = 0
    """Decode steps of all calls."""
    slot_steps: int = 0
    """Slots, busy or idle, summed over the steps."""
    sampled_tokens: int = 0
    """Tokens sampled for requests, end tokens included. What a slot samples after a stop string is not counted."""
    prompt_tokens: int = 0
    """Prompt tokens prefilled for generation and scoring, without shared prefixes and copies of equal prompts."""
    padded_prompt_tokens: int = 0
    """Tokens of the packed rows that were prefilled: prompt tokens and padding."""
    idle_seconds: float = 0.0
    """Time in which the devices waited for the host; an upper bound if calls are dispatched ahead."""
    host_seconds: float = 0.0
    """Time in which the host worked between results of decode calls: tokens, texts, prompts, what takes completions."""
    generate_seconds: float = 0.0
    """All time from the first prompt of a call of `generate` to the last completion."""

    @property
    def occupancy(self) -> float:
        """Share of the slot-steps that sampled a token (0 to 1)."""
        return self.sampled_tokens / max(self.slot_steps, 1)

    @property
    def packing(self) -> float:
        """Share of the prefilled tokens that are not padding (0 to 1)."""
        return self.prompt_tokens / max(self.padded_prompt_tokens, 1)

    def __add__(self, other: "Statistics") -> "Statistics":
        sums = {f.name: getattr(self, f.name) + getattr(other, f.name) for f in fields(self)}
        return Statistics(**sums | {"slots": other.slots})

    def __sub__(self, before: "Statistics") -> "Statistics":
        differences = {f.name: getattr(self, f.name) - getattr(before, f.name) for f in fields(self)}
        return Statistics(**differences | {"slots": self.slots})
