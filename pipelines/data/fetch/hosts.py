"""How much is asked of a host at once, and when it is left alone: one that keeps failing must not hold up the rest."""

import asyncio
import math
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from types import TracebackType
from typing import Self

FAILURES_TO_SHUT = 8
"""Links of one host that fail in a row before it is left alone. With the default of 8 at once, a dead host has then
cost one deadline. Where a fifth of the links is bad in no order, 8 in a row are bad once in half a million links."""

COOL_DOWN_S = 60.0
"""Seconds that a failing host is left alone before one link tries it again: a restart takes about as long, and a dead
host costs one connection a minute."""

LONGEST_PAUSE_S = 3600.0
"""Most seconds that a host's own wish to be left alone counts for: what is left by then is for the next refresh."""

MOST_REMEMBERED = 10_000
"""Hosts that failed last and of which nothing is asked: a list may name millions of dead ones, at a kilobyte each, and
those that failed longest ago are forgotten."""


@dataclass(slots=True)
class _Host:
    """What is known of a host; forgotten when nothing is asked of it and it did not fail last, or long ago."""

    free: int
    waiting: deque[asyncio.Future[bool]] = field(default_factory=deque)
    failures: int = 0
    succeeded_s: float = -math.inf
    shut_until_s: float = -math.inf
    is_shut: bool = False
    asked_to_wait: bool = False
    is_probed: bool = False


class Hosts:
    """Gives links their turns at hosts.

    Args:
        per_host: Turns of one host at once.
        clock: Returns seconds.
    """

    def __init__(self, per_host: int, clock: Callable[[], float] = time.monotonic) -> None:
        self.per_host = per_host
        self.clock = clock
        self.known: dict[str, _Host] = {}
        # Those of them of which nothing is asked, in the order in which they were left.
        self.remembered: dict[str, _Host] = {}

    def turn(self, name: str, *, first: bool = False) -> "Turn":
        """Returns a turn at a host, to be entered; `first` is for links that have waited at another host before."""
        return Turn(self, name, first)

    def left(self, name: str, host: _Host) -> None:
        """Forgets a host of which nothing is asked any more, or, if it failed last, the one left longest ago."""
        self.remembered.pop(name, None)
        if not host.failures and not host.is_shut:
            del self.known[name]
            return
        self.remembered[name] = host
        if len(self.remembered) > MOST_REMEMBERED:
            oldest = next(iter(self.remembered))
            del self.remembered[oldest], self.known[oldest]

    def __len__(self) -> int:
        return len(self.known)


class Turn:
    """A link's turn at its host: entered when it comes, or when it is clear that it never will.

    Between a turn's start and its end, `succeeded`, `failed` or `asked_to_wait` say what came of it; a turn that ends
    without a word, as one that is cancelled does, counts for nothing.
    """

    def __init__(self, hosts: Hosts, name: str, first: bool) -> None:
        self._hosts = hosts
        self._name = name
        self._first = first
        self._host = hosts.known.get(name) or hosts.known.setdefault(name, _Host(hosts.per_host))
        hosts.remembered.pop(name, None)
        self._started_s = math.inf
        self.has_slot = False
        self._is_probe = False

    async def __aenter__(self) -> Self:
        host = self._host
        if self._is_refused():
            return self
        if host.free:
            host.free -= 1
            self.has_slot = True
            return self
        # Whoever leaves hands over its slot; a host that is shut wakes all who wait, without one.
        slot: asyncio.Future[bool] = asyncio.get_running_loop().create_future()
        if self._first:
            host.waiting.appendleft(slot)
        else:
            host.waiting.append(slot)
        try:
            self.has_slot = await slot
        except asyncio.CancelledError:
            # Its turn may have come at the same moment.
            self.has_slot = not slot.cancelled() and slot.result()
            self._leave()
            raise
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._leave()

    def start(self) -> bool:
        """Returns whether the host may be asked now, and begins to do so."""
        if not self.has_slot or (not self._is_probe and self._is_refused()):
            return False
        self._started_s = self._hosts.clock()
        return True

    def succeeded(self) -> None:
        """Tells that the host answered: it is open, unless it asked to be left alone."""
        host = self._host
        host.failures = 0
        host.succeeded_s = self._hosts.clock()
        if self._is_probe or not host.asked_to_wait:
            host.is_shut = host.asked_to_wait = False

    def failed(self) -> None:
        """Tells that a link failed in a way that may pass."""
        host = self._host
        # Links that stall among good ones end together, long after the good ones: that is no row of failures.
        if self._started_s <= host.succeeded_s:
            return
        host.failures += 1
        if self._is_probe or (host.failures >= FAILURES_TO_SHUT and not host.is_shut):
            self._shut(COOL_DOWN_S)

    def asked_to_wait(self, wait_s: float) -> None:
        """Tells that the host asked to be left alone, for longer than a link can wait."""
        self._shut(min(wait_s, LONGEST_PAUSE_S))
        self._host.asked_to_wait = True

    def _is_refused(self) -> bool:
        """Returns whether the host is left alone; if it has been for long enough, this turn is to try it."""
        host = self._host
        if not host.is_shut:
            return False
        if host.is_probed or self._hosts.clock() < host.shut_until_s:
            return True
        host.is_probed = self._is_probe = True
        return False

    def _shut(self, wait_s: float) -> None:
        host = self._host
        host.is_shut = True
        host.shut_until_s = max(host.shut_until_s, self._hosts.clock() + wait_s)
        while self._wake_next(False):
            pass

    def _wake_next(self, has_slot: bool) -> bool:
        """Returns whether one of those that wait was woken."""
        while self._host.waiting:
            slot = self._host.waiting.popleft()
            if not slot.done():
                slot.set_result(has_slot)
                return True
        return False

    def _leave(self) -> None:
        host = self._host
        if self._is_probe:
            host.is_probed = False
        if self.has_slot:
            self.has_slot = False
            if not self._wake_next(True):
                host.free += 1
        if host.free == self._hosts.per_host and self._hosts.known.get(self._name) is host:
            self._hosts.left(self._name, host)
