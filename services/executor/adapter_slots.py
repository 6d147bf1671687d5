"""Who is resident, in a bounded number of slots: the one used longest ago makes room. Knows no bus and no tensors."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from services.executor.lora import LoraAdapter


class AdapterSlots:
    """`resident` are the adapters by name, least recently used first; `users` tells those that running requests hold.

    An adapter in use is never evicted. A slot that was taken for an adapter on its way counts as filled.
    """

    def __init__(
        self, num_slots: int, resident: dict[str, LoraAdapter], users: Callable[[], Iterable[LoraAdapter | None]]
    ) -> None:
        self.num_slots = num_slots
        self.num_evicted = 0
        self._resident = resident
        self._users = users
        self._num_taken = 0

    @property
    def num_free(self) -> int:
        """Slots that hold nothing and are not taken."""
        return max(0, self.num_slots - len(self._resident) - self._num_taken)

    def take(self) -> bool:
        """Take a slot for an adapter that is to be loaded, if need be from the one that was used longest ago."""
        missing = len(self._resident) + self._num_taken + 1 - self.num_slots
        if missing > 0:
            used = {id(adapter) for adapter in self._users()}
            idle = [name for name, adapter in self._resident.items() if id(adapter) not in used]
            if len(idle) < missing:
                return False
            for name in idle[:missing]:
                del self._resident[name]
                self.num_evicted += 1
        self._num_taken += 1
        return True

    def fill(self, name: str, adapter: LoraAdapter | None) -> None:
        """Put the adapter into the slot that was taken for it, or give the slot back."""
        self._num_taken -= 1
        if adapter is not None:
            self._resident.pop(name, None)
            self._resident[name] = adapter
