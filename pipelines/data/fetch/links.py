"""What a link is: http(s), a host, and a path and query that are sent as they were written."""

import contextlib
import ipaddress
import re
import socket
import string
from urllib.parse import quote, urljoin

from yarl import URL

# Most links by far; their last label begins with a letter, so they are no address. Links like any other otherwise.
_PLAIN = re.compile(r"https?://((?:[a-z0-9_-]{1,63}\.)*[a-z][a-z0-9_-]{0,62})(?::[1-9][0-9]{0,3})?/[!\"$-~]*")
_LINK = re.compile(r"(https?)://([^/?#]*)(/[^?#]*)?(\?[^#]*)?(?:#.*)?", re.IGNORECASE | re.DOTALL)
_AUTHORITY = re.compile(r"(\[[0-9a-fA-F:.]+\]|[^:@\[\]]+)(?::([0-9]*))?")
_NAME = re.compile(r"(?:[a-z0-9_-]{1,63}\.)*([a-z0-9_-]{1,63})\.?")
_NUMBER = re.compile(r"[0-9]+|0x[0-9a-f]*")
_NAME_CHARS = 253

# What browsers take off both ends of a link, and out of it.
_AROUND = "".join(map(chr, range(0x21)))
_WITHIN = str.maketrans("", "", "\t\r\n")
_SENT_AS_IT_IS = string.digits + string.ascii_letters + string.punctuation


def parse_link(text: str) -> URL:
    """Returns a link whose percent-encoding is as it was given; only what cannot be sent as it is gets encoded.

    The host of it is lower-case ASCII: a name, or an address in its one canonical form, since numbers for an address
    in any base, grouping and script mean to a browser, and to the system, what they stand for.

    Raises:
        ValueError: It is not a link to a host over http or https, or it holds a user's name.
    """
    plain = _PLAIN.fullmatch(text)
    if plain and len(plain[1]) <= _NAME_CHARS:
        return URL(text, encoded=True)
    match = _LINK.fullmatch(text.strip(_AROUND).translate(_WITHIN))
    authority = match and _AUTHORITY.fullmatch(match[2])
    if not match or not authority:
        raise ValueError(f"{text!r} is not an http(s) link without a user's name")
    port = int(authority[2]) if authority[2] else None
    if port is not None and not 0 < port < 1 << 16:
        raise ValueError(f"{text!r} has no port that can be connected to")
    # A lone surrogate is a byte of a header that is not UTF-8: it goes back as it came.
    rest = quote((match[3] or "/") + (match[4] or ""), safe=_SENT_AS_IT_IS, errors="surrogateescape")
    place = f"{_parse_host(authority[1])}:{port}" if port else _parse_host(authority[1])
    return URL(f"{match[1].lower()}://{place}{rest}", encoded=True)


def follow_link(url: URL, location: str) -> URL:
    """Returns where a redirect from `url` leads, relative or not.

    Raises:
        ValueError: It does not lead to an http(s) link.
    """
    return parse_link(urljoin(str(url), location.strip(_AROUND).translate(_WITHIN)))


def host_of(url: URL) -> str:
    """Returns the name under which a link's host is known, the same however it is written."""
    return (url.raw_host or "").removesuffix(".")


def _parse_host(text: str) -> str:
    if text.startswith("["):
        return f"[{ipaddress.IPv6Address(text[1:-1])}]"
    if not text.isascii():
        text = URL.build(scheme="http", host=text).raw_host or ""
    text = text.lower()
    match = _NAME.fullmatch(text)
    if not match or len(text) > _NAME_CHARS:
        raise ValueError(f"{text!r} is not a host")
    if _NUMBER.fullmatch(match[1]):
        with contextlib.suppress(OSError):
            return socket.inet_ntoa(socket.inet_aton(text.removesuffix(".")))
        raise ValueError(f"{text!r} is neither an address nor a name")
    return text
