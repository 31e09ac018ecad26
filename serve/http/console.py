"""The console: the page at `/`, and the files of a bundle that it shows.

The page consists of static files from this server, so it needs no internet access. It reads its
data from the same routes as any other client, with the same API key.
"""

from functools import cache
from pathlib import Path, PurePosixPath

from serve.errors import NotFound
from serve.http.app import Response
from serve.http.request import Request
from serve.inference.dataplane import DataPlane

STATIC = Path(__file__).parents[1] / "console" / "static"
# The page itself, served at `/`.
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
# The browser must not guess content types, and must not send this server's URLs to other sites.
COMMON = {"X-Content-Type-Options": "nosniff", "Referrer-Policy": "no-referrer"}
# Scripts and styles are loaded from this server only, so text in labels cannot run as code.
PAGE_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
    "img-src 'self' data: blob:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
# Reports come with bundles and are not trusted: they may contain styles, but no scripts.
REPORT_POLICY = (
    "sandbox; default-src 'none'; img-src 'self' data:; style-src 'unsafe-inline'; "
    "base-uri 'none'; form-action 'none'"
)


async def console_page(request: Request) -> Response:
    """Return the console's page."""
    return _answer(PAGE)


async def console_file(request: Request) -> Response:
    """Return a static file of the page. Raises NotFound if there is no such file."""
    name = request.path.rpartition("/")[2]
    if name not in _assets():
        raise NotFound(f"/console/{name[:100]} does not exist. See /docs.")
    return _answer(name)


def bundle_manifest(plane: DataPlane) -> Response:
    """Return the manifest of the served bundle. Its task defines the console's input form."""
    return Response(plane.manifest.model_dump_json().encode(), headers=COMMON)


def report_file(plane: DataPlane, name: str) -> Response:
    """Return a file of the bundle's folder report/.

    name: path within report/. Raises NotFound if the manifest does not list the file, or if the
    file is missing.
    """
    file, suffix = f"report/{name}", PurePosixPath(name).suffix
    listed = [each for each in plane.manifest.files if each.startswith("report/")]
    if file not in listed or suffix not in TYPES or ".." in file.split("/"):
        raise NotFound(
            f"'{file[:100]}' is not in this version's bundle; it has "
            f"{', '.join(listed) or 'no report'}."
        )
    try:
        content = (plane.bundle.path / file).read_bytes()
    except OSError as error:
        raise NotFound(f"'{file}' is missing on this server; load the model again.") from error
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
