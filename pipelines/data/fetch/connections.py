"""The connections that links are fetched over: kept, checked, and each answer on them to the request before it."""

import functools
import ssl
from pathlib import Path

import aiohttp
from aiohttp.connector import Connection

from mdm_core.errors import WorkError
from pipelines.data.config import FetchConfig
from pipelines.data.fetch.addresses import AddressGuard, GuardedResolver, Lookup

# Lists come in no order: of the hosts of some seconds ago only the great ones come again, and each idle connection
# is an open file.
_KEEP_ALIVE_S = 5.0
_DNS_CACHE_S = 60


def open_session(config: FetchConfig, guard: AddressGuard, lookup: Lookup | None) -> aiohttp.ClientSession:
    """Returns a session that keeps no cookies, asks no proxy, and connects to nothing but what `guard` lets through.

    Raises:
        WorkError: The machine has no certificates to check others by.
    """
    # How many links are fetched at once is not the connector's to say, where waiting would use up their deadlines.
    connector = aiohttp.TCPConnector(
        limit=0,
        ssl=tls_context(config.verify_tls),
        resolver=GuardedResolver(guard, lookup),
        socket_factory=guard.open_socket,
        ttl_dns_cache=_DNS_CACHE_S,
        keepalive_timeout=_KEEP_ALIVE_S,
    )
    return aiohttp.ClientSession(
        connector=connector,
        request_class=_Request,
        cookie_jar=aiohttp.DummyCookieJar(),
        auto_decompress=False,
        trust_env=False,
        timeout=aiohttp.ClientTimeout(total=None, sock_connect=config.connect_timeout_s),
        headers={"User-Agent": config.user_agent, "Accept": "image/*,*/*;q=0.5", "Accept-Encoding": "identity"},
    )


class _Request(aiohttp.ClientRequest):
    """A request that is not sent where an answer lies already.

    What a server sends on an idle connection would be taken for the answer to the next request on it, and each later
    answer for that to the request after its own: pictures would come under other pictures' links.
    """

    async def send(self, conn: Connection) -> aiohttp.ClientResponse:
        """Returns the response, or has the session try another connection."""
        if conn.protocol is None or conn.protocol.should_close:
            raise aiohttp.ServerDisconnectedError("an answer came before there was a request")
        return await super().send(conn)


@functools.cache
def tls_context(verify: bool) -> ssl.SSLContext:
    """Returns the one context of the process: reading the certificates takes longer than many fetches."""
    context = ssl.create_default_context()
    if not verify:
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
        return context
    paths = ssl.get_default_verify_paths()
    folder = Path(paths.capath or "/nowhere")
    if not context.cert_store_stats()["x509_ca"] and not (folder.is_dir() and any(folder.iterdir())):
        # Without them every https link would be a lasting failure.
        raise WorkError(
            f"no certificates of authorities in {paths.openssl_cafile} or {paths.openssl_capath}, so no https link"
            " can be trusted; install ca-certificates, set SSL_CERT_FILE, or set fetch.verify_tls: false"
        )
    return context
