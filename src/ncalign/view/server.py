"""A read-only server of an index, for this machine alone.

It listens on 127.0.0.1; what it serves lies under a path that nobody guesses, since other users of the machine reach its ports;
and it answers requests for this host alone, so that no page from elsewhere reads it under a name of its own (DNS rebinding).
"""

from __future__ import annotations

import contextlib
import json
import secrets
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from werkzeug.exceptions import BadRequest, HTTPException, MethodNotAllowed, NotFound
from werkzeug.serving import BaseWSGIServer, WSGIRequestHandler, make_server
from werkzeug.wrappers import Request, Response

from ncalign.view.facts import shown
from ncalign.view.index import open_index
from ncalign.view.page import page, policy
from ncalign.view.queries import Query

HOST = "127.0.0.1"
_NAMES = (HOST, "localhost")
_AT_ONCE = 2
"""Questions under way: each takes memory of its own."""
_SECONDS = 30
"""After which a connection that says nothing is closed."""
_HEADERS = {
    "Cache-Control": "no-store",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
}
_Application = Callable[[dict[str, Any], Callable[..., Any]], Any]


class _Handler(WSGIRequestHandler):
    timeout = _SECONDS

    def log(self, type: str, message: str, *args: Any) -> None:
        """Say nothing: requests hold the path, and what is searched for."""

    def version_string(self) -> str:
        """What the server calls itself."""
        return "ncalign"


def application(index: Path, secret: str, *, beta: float) -> _Application:
    """A WSGI application that answers ``/SECRET/`` with the page and ``/SECRET/groups`` with the groups of a query, as JSON.

    Args:
        index: the file that :func:`ncalign.view.index.write_index` has written.
        secret: the part of the path without which nothing is answered.
        beta: of the kernel.
    """
    with closing(open_index(index)) as opened:
        html = page(opened.about, beta=beta, groups=None)
    turn = threading.BoundedSemaphore(_AT_ONCE)

    def answer(request: Request) -> Response:
        path = request.path.split("/")
        request.host  # noqa: B018 - raises where it is not one of ours
        if len(path) != 3 or not secrets.compare_digest(path[1].encode(), secret.encode()):
            raise NotFound
        if request.method not in ("GET", "HEAD"):
            raise MethodNotAllowed(["GET", "HEAD"])
        if path[2] == "":
            return Response(html, mimetype="text/html")
        if path[2] != "groups":
            raise NotFound
        try:
            query = Query.model_validate(request.args.to_dict())
        except ValidationError as error:
            raise BadRequest(error.errors(include_url=False, include_input=False, include_context=False)[0]["msg"]) from error
        with turn, closing(open_index(index)) as opened:
            found = opened.search(query)
        groups = [shown(entry, place, beta=beta) for place, entry in found.entries]
        return Response(json.dumps({"total": found.total, "groups": groups}), mimetype="application/json")

    def respond(environ: dict[str, Any], start: Callable[..., Any]) -> Any:
        request = Request(environ)
        request.trusted_hosts, request.max_content_length = [*_NAMES], 0
        try:
            response = answer(request)
        except HTTPException as error:
            response = Response(f"{error.code} {error.name}: {error.description}\n", status=error.code, mimetype="text/plain")
            if isinstance(error, MethodNotAllowed):
                response.headers["Allow"] = "GET, HEAD"
        response.headers.update(_HEADERS)
        response.headers["Content-Security-Policy"] = f"{policy(asks=True)}; frame-ancestors 'none'"
        return response(environ, start)

    return respond


@contextlib.contextmanager
def listening(index: Path, *, port: int, beta: float) -> Iterator[tuple[BaseWSGIServer, str]]:
    """A server that listens, and its address; closed at the end.

    Raises:
        ValueError: the port is taken, or may not be used.
    """
    secret = secrets.token_urlsafe(16)
    app = application(index, secret, beta=beta)
    with socket.socket() as own:
        try:
            own.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            own.bind((HOST, port))
        except OSError as error:
            reason = error.strerror or error
            raise ValueError(
                f"port: {port} can't be listened on ({reason}): give another, or 0 for any that is free"
            ) from error
        own.listen()
        server = make_server(HOST, port, app, threaded=True, request_handler=_Handler, fd=own.fileno())
        try:
            yield server, f"http://{HOST}:{own.getsockname()[1]}/{secret}/"
        finally:
            server.server_close()
