"""The console: the page at `/`, and what of a bundle it shows.

The page is plain files that the server itself answers; it works without the internet. What they
show comes from the same routes that every client uses, with the same key.
"""

from functools import cache
from pathlib import Path, PurePosixPath

from serve.errors import NotFound
from serve.http.app import Response
from serve.http.request import Request
from serve.inference.dataplane import DataPlane

STATIC = Path(__file__).parents[1] / "console" / "static"
# The page itself, which is answered at `/`.
PAGE = "index.html"
TYPES = {
    ".css": "text/css; charset=utf-8",
    ".html": "text/html; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".json": "application/json",
    ".md": "text/plain; charset=utf-8",
    ".png": "image/png",
    ".svg": "image/svg+xml",
    ".txt": "text/plain; charset=utf-8",
}
# The browser takes a file for what it is said to be, and tells no other site where it was.
COMMON = {"X-Content-Type-Options": "nosniff", "Referrer-Policy": "no-referrer"}
# Scripts and styles come from this server only; no word in a label can become either.
PAGE_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
    "img-src 'self' data: blob:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
# A report was made elsewhere: it may look as it likes, and do nothing.
REPORT_POLICY = (
    "sandbox; default-src 'none'; img-src 'self' data:; style-src 'unsafe-inline'; "
    "base-uri 'none'; form-action 'none'"
)


async def console_page(request: Request) -> Response:
    return _answer(PAGE)


async def console_file(request: Request) -> Response:
    """A file of the page. Raises NotFound."""
    name = request.path.rpartition("/")[2]
    if name not in _assets():
        raise NotFound(f"/console/{name[:100]}: there is nothing here. See /docs.")
    return _answer(name)


def bundle_manifest(plane: DataPlane) -> Response:
    """The manifest of the bundle that is served; its task says what the form asks for."""
    return Response(plane.manifest.model_dump_json().encode(), headers=COMMON)


def report_file(plane: DataPlane, name: str) -> Response:
    """A file below the bundle's report/. Raises NotFound for one that its manifest does not list.

    name: within report/.
    """
    file, suffix = f"report/{name}", PurePosixPath(name).suffix
    listed = [each for each in plane.manifest.files if each.startswith("report/")]
    if file not in listed or suffix not in TYPES or ".." in file.split("/"):
        raise NotFound(
            f"'{file[:100]}' is not in this version's bundle, which has "
            f"{', '.join(listed) or 'no report'}."
        )
    try:
        content = (plane.bundle.path / file).read_bytes()
    except OSError as error:
        raise NotFound(f"'{file}' has gone from this server; load the model again.") from error
    headers = {**COMMON, "Content-Security-Policy": REPORT_POLICY}
    return Response(content, content_type=TYPES[suffix], headers=headers)


@cache
def _assets() -> frozenset[str]:
    return frozenset(path.name for path in STATIC.iterdir() if path.name != PAGE)


@cache
def _content(name: str) -> bytes:
    return (STATIC / name).read_bytes()


def _answer(name: str) -> Response:
    headers = {**COMMON, "Cache-Control": "no-cache", "Content-Security-Policy": PAGE_POLICY}
    return Response(_content(name), content_type=TYPES[Path(name).suffix], headers=headers)
