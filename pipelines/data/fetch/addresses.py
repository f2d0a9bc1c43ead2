"""Which addresses may be connected to. Links come from strangers, and must not reach into a private network."""

import asyncio
import errno
import ipaddress
import socket
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeAlias

from aiohttp.abc import AbstractResolver, ResolveResult

from mdm_core.errors import WorkError

_Address: TypeAlias = ipaddress.IPv4Address | ipaddress.IPv6Address
Lookup: TypeAlias = Callable[[str], Iterable[str]]

# IPv6 networks through which the IPv4 address in the last 32 bits is reached: NAT64, and one long deprecated.
_LAST_32_BITS = (ipaddress.IPv6Network("64:ff9b::/96"), ipaddress.IPv6Network("::/96"))
# All of IPv6 that is handed out for use on the internet. What lies outside may be taken for public by the standard
# library: 64:ff9b:1::/48 and ::ffff:0:0:0/96, for two, lead to IPv4 addresses of any kind.
_GIVEN_OUT = ipaddress.IPv6Network("2000::/3")
# Public to the standard library, some of them in newer versions only, and meant for something else: protocols, the
# relays of 6to4 that are no more (RFC 7526), documentation (RFC 9637).
_RESERVED = tuple(ipaddress.ip_network(network) for network in ("192.0.0.0/24", "192.88.99.0/24", "3fff::/20"))


class PrivateAddressError(OSError):
    """An address that may not be connected to."""


class AddressGuard:
    """Lets public addresses through, and those of the networks that are allowed.

    Args:
        allow_networks: Networks, as in `127.0.0.0/8`, that may be connected to though they are not public.
    """

    def __init__(self, allow_networks: Iterable[str] = ()) -> None:
        self._networks = tuple(ipaddress.ip_network(network) for network in allow_networks)

    def check(self, address: str) -> None:
        """Returns if `address`, in its canonical form, may be connected to.

        Raises:
            PrivateAddressError: It may not be.
        """
        ip = ipaddress.ip_address(address.partition("%")[0])
        if self._is_allowed(ip):
            return
        for target in _targets(ip):
            if not _is_public(target) and not self._is_allowed(target):
                raise PrivateAddressError(f"{address} is not a public address")

    def open_socket(self, info: tuple[int, int, int, str, tuple[str | int, ...]]) -> socket.socket:
        """Returns a socket for an address that is about to be connected to: the last check, and the one that counts.

        Whatever form the address had in the link, and whatever a name's answer was before, this is what the kernel
        is asked to connect to.

        Raises:
            PrivateAddressError: It may not be connected to.
            WorkError: The process has as many open files as it may.
        """
        family, kind, protocol, _, address = info
        self.check(str(address[0]))
        try:
            return socket.socket(family, kind, protocol)
        except OSError as error:
            if error.errno in (errno.EMFILE, errno.ENFILE):
                # No fault of the link, and every other one would meet it too.
                raise WorkError(
                    f"no more connections can be opened ({error.strerror}); raise the limit of open files (ulimit -n),"
                    " or lower fetch.concurrency or run.workers"
                ) from None
            raise

    def _is_allowed(self, ip: _Address) -> bool:
        return any(ip.version == network.version and ip in network for network in self._networks)


class GuardedResolver(AbstractResolver):
    """Looks names up in threads of its own, and refuses a name if any of its addresses is refused.

    Args:
        guard: What may be connected to.
        lookup: Returns the addresses of a name; the system's resolver by default.
        num_threads: Names looked up at once: a slow name server must not hold up the names that others serve.
    """

    def __init__(self, guard: AddressGuard, lookup: Lookup | None = None, num_threads: int = 64) -> None:
        self._guard = guard
        self._lookup = lookup or system_lookup
        self._threads = ThreadPoolExecutor(num_threads, thread_name_prefix="resolve")

    async def resolve(
        self, host: str, port: int = 0, family: socket.AddressFamily = socket.AF_UNSPEC
    ) -> list[ResolveResult]:
        """Returns the addresses of `host`, each of them checked."""
        addresses = await asyncio.get_running_loop().run_in_executor(self._threads, self._lookup, host)
        results: list[ResolveResult] = []
        for address in addresses:
            self._guard.check(address)
            version = socket.AF_INET6 if ":" in address else socket.AF_INET
            if family in (socket.AF_UNSPEC, version):
                numeric = socket.AI_NUMERICHOST | socket.AI_NUMERICSERV
                results.append(
                    ResolveResult(hostname=host, host=address, port=port, family=version, proto=0, flags=numeric)
                )
        if not results:
            raise OSError(f"{host} has no address")
        return results

    async def close(self) -> None:
        """Forgets the look-ups that still run: none of them is worth waiting for."""
        self._threads.shutdown(wait=False, cancel_futures=True)


def system_lookup(host: str) -> list[str]:
    """Returns the addresses that the system's resolver gives for `host`, in its order."""
    # As bytes, for it is ASCII by now, and a name that Python would encode again it may also refuse.
    found = socket.getaddrinfo(host.encode("ascii"), None, type=socket.SOCK_STREAM, flags=socket.AI_ADDRCONFIG)
    return list(dict.fromkeys(str(address[0]) for *_, address in found))


def _is_public(ip: _Address) -> bool:
    if any(ip.version == network.version and ip in network for network in _RESERVED):
        return False
    if isinstance(ip, ipaddress.IPv4Address):
        return ip.is_global and not ip.is_multicast
    return ip.is_global and ip in _GIVEN_OUT


def _targets(ip: _Address) -> tuple[_Address, ...]:
    """Returns the addresses that a packet for `ip` may reach in the end: those that it carries, or itself."""
    if isinstance(ip, ipaddress.IPv4Address):
        return (ip,)
    if ip.ipv4_mapped:
        return (ip.ipv4_mapped,)
    if ip.sixtofour:
        return (ip.sixtofour,)
    if ip.teredo:
        return ip.teredo
    if any(ip in network for network in _LAST_32_BITS):
        return (ipaddress.IPv4Address(int(ip) & 0xFFFFFFFF),)
    return (ip,)
