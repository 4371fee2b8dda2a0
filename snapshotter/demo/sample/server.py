"""A library's catalogue on the web: the workload of the sample image.

Runs inside the container on the image's own Python, with the standard library alone. Like most
services it imports far more than it uses in the first second, opens a database and reads a small
part of it.
"""

from __future__ import annotations

import decimal
import hashlib
import html
import http
import http.server
import importlib
import json
import logging
import os
import sqlite3
import string
import unicodedata
import urllib.parse
from pathlib import Path

# What a web framework and its usual companions load before they answer a first request.
COMPANIONS = (
    "asyncio",
    "concurrent.futures",
    "csv",
    "email.message",
    "email.policy",
    "gettext",
    "http.client",
    "ipaddress",
    "logging.handlers",
    "multiprocessing.pool",
    "pydoc",
    "ssl",
    "statistics",
    "unittest.mock",
    "uuid",
    "xml.dom.minidom",
    "xml.etree.ElementTree",
    "xmlrpc.client",
    "zipfile",
    "zoneinfo",
)

HOME = Path(__file__).parent
PAGE = string.Template((HOME / "page.html").read_text())
ROWS = 20

log = logging.getLogger("catalogue")


class Catalogue:
    """The books, in an SQLite database that is only read."""

    def __init__(self, path: Path) -> None:
        self._books = sqlite3.connect(f"file:{path}?mode=ro&immutable=1", uri=True)

    def search(self, text: str) -> list[tuple[str, str, int, str]]:
        """Title, author, year and price of the first books whose title begins with `text`."""
        found = self._books.execute(
            "SELECT title, author, year, price FROM book WHERE title >= ? ORDER BY title LIMIT ?",
            (text, ROWS),
        )
        return found.fetchall()

    def count(self) -> int:
        """How many books there are."""
        (count,) = self._books.execute("SELECT value FROM fact WHERE name = 'books'").fetchone()
        return int(count)


class Handler(http.server.BaseHTTPRequestHandler):
    """Answers `/?q=TEXT` with a page and `/health` with JSON."""

    catalogue: Catalogue

    def do_GET(self) -> None:
        url = urllib.parse.urlsplit(self.path)
        if url.path == "/health":
            self._answer("application/json", json.dumps({"books": self.catalogue.count()}))
        elif url.path == "/":
            text = urllib.parse.parse_qs(url.query).get("q", ["A"])[0]
            self._answer("text/html; charset=utf-8", self._page(text))
        else:
            self.send_error(http.HTTPStatus.NOT_FOUND)

    def _page(self, text: str) -> str:
        books = self.catalogue.search(unicodedata.normalize("NFC", text))
        cents = decimal.Decimal("0.01")
        rows = "\n".join(
            f"<tr><td>{html.escape(title)}<td>{html.escape(author)}<td>{year}"
            f"<td>{decimal.Decimal(price).quantize(cents)}"
            for title, author, year, price in books
        )
        return PAGE.substitute(count=self.catalogue.count(), query=html.escape(text), rows=rows)

    def _answer(self, kind: str, text: str) -> None:
        body = text.encode()
        self.send_response(http.HTTPStatus.OK)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("ETag", hashlib.sha256(body).hexdigest())
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002
        log.info(format, *args)


def main() -> None:
    """Serve on the loopback port in $PORT until killed."""
    for name in COMPANIONS:
        importlib.import_module(name)
    logging.basicConfig(level=logging.INFO, format="%(name)s %(levelname)s %(message)s")
    Handler.catalogue = Catalogue(HOME / "catalogue.db")
    server = http.server.HTTPServer(("127.0.0.1", int(os.environ["PORT"])), Handler)
    log.info("%d books, listening on port %d", Handler.catalogue.count(), server.server_port)
    server.serve_forever()


if __name__ == "__main__":
    main()
