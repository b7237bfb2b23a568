"""docs/examples runs: its request is what the product reads, and its answers are read."""

from __future__ import annotations

import base64
import importlib.util
import json
import sys
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest

from lib_pulid.fields import schema
from lib_pulid.units import PulidUnit, parse_args

EXAMPLE = Path(__file__).parents[1] / "docs" / "examples" / "api.py"


@pytest.fixture
def example():
    spec = importlib.util.spec_from_file_location("example_api", EXAMPLE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def webui():
    """A server that reads units as the product does, and answers with an image or an error."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            args = body["alwayson_scripts"]["PuLID"]["args"]
            assert self.path == "/sdapi/v1/txt2img" and set(args[0]) <= set(schema()["properties"])
            try:
                self.server.units = parse_args(args)
                status, answer = 200, {"images": [base64.b64encode(b"an image").decode()]}
            except ValueError as error:
                status, answer = 422, {"error": type(error).__name__, "detail": str(error)}
            self.send_response(status)
            self.end_headers()
            self.wfile.write(json.dumps(answer).encode())

        def log_message(self, *args):
            pass

    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


def test_api(example, webui, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("a.jpg").write_bytes(b"photo")
    url = ["--url", f"http://127.0.0.1:{webui.server_port}"]
    monkeypatch.setattr(sys, "argv", ["api.py", "a.jpg", "portrait", "-o", "b.png", *url])
    example.main()
    assert Path("b.png").read_bytes() == b"an image"
    assert webui.units == [(1, PulidUnit(images=(base64.b64encode(b"photo").decode(),)))]
    monkeypatch.setattr(sys, "argv", [*sys.argv, "--weight", "9"])
    with pytest.raises(SystemExit, match="422: PuLID unit 1, field weight: 9.0 is out of range"):
        example.main()
