"""A server of the page in a process of its own, and requests to it as any program may send them."""

import http.client
import json
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from library.page.server import Address, read_address
from tests.running import ROOT

START = """
import sys
from pathlib import Path
from library.page.security import Limits
from library.page.server import serve
sys.exit(serve(Path(sys.argv[1]), 0, sys.argv[2] or None, False, Limits(**eval(sys.argv[3]))))
"""


@dataclass(frozen=True)
class Server:
    """A server that runs."""

    process: "subprocess.Popen[str]"
    folder: Path
    address: Address

    @property
    def port(self) -> int:
        return int(self.address.url.rstrip("/").rpartition(":")[2])

    @property
    def cookie(self) -> dict[str, str]:
        """The header of the browser that the first address was opened in."""
        return {"Cookie": f"page_token_{self.port}={self.address.token}"}

    @property
    def own(self) -> dict[str, str]:
        """The headers that the page's scripts send."""
        return {"X-Page-Token": self.address.token, "Origin": self.address.url.rstrip("/"), **self.cookie}

    def send(
        self, method: str, path: str, body: Any = None, headers: Mapping[str, str] | None = None
    ) -> tuple[int, bytes, Mapping[str, str]]:
        """Return status, body and headers of an answer. A path is sent as it is, the cookie unless headers have one."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        try:
            connection.request(method, path, body=body, headers={**self.cookie, **(headers or {})})
            answer = connection.getresponse()
            return answer.status, answer.read(), dict(answer.getheaders())
        finally:
            connection.close()

    def post(self, path: str, values: Mapping[str, Any]) -> tuple[int, dict[str, Any]]:
        status, body, _ = self.send("POST", path, json.dumps(values), self.own)
        return status, json.loads(body)


@contextmanager
def serving(folder: Path, listen: str = "", **limits: Any) -> Iterator[Server]:
    """Serve the page of a folder inside the block."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "HOME": str(folder.parent)}
    process = subprocess.Popen(
        [sys.executable, "-c", START, str(folder), listen, repr(limits)],
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stdout is not None
        assert process.stdout.readline().startswith("The page is http://")
        address = read_address(folder / "output" / "page" / "server.json")
        assert address is not None
        yield Server(process, folder, address)
    finally:
        process.terminate()
        process.communicate(timeout=60)
