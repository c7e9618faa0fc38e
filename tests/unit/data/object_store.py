"""A local S3 server (moto) whose responses can be cut off, delayed and counted."""

import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

BUCKET = "pictures"
SECRET = "s3cr3t-of-the-tests"


@dataclass
class Request:
    """A request for an object that was answered."""

    key: str
    range: str | None
    num_bytes: int


@dataclass
class ObjectStore:
    """The server and the faults that it simulates."""

    url: str
    requests: list[Request] = field(default_factory=list)
    cuts: int = 0  # the number of responses to cut off after half of their bytes
    wait_s: float = 0.0  # the delay before each response
    waits: int = 0  # the number of responses to delay
    statuses: list[str] = field(default_factory=list)  # statuses of the next responses, sent instead of the object

    @property
    def num_bytes(self) -> int:
        return sum(request.num_bytes for request in self.requests)

    def fill(self, folder: Path, prefix: str = "") -> None:
        """Put the files of a folder into the bucket."""
        import boto3

        client = boto3.client("s3")
        for file in sorted(path for path in folder.iterdir() if path.is_file() and not path.name.startswith(".")):
            client.put_object(Bucket=BUCKET, Key=f"{prefix}{file.name}", Body=file.read_bytes())

    def reset(self) -> None:
        """Empty the bucket, forget the requests and stop simulating faults."""
        import boto3

        for entry in boto3.client("s3").list_objects_v2(Bucket=BUCKET).get("Contents", []):
            self.remove(entry["Key"])
        self.requests.clear()
        self.cuts, self.waits, self.statuses = 0, 0, []

    def remove(self, key: str) -> None:
        import boto3

        boto3.client("s3").delete_object(Bucket=BUCKET, Key=key)


class FaultyApp:
    """A WSGI wrapper around the server that counts responses to GET and simulates the faults."""

    def __init__(self, app: Callable[..., Iterable[bytes]], store: ObjectStore) -> None:
        self.app, self.store, self.lock = app, store, threading.Lock()

    def __call__(self, environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
        if environ["REQUEST_METHOD"] != "GET" or "list-type" in environ.get("QUERY_STRING", ""):
            return self.app(environ, start_response)
        with self.lock:
            status = self.store.statuses.pop(0) if self.store.statuses else None
            is_cut, self.store.cuts = self.store.cuts > 0 and status is None, max(0, self.store.cuts - 1)
            waits, self.store.waits = self.store.waits > 0, max(0, self.store.waits - 1)
        if waits:
            time.sleep(self.store.wait_s)
        if status is not None:
            start_response(status, [("Content-Length", "0")])
            return [b""]
        body = b"".join(self.app(environ, start_response))
        request = Request(environ["PATH_INFO"].rpartition("/")[2], environ.get("HTTP_RANGE"), len(body))
        with self.lock:
            self.store.requests.append(request)
        return cut(body) if is_cut else [body]


def cut(body: bytes) -> Iterator[bytes]:
    """Yield half of a response, then close the connection."""
    yield body[: len(body) // 2]
    raise ConnectionAbortedError("the test cuts it off")


@contextmanager
def object_store(monkeypatch: Any) -> Iterator[ObjectStore]:
    """Start a server with an empty bucket and set its address and credentials in the environment."""
    import boto3
    from moto.moto_server.werkzeug_app import DomainDispatcherApplication, create_backend_app
    from werkzeug.serving import WSGIRequestHandler, make_server

    class Silent(WSGIRequestHandler):
        protocol_version = "HTTP/1.1"

        def log(self, *args: Any) -> None:
            pass

    store = ObjectStore("")
    server = make_server(
        "127.0.0.1",
        0,
        FaultyApp(DomainDispatcherApplication(create_backend_app), store),
        threaded=True,
        request_handler=Silent,
    )
    store.url = f"http://127.0.0.1:{server.server_port}"
    values = {"ENDPOINT_URL": store.url, "ACCESS_KEY_ID": "a-key", "SECRET_ACCESS_KEY": SECRET}
    for name, value in {**values, "DEFAULT_REGION": "us-east-1", "MAX_ATTEMPTS": "1"}.items():
        monkeypatch.setenv(f"AWS_{name}", value)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        boto3.client("s3").create_bucket(Bucket=BUCKET, ACL="public-read")
        yield store
    finally:
        server.shutdown()
        server.server_close()
