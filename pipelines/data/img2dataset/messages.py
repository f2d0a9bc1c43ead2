"""What img2dataset says of a link that gave no picture, in this project's words."""

import re

from pipelines.data.failure import STATUSES_THAT_PASS, Failure

_STATUS = re.compile(r"HTTP Error (\d{3})")
# Searched in this order; what urllib, http.client, ssl and the resolver say on Linux, macOS and Windows.
_DOWNLOAD = (
    (r"X-Robots-Tag", Failure("opted_out", outcome="filtered")),
    (r"infinite loop|too many redirects", Failure("too_many_redirects")),
    (r"Redirection to url .* is not allowed|bad redirect", Failure("bad_redirect")),
    (r"is not a public address", Failure("private_address")),
    (r"larger than max_bytes", Failure("too_large")),
    (r"hash mismatch", Failure("hash_mismatch")),
    (r"connect timed out", Failure("connect_timeout", retryable=True)),
    (r"timed out|WinError 10060", Failure("deadline", retryable=True)),
    (
        r"Name or service not known|name resolution|No address associated|nodename nor servname|getaddrinfo failed"
        r"|Name does not resolve|\[Errno -\d+\]",
        Failure("dns", retryable=True),
    ),
    (r"SSL|_ssl\.c|[Cc]ertificate", Failure("tls")),
    (r"IncompleteRead", Failure("incomplete_body", retryable=True)),
    (r"\[Errno \d+\]|WinError|Remote end closed|Connection (aborted|reset)", Failure("connection", retryable=True)),
    (
        r"unknown url type|no host given|control characters|nonnumeric port|Invalid IPv6|codec can't encode|label "
        r"(empty|too long)|Port out of range|port must be|encoding with '?idna",
        Failure("bad_url"),
    ),
)
_RESIZE = (
    (r"image too small", Failure("too_small", outcome="filtered")),
    (r"aspect ratio too large", Failure("aspect", outcome="filtered")),
    (r"image area too large|CV_IO_MAX_IMAGE", Failure("too_many_pixels")),
)


def download_failure(message: str) -> Failure:
    """Returns what an `error_message` of status failed_to_download means."""
    found = _search(message, _DOWNLOAD)
    if found is None and (status := _STATUS.search(message)):
        return Failure(f"http_{status[1]}", retryable=int(status[1]) in STATUSES_THAT_PASS)
    return found or Failure("bad_response")


def resize_failure(message: str) -> Failure:
    """Returns what an `error_message` of status failed_to_resize means."""
    return _search(message, _RESIZE) or Failure("corrupt")


def _search(message: str, table: tuple[tuple[str, Failure], ...]) -> Failure | None:
    return next((failure for pattern, failure in table if re.search(pattern, message)), None)
