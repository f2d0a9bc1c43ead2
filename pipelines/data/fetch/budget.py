"""How many bytes of bodies are in memory at once."""

import asyncio
from collections import deque

BYTES_IN_FLIGHT = 256 << 20
"""Bytes of bodies, being read or in use, that one process holds: 256 at once of 1 MiB, where pictures on the web have
a tenth of that, and far below what 256 of the largest accepted would need."""


class ByteBudget:
    """Lets bodies grow up to a number of bytes in all; beyond it one of them at a time grows on, and the others wait.

    That one ends, whatever the others hold, so there is always one that can; the bytes in memory never exceed the
    limit by more than the largest body.

    Args:
        limit_bytes: Bytes in all.
    """

    def __init__(self, limit_bytes: int) -> None:
        self.free = limit_bytes
        self.privileged: Lease | None = None
        self._waiting: deque[tuple[Lease, int, asyncio.Future[None]]] = deque()

    def lease(self) -> "Lease":
        """Returns the bytes of one body, none so far; whoever asks gives them back."""
        return Lease(self)

    def take(self, lease: "Lease", num_bytes: int) -> bool:
        """Returns whether a body may grow now, and if so has it do so; those that wait already come first."""
        return (not self._waiting or self.privileged is lease) and self._grow(lease, num_bytes)

    async def wait(self, lease: "Lease", num_bytes: int) -> None:
        """Returns when a body that could not grow has grown."""
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        entry = (lease, num_bytes, turn)
        self._waiting.append(entry)
        try:
            await turn
        except asyncio.CancelledError:
            if entry in self._waiting:
                self._waiting.remove(entry)
            raise

    def give_back(self, lease: "Lease") -> None:
        """Takes the bytes of a body back, and lets those grow that wait."""
        self.free += lease.held_bytes
        lease.held_bytes = 0
        if self.privileged is lease:
            self.privileged = None
        while self._waiting:
            other, num_bytes, turn = self._waiting[0]
            if not turn.done():
                if not self._grow(other, num_bytes):
                    break
                turn.set_result(None)
            self._waiting.popleft()

    def _grow(self, lease: "Lease", num_bytes: int) -> bool:
        if self.free < num_bytes and self.privileged is not lease:
            if self.privileged is not None:
                return False
            self.privileged = lease
        self.free -= num_bytes
        lease.held_bytes += num_bytes
        return True


class Lease:
    """The bytes of one body."""

    __slots__ = ("_budget", "held_bytes")

    def __init__(self, budget: ByteBudget) -> None:
        self._budget = budget
        self.held_bytes = 0

    def take(self, num_bytes: int) -> bool:
        """Returns whether so many more bytes are taken; if not, wait for them."""
        return self._budget.take(self, num_bytes)

    async def wait(self, num_bytes: int) -> None:
        """Returns when so many more bytes are taken."""
        await self._budget.wait(self, num_bytes)

    def give_back(self) -> None:
        """Gives back all bytes."""
        self._budget.give_back(self)
