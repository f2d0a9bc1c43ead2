import hashlib
from pathlib import Path

import pytest

from mdm_core.errors import ConfigError
from pipelines.data.exclusions import read_exclusions

KEPT_OUT = hashlib.sha256(b"evaluation picture").digest()
OTHER = hashlib.sha256(b"another picture").digest()
PHASH = 0xF00D_CAFE_0123_4567  # as a signed number it is negative
SIGNED = PHASH - 2**64


def write(folder: Path, content: bytes) -> str:
    path = folder / "hashes.txt"
    path.write_bytes(content)
    return str(path)


def test_files_and_pictures_in_the_list_are_kept_out(tmp_path: Path) -> None:
    lines = f"# from the test set\n\n{KEPT_OUT.hex().upper()}  # a photo\r\n{PHASH:016x}\n"
    exclusions = read_exclusions(write(tmp_path, b"\xef\xbb\xbf" + lines.encode()))
    assert len(exclusions) == 2
    assert exclusions.reason(KEPT_OUT, None) == "excluded"
    assert exclusions.reason(KEPT_OUT, 1) == "excluded"
    assert exclusions.reason(OTHER, SIGNED) == "excluded"
    assert exclusions.reason(OTHER, None) is None
    assert exclusions.reason(OTHER, 1) is None


@pytest.mark.parametrize("max_bits", [0, 4, 9])
def test_near_pictures_are_kept_out_up_to_a_number_of_bits(tmp_path: Path, max_bits: int) -> None:
    exclusions = read_exclusions(write(tmp_path, f"{PHASH:016x}".encode()), max_bits=max_bits)
    for bits in range(12):
        flipped = PHASH ^ sum(1 << (5 * at) for at in range(bits))
        signed = flipped - 2**64 if flipped >= 2**63 else flipped
        assert exclusions.reason(OTHER, signed) == ("excluded" if bits <= max_bits else None)


def test_pictures_differ_in_four_bits_at_most_if_nothing_is_said(tmp_path: Path) -> None:
    exclusions = read_exclusions(write(tmp_path, b"%016x" % PHASH))
    assert exclusions.reason(OTHER, SIGNED ^ 0b1111) == "excluded"
    assert exclusions.reason(OTHER, SIGNED ^ 0b11111) is None


def test_a_hash_that_begins_alike_is_another(tmp_path: Path) -> None:
    exclusions = read_exclusions(write(tmp_path, KEPT_OUT.hex().encode()))
    assert exclusions.reason(KEPT_OUT[:15] + bytes([KEPT_OUT[15] ^ 1]) + KEPT_OUT[16:], None) is None


def test_an_empty_list_keeps_nothing_out(tmp_path: Path) -> None:
    exclusions = read_exclusions(write(tmp_path, b"# nothing yet\n"))
    assert len(exclusions) == 0
    assert exclusions.reason(KEPT_OUT, SIGNED) is None


@pytest.mark.parametrize(
    ("line", "told"),
    [
        (b"d41d8cd98f00b204e9800998ecf8427e", "'d41d8cd98f00b204e9800998ecf8427e' (32 bytes)"),
        (b"0x0123456789abcd", "'0x0123456789abcd' (16 bytes)"),
        (b"picture.jpg " + b"0" * 64, "'picture.jpg 0000"),
        (b"\xff\xfe0", "(3 bytes)"),
    ],
)
def test_what_is_no_hash_is_named_with_its_line(tmp_path: Path, line: bytes, told: str) -> None:
    uri = write(tmp_path, b"# list\n" + b"0" * 16 + b"\n" + line + b"\n")
    with pytest.raises(ConfigError) as caught:
        read_exclusions(uri)
    message = str(caught.value)
    assert f"filters.exclude_hashes={uri}, line 3: got " in message
    assert told in message
    assert "wanted a hash of 64 hexadecimal digits (SHA-256) or of 16 (perceptual)" in message


@pytest.mark.parametrize("name", ["missing.txt", ""])
def test_a_file_that_is_not_there_is_named(tmp_path: Path, name: str) -> None:
    with pytest.raises(ConfigError, match=r"filters\.exclude_hashes=.* can't be read"):
        read_exclusions(str(tmp_path / name))
