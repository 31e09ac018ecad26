"""Request bodies: compression within limits, character sets and forms."""

import gzip
import random
import zlib

import pytest

from serve.errors import BadRequest, PayloadTooLarge, UnsupportedMediaType
from serve.http import content
from serve.http.request import Request

BODY = b'{"instances": [1, 2, 3]}' * 3000


def raw_deflate(body: bytes) -> bytes:
    stream = zlib.compressobj(wbits=-15)
    return stream.compress(body) + stream.flush()


def decompressed(body: bytes, encoding: str, most: int = len(BODY)) -> bytes:
    headers = [(b"content-encoding", encoding.encode())]
    request = Request({"headers": headers, "method": "POST", "path": "/"}, None)
    return content.decompress(request, body, most)


@pytest.mark.parametrize(
    ("encoding", "encode"),
    [
        ("identity", bytes),
        ("gzip", gzip.compress),
        ("GZIP", lambda body: gzip.compress(body[:100]) + gzip.compress(body[100:])),
        ("x-gzip", gzip.compress),
        ("deflate", zlib.compress),
        ("deflate", raw_deflate),
    ],
)
def test_encoded_bodies_are_read(encoding, encode):
    assert decompressed(encode(BODY), encoding) == BODY


def test_a_decompression_bomb_is_refused():
    bomb = gzip.compress(bytes(50_000_000))
    with pytest.raises(PayloadTooLarge, match="more than 1000 bytes after decompression"):
        decompressed(bomb, "gzip", 1000)
    members = gzip.compress(bytes(600)) * 2
    with pytest.raises(PayloadTooLarge):
        decompressed(members, "gzip", 1000)


def test_the_number_of_gzip_streams_is_limited():
    parts = b"".join(gzip.compress(bytes([number % 256])) for number in range(4_000))
    assert len(decompressed(parts, "gzip", 10_000)) == 4_000
    with pytest.raises(BadRequest, match="more than 4096 gzip streams"):
        decompressed(gzip.compress(b"") * 3_000_000, "gzip", 10_000)


@pytest.mark.parametrize("encoding", ["br", "zstd", "gzip, deflate"])
def test_other_encodings_are_refused_by_name(encoding):
    with pytest.raises(UnsupportedMediaType, match=f"'{encoding}'; gzip, deflate or none"):
        decompressed(BODY, encoding)


@pytest.mark.parametrize("body", [b"plain", gzip.compress(BODY)[:-9], gzip.compress(BODY) + b"x"])
def test_a_body_with_a_wrong_content_encoding_is_refused(body):
    with pytest.raises(BadRequest):
        decompressed(body, "gzip")


def test_text_in_other_character_sets_is_refused():
    content.check_charset("application/json")
    content.check_charset("application/json; charset=UTF-8")
    content.check_charset('application/json; charset="utf-8"')
    content.check_charset("multipart/form-data; boundary=xxcharset=1")
    content.check_charset("image/png; charset=binary")
    with pytest.raises(UnsupportedMediaType, match="charset 'latin-1'"):
        content.check_charset("application/json; charset=latin-1")
    form = b"--b\r\nContent-Disposition: form-data; name=x\r\n"
    form += b"Content-Type: text/plain; charset=utf-16-le\r\n\r\nh\0i\0\r\n--b--\r\n"
    with pytest.raises(UnsupportedMediaType, match="charset 'utf-16-le'"):
        content.form_fields(form, "multipart/form-data; boundary=b")


def form(*parts: tuple[str, bytes]) -> bytes:
    lines = b"".join(
        b"--b\r\nContent-Disposition: form-data; " + head.encode() + b"\r\n\r\n" + body + b"\r\n"
        for head, body in parts
    )
    return lines + b"--b--\r\n"


def test_files_in_forms_keep_their_bytes():
    for seed in range(50):
        file = random.Random(seed).randbytes(400) + b"\r\n\n\r\x00--b not the end\r\n"
        fields = content.form_fields(
            form(('name="photo"; filename="a.png"', file), ('name="age"', "37 ü".encode())),
            "multipart/form-data; boundary=b",
        )
        assert fields == {"photo": file, "age": "37 ü"}


@pytest.mark.parametrize(
    ("body", "content_type"),
    [
        (form(('name="a"', b"1")), "multipart/form-data"),
        (b"", "multipart/form-data; boundary=b"),
        (form(('name="a"', b"1"), ('name="a"', b"2")), "multipart/form-data; boundary=b"),
        (form(('name="a"', b"\xff")), "multipart/form-data; boundary=b"),
        (form(*[('name="a"', b"1")] * 300), "multipart/form-data; boundary=b"),
        (form(('name="a"', b"1"))[:-10], "multipart/form-data; boundary=b"),
    ],
)
def test_invalid_forms_are_refused(body, content_type):
    with pytest.raises(BadRequest):
        content.form_fields(body, content_type)
