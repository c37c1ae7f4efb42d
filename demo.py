"""Draw a digit in the browser and see what a trained network predicts.

python demo.py                           # the latest run, or results/tiny.pt if there is none
python demo.py runs/default --port 8080
"""

import html
import io
import json
import re
import secrets
import socket
import sys
import threading
import webbrowser
from contextlib import suppress
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from socketserver import ThreadingTCPServer

from inference.handwriting import prepare, read_picture
from inference.predictor import Predictor, load_model, make_record, predict, training_caveat
from recipes import RECIPES
from support.checkpoint import latest_runs
from support.cli import Parser, exit_status, number
from support.console import log
from support.errors import UserError

ROOT = Path(__file__).parent
FORMATS = {"image/png": "PNG", "image/jpeg": "JPEG", "image/webp": "WEBP"}
MAX_BYTES, DEADLINE = 4_000_000, 10  # of an image; seconds for a request and its reply
POLICY = "default-src 'none'; script-src 'nonce-{0}'; style-src 'nonce-{0}'; connect-src 'self'; "
POLICY += "img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"


def parse_args(argv):
    parser = Parser(prog="demo.py", description=__doc__)
    flag = parser.add_argument
    text = "run directory or checkpoint (default: the latest, without dry runs)"
    flag("run", nargs="?", help=text)
    flag("--port", type=number(int, 1024, 65535), default=0, help="default: a free one")
    flag("--no-browser", action="store_true", help="only print the URL")
    return parser.parse_args(argv)


@exit_status
def main(argv):
    """Serve the page until Ctrl-C."""
    args = parse_args(argv)
    runs = (path for path, _ in latest_runs(RECIPES))
    run = args.run or next(runs, ROOT / "results" / "tiny.pt")
    with Server(run, args.port) as server:
        url = f"http://{server.hosts[0]}/"
        log(f"{run}: {url} (Ctrl-C to stop)")
        if not args.no_browser:  # in a thread, because a browser in the terminal blocks
            threading.Thread(target=webbrowser.open, args=[url], daemon=True).start()
        server.serve_forever()


class Server(ThreadingTCPServer):
    """Serves the page and the predictions of a run on 127.0.0.1, each request in a thread."""

    daemon_threads, request_queue_size = True, 128
    allow_reuse_address = sys.platform != "win32"  # there, two servers could share a port

    def __init__(self, run, port=0):
        model, checkpoint = load_model(run)
        self.predictor, self.lock = Predictor(model, checkpoint["recipe"]), threading.Lock()
        self.texts = {"run": str(run), "caveat": training_caveat(checkpoint["flags"])}
        try:
            super().__init__(("127.0.0.1", port), Handler)
        except OSError as error:
            raise UserError(f"cannot use port {port} ({error.strerror})") from error
        self.hosts = [f"{name}:{self.server_address[1]}" for name in ("127.0.0.1", "localhost")]


class Handler(BaseHTTPRequestHandler):
    """GET / returns the page; POST /predict?addend=N returns the record of the posted image."""

    def handle(self):
        deadline = threading.Timer(DEADLINE, self.hang_up)
        deadline.daemon = True  # the program can end before it
        deadline.start()
        try:
            super().handle()
        except OSError:  # the client is gone or too slow
            pass
        finally:
            deadline.cancel()

    def hang_up(self):
        with suppress(OSError):  # the client is gone
            self.connection.shutdown(socket.SHUT_RDWR)

    def do_GET(self):
        if self.headers.get("Host") not in self.server.hosts or self.path != "/":
            return self.send_error(403 if self.path == "/" else 404)
        nonce, page = secrets.token_urlsafe(), (ROOT / "inference" / "page.html").read_text("utf-8")
        for name, text in {"nonce": nonce, **self.server.texts}.items():
            page = page.replace(f"{{{{{name}}}}}", html.escape(text))
        self.reply("text/html; charset=utf-8", page, POLICY.format(nonce))

    def do_POST(self):
        kind, length = (self.headers.get(f"Content-{name}", "") for name in ("Type", "Length"))
        size = int(length[:9]) if length.isdecimal() else 0
        body = self.rfile.read(size if size <= MAX_BYTES else 0)
        addend = re.fullmatch(r"/predict\?addend=([0-9])", self.path)
        checks = {403: self.headers.get("Host") in self.server.hosts, 404: addend}
        checks |= {415: kind in FORMATS, 411: length.isdecimal(), 413: size <= MAX_BYTES}
        if failed := [status for status, passed in checks.items() if not passed]:
            return self.send_error(failed[0])
        try:
            with self.server.lock:
                prepared = prepare(read_picture(io.BytesIO(body), [FORMATS[kind]]))
                (digits,), (sums,) = predict(self.server.predictor, [prepared], int(addend[1]))
        except UserError as error:
            return self.send_error(400, str(error))
        record = make_record("-", prepared, digits, sums, int(addend[1]))
        record |= {"digit_probabilities": digits.tolist(), "sum_probabilities": sums.tolist()}
        record |= {"pixels": prepared.pixels.tolist()}
        self.reply("application/json", json.dumps(record), "default-src 'none'")

    def reply(self, kind, text, policy):
        self.send_response(200)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Security-Policy", policy)
        self.end_headers()
        self.wfile.write(text.encode(errors="replace"))  # a path may not be valid text

    def log_message(self, *args): ...


if __name__ == "__main__":
    sys.exit(main())
