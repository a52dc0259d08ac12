"""The host's table of slots: the prompt and the new tokens of each, and what the next call changes on the devices."""

from collections.abc import Sequence

import numpy as np

from isheep_jax.decode.device_slots import (
    CACHE_POSITION,
    CHANGED,
    KEY,
    LAST_TOKEN,
    NOT_NUMBERS,
    REMAINING,
    UPDATE_COLUMNS,
)
from isheep_jax.decode.tokenization import TokenizedPrompt


class SlotTable:
    """One row for each slot, in several columns that always change together.

    owner: the prompt that is being decoded; None: the slot is idle.
    tenant: [B] int64, which of all admitted prompts that is, from 1; 0: the slot is idle.
    prompt: [B] int64, tokens of the last prompt after the shared prefix.
    remaining: [B] int64, tokens that may still be sampled.
    tokens: [B, S] int32, the new tokens so far.
    logprobs: [B, S] float32, their log-probabilities; [B, 0] unless the sampling parameters ask for them.
    count: [B] int64, how many there are.
    updates: [B, 6] int32, updates of the slots' control for the next call, see `device_slots`.
    """

    def __init__(self, slots: int, cache_length: int, *, logprobs: bool):
        self.owner: list[TokenizedPrompt | None] = [None] * slots
        self.tenant = np.zeros(slots, np.int64)
        self.prompt = np.zeros(slots, np.int64)
        self.remaining = np.zeros(slots, np.int64)
        self.tokens = np.zeros((slots, cache_length), np.int32)
        self.logprobs = np.zeros((slots, cache_length if logprobs else 0), np.float32)
        self.count = np.zeros(slots, np.int64)
        self.updates = np.zeros((slots, UPDATE_COLUMNS), np.int32)
        self._admitted = 0

    def __len__(self) -> int:
        return len(self.owner)

    @property
    def busy(self) -> list[int]:
        """Slots that decode a prompt, ascending."""
        return np.flatnonzero(self.tenant).tolist()

    @property
    def idle(self) -> list[int]:
        """Slots that decode nothing, ascending."""
        return np.flatnonzero(self.tenant == 0).tolist()

    def longest(self, steps: int) -> int:
        """Returns the most cache positions that a busy slot has filled after so many further steps."""
        filled = self.prompt + self.count + np.minimum(self.remaining, steps)
        return int(filled[self.tenant > 0].max())

    def admit(self, slot: int, prompt: TokenizedPrompt, max_new_tokens: int) -> None:
        """Gives an idle slot to a prompt."""
        self._admitted += 1
        self.owner[slot], self.tenant[slot], self.prompt[slot] = prompt, self._admitted, len(prompt.suffix)
        self.count[slot] = 0
        self.remaining[slot] = max_new_tokens
        update = self.updates[slot]
        update[LAST_TOKEN] = prompt.suffix[-1]
        update[CACHE_POSITION] = len(prompt.suffix) - 1
        update[REMAINING] = max_new_tokens
        update[KEY] = prompt.key.view(np.int32)
        update[CHANGED] = 1

    def release(self, slot: int) -> None:
        """Makes a slot idle, also on the devices if they would go on with its sequence."""
        if self.remaining[slot]:
            self.updates[slot] = 0
            self.updates[slot, CHANGED] = 1
        self.owner[slot], self.tenant[slot] = None, 0

    def take_updates(self) -> np.ndarray:
        """Returns the updates of the next call and starts new ones, in a new array: the devices may read the old."""
        updates, self.updates = self.updates, np.zeros_like(self.updates)
        return updates

    def keep(self, slots: np.ndarray) -> None:
        """Drops all other slots; the given ones are renumbered from 0 in their order."""
        self.owner = [self.owner[slot] for slot in slots]
        for column in ("tenant", "prompt", "remaining", "tokens", "logprobs", "count", "updates"):
            setattr(self, column, getattr(self, column)[slots])

    def append(
        self, outputs: np.ndarray, tenants: np.ndarray, eos_ids: Sequence[int]
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Takes in the results of a call.

        Args:
            outputs: [1 or 2, B, steps] int32, as from `programs.decode_steps`.
            tenants: of the slots when the call was dispatched, [B]. A call that was dispatched ahead continues
                sequences that have finished in the meantime; what it sampled for these is dropped.
            eos_ids: tokens that end a sequence.

        Returns the number of new tokens of each slot, [B] int64, whether the last is an end token, [B] bool, and
        whether logits of the slot were not numbers, [B] bool.
        """
        is_same = (tenants > 0) & (tenants == self.tenant)
        sampled = np.where(is_same[:, None], outputs[0], -1)
        slot, step = np.nonzero(sampled >= 0)
        column = self.count[slot] + step
        self.tokens[slot, column] = sampled[slot, step]
        if self.logprobs.size:
            self.logprobs[slot, column] = outputs[1].view(np.float32)[slot, step]
        new = np.count_nonzero(sampled >= 0, axis=1)
        self.count += new
        last = self.tokens[np.arange(len(new)), np.maximum(self.count - 1, 0)]
        ended = (new > 0) & np.isin(last, eos_ids)
        self.remaining = np.where(ended, 0, self.remaining - new)
        return new, ended, np.any(sampled == NOT_NUMBERS, axis=1)
