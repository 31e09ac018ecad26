"""Request bodies by their headers: content encodings, character sets, image files and forms."""

import re
import zlib
from email import policy
from email.message import EmailMessage
from email.parser import BytesParser

from serve.errors import BadRequest, PayloadTooLarge, UnsupportedMediaType
from serve.http.request import Request
from serve.protocol import v2

# zlib's window bits for streams with a gzip header, with a zlib header, and without one.
GZIP, ZLIB, RAW = 31, 15, -15
FORM = "multipart/form-data"
UTF_8 = {"utf-8", "utf8", "us-ascii", "ascii"}
MAX_PARTS = 256
IDENTITY = "identity"
# Most compressed streams in one body, and the first piece of each, in bytes. zlib copies the input
# that follows the end of a stream, so streams are read in pieces that start small and double.
MAX_MEMBERS, FIRST_PIECE = 4096, 1024
HEADER_LENGTH = v2.HEADER_LENGTH.encode()
# Highest compression ratio of deflate.
MOST_DEFLATED = 1032


def parsed_bytes(request: Request, body: bytes) -> int:
    """Return the most bytes of a body that may need parsing, after decompression.

    Image files and binary data need none.
    """
    if (request.header(b"content-encoding") or IDENTITY).strip().lower() != IDENTITY:
        return len(body) * MOST_DEFLATED
    if is_picture(request.content_type):
        return 0
    return v2.json_bytes(body, request.header(HEADER_LENGTH))


def decompress(request: Request, body: bytes, max_bytes: int) -> bytes:
    """Decompress a body according to its Content-Encoding.

    Raises UnsupportedMediaType if the encoding is not gzip, deflate or identity, PayloadTooLarge if
    the result has more than `max_bytes`, BadRequest if the body is not valid in that encoding.
    """
    encoding = (request.header(b"content-encoding") or IDENTITY).strip().lower()
    if encoding == IDENTITY:
        return body
    if encoding in ("gzip", "x-gzip"):
        bits = GZIP
    elif encoding == "deflate":
        # The standard requires a zlib header, but some clients omit it.
        bits = ZLIB if body[:1] and body[0] & 0x0F == 8 and _is_zlib(body) else RAW
    else:
        raise UnsupportedMediaType(
            f"Content-Encoding is '{encoding[:40]}'; gzip, deflate or none is accepted."
        )
    return _inflated(body, bits, max_bytes, encoding)


def check_charset(content_type: str) -> None:
    """Raise UnsupportedMediaType for text in a character set other than UTF-8."""
    found = re.search(r";\s*charset\s*=\s*\"?([^\s;\"]+)", content_type, re.IGNORECASE)
    if found and found[1].lower() not in UTF_8 and not is_binary(content_type):
        raise UnsupportedMediaType(
            f"Content-Type has the charset '{found[1][:40]}'; send the body in UTF-8."
        )


def is_binary(content_type: str) -> bool:
    """Return whether a body is binary, so that the charset in its content type has no meaning."""
    return content_type.strip().lower().startswith(("image/", "application/octet-stream"))


def is_picture(content_type: str) -> bool:
    """Return whether a body is an image file."""
    return content_type.strip().lower().startswith("image/")


def is_form(content_type: str) -> bool:
    """Return whether a body is a multipart form."""
    return content_type.strip().lower().startswith(FORM)


def form_fields(body: bytes, content_type: str) -> dict[str, bytes | str]:
    """Return the parts of a multipart form by name: files as bytes, other parts as text.

    Raises BadRequest if the form is malformed, UnsupportedMediaType if a part is text in a
    character set other than UTF-8.
    """
    head = b"Content-Type: " + content_type.encode("latin-1", "replace") + b"\r\n\r\n"
    message = BytesParser(_class=EmailMessage, policy=policy.HTTP).parsebytes(head + body)
    parts = list(message.iter_parts()) if message.is_multipart() else []
    if not parts or message.defects or len(parts) > MAX_PARTS:
        raise BadRequest(f"the body is not valid {FORM} with 1 to {MAX_PARTS} parts.")
    fields: dict[str, bytes | str] = {}
    for part in parts:
        name = part.get_param("name", header="content-disposition")
        if not isinstance(name, str) or name in fields:
            raise BadRequest("each part of the form must have a unique name.")
        content = part.get_payload(decode=True)
        if not isinstance(content, bytes):
            raise BadRequest(f"part '{name[:100]}' of the form cannot be read.")
        check_charset(str(part.get("content-type", "")))
        is_file = part.get_filename() is not None or part.get_content_maintype() == "image"
        try:
            fields[name] = content if is_file else content.decode()
        except UnicodeDecodeError:
            raise BadRequest(f"part '{name[:100]}' of the form is not UTF-8 text.") from None
    return fields


def _is_zlib(body: bytes) -> bool:
    return len(body) > 1 and (body[0] << 8 | body[1]) % 31 == 0


def _inflated(body: bytes, bits: int, max_bytes: int, encoding: str) -> bytes:
    view, parts, place, room = memoryview(body), [], 0, max_bytes
    try:
        for _ in range(MAX_MEMBERS):  # a gzip file may consist of several streams
            stream, size = zlib.decompressobj(bits), FIRST_PIECE
            while not stream.eof and place < len(body):
                piece = view[place : place + size]
                parts.append(stream.decompress(piece, room + 1))
                room -= len(parts[-1])
                if room < 0:
                    raise PayloadTooLarge(
                        f"the body has more than {max_bytes} bytes after decompression, which is "
                        "the limit."
                    )
                place += len(piece) - len(stream.unused_data)
                size *= 2
            if not stream.eof:
                raise BadRequest(f"the body ends in the middle of a {encoding} stream.")
            if place == len(body):
                break
        else:
            raise BadRequest(f"the body has more than {MAX_MEMBERS} {encoding} streams; use one.")
    except zlib.error as error:
        raise BadRequest(
            f"Content-Encoding is '{encoding}', but the body is not valid {encoding}."
        ) from error
    return b"".join(parts)
