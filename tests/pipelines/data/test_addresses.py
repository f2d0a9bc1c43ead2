import pytest

from pipelines.data.fetch.addresses import AddressGuard, PrivateAddressError

PRIVATE = [
    "127.0.0.1",
    "10.1.2.3",
    "172.16.0.1",
    "192.168.1.1",
    "169.254.169.254",
    "100.64.0.1",
    "0.0.0.0",
    "224.0.0.1",
    "255.255.255.255",
    "::1",
    "::",
    "fe80::1",
    "fe80::1%eth0",
    "fc00::1",
    "fec0::1",
    "ff02::1",
    "::ffff:127.0.0.1",
    "::ffff:10.0.0.1",
    "::127.0.0.1",
    "64:ff9b::7f00:1",
    "64:ff9b::a9fe:a9fe",
    "2002:7f00:1::1",
    "2002:c0a8:101::",
    "2001:0:7f00:1::f7f7:f7f7",  # Teredo: the server is private
    "2001:0:808:808::80ff:fffe",  # Teredo: the client is 127.0.0.1, its bits turned over
    "64:ff9b:1::a00:1",  # NAT64 of a network's own, RFC 8215
    "::ffff:0:7f00:1",  # stateless translation, RFC 2765
    "192.0.0.8",
    "192.88.99.1",
    "3fff::1",
    "3fff:fff::1",
    "198.18.0.1",
    "240.0.0.1",
    "2001:db8::1",
    "100::1",
    "5f00::1",
    "4000::1",
]
PUBLIC = [
    "8.8.8.8",
    "1.1.1.1",
    "192.88.98.1",
    "2606:4700:4700::1111",
    "3ffe::1",
    "::ffff:8.8.8.8",
    "64:ff9b::808:808",
    "2002:808:808::1",
]


@pytest.mark.parametrize("address", PRIVATE)
def test_private_address_is_refused(address: str) -> None:
    with pytest.raises(PrivateAddressError, match="not a public address"):
        AddressGuard().check(address)


@pytest.mark.parametrize("address", PUBLIC)
def test_public_address_passes(address: str) -> None:
    AddressGuard().check(address)


def test_allowed_network_opens_itself_and_nothing_else() -> None:
    guard = AddressGuard(["127.0.0.0/30", "fc00::/8"])
    guard.check("127.0.0.1")
    guard.check("::ffff:127.0.0.1")
    guard.check("fc00::5")
    for address in ("127.0.0.5", "10.0.0.1", "::1", "64:ff9b::a00:1"):
        with pytest.raises(PrivateAddressError):
            guard.check(address)


def test_socket_is_made_only_for_what_passes() -> None:
    with pytest.raises(PrivateAddressError):
        AddressGuard().open_socket((2, 1, 6, "", ("127.0.0.1", 80)))
    with AddressGuard(["127.0.0.1/32"]).open_socket((2, 1, 6, "", ("127.0.0.1", 80))) as made:
        assert (made.family, made.type) == (2, 1)
