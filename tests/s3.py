"""S3 on loopback whose requests pass through something first."""

import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from moto.moto_server.werkzeug_app import (
    DomainDispatcherApplication,
    MotoRequestHandler,
    create_backend_app,
)
from werkzeug.serving import make_server

# Any: a WSGI application, which werkzeug types by its own stubs alone.
Application = Callable[[dict[str, Any], Any], Iterable[bytes]]


@contextmanager
def s3_behind(wrapper: Callable[[Application], Application]) -> Iterator[tuple[str, Any]]:
    """What is stored is that of every endpoint of this process. Yields the URL and what `wrapper`
    made of the endpoint's application."""
    application = wrapper(DomainDispatcherApplication(create_backend_app))
    server = make_server(
        "127.0.0.1", 0, application, threaded=True, request_handler=MotoRequestHandler
    )
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", application
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
