"""Google Cloud Storage, as far as an S3 server can stand in for it: their XML interfaces agree in what tiers need."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.client import HTTPConnection
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from cakekv.bench.servers import seaweedfs_behind

ASKED = ("range", "content-length", "content-type")
LENGTHS = ("content-length", "transfer-encoding", "connection")


def account(folder: Path) -> Any:
    """A file with a service account that needs no token."""
    file = folder / "account.json"
    keys = dict.fromkeys(("client_email", "private_key", "private_key_id"), "")
    file.write_text(json.dumps({"disable_oauth": True, **keys}))
    return file


@contextmanager
def gcs(folder: Path) -> Iterator[Any]:
    """SeaweedFS with a bucket named "bucket", which everybody may use. Yields the address of a proxy before it.

    The proxy leaves out Google's header of authorisation, which SeaweedFS would not have, even without a token.
    """
    with seaweedfs_behind(folder=folder, anonymous=True) as url:
        port = int(url.partition("127.0.0.1:")[2].partition("&")[0])

        class Proxy(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def pass_on(self) -> None:
                headers = {name: value for name, value in self.headers.items() if name.lower() in ASKED}
                server = HTTPConnection("127.0.0.1", port, timeout=60)
                server.request(self.command, self.path, self.rfile.read(int(headers.get("content-length", 0))), headers)
                answer = server.getresponse()
                body = answer.read()
                self.send_response(answer.status)
                kept = [(name, value) for name, value in answer.getheaders() if name.lower() not in LENGTHS]
                length = answer.getheader("Content-Length") if self.command == "HEAD" else len(body)
                for name, value in [*kept, ("Content-Length", str(length))]:
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(body)
                server.close()

            do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = pass_on

            def log_message(self, *_: Any) -> None:
                pass

        with ThreadingHTTPServer(("127.0.0.1", 0), Proxy) as proxy:
            threading.Thread(target=proxy.serve_forever, daemon=True).start()
            try:
                yield f"http://127.0.0.1:{proxy.server_port}"
            finally:
                proxy.shutdown()
