"""Draw a digit in the browser and see what a trained network predicts.

python demo.py                           # all runs, latest first, and results/tiny.pt
python demo.py runs/default --port 8080
"""

import base64
import html
import io
import json
import os
import re
import secrets
import select
import socket
import sys
import threading
import webbrowser
from contextlib import suppress
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from socketserver import ThreadingTCPServer

from handwriting.picture import read_picture
from handwriting.predictor import UNSURE, Predictor, load_model, predict
from handwriting.prepare import prepare
from recipes import RECIPES
from training.checkpoint import find_checkpoint, latest_runs, training_caveat
from training.cli import Parser, exit_status, number
from training.console import log, warn
from training.errors import UserError

ROOT = Path(__file__).parent
PRETRAINED = ROOT / "results" / "tiny.pt"
FORMATS = {"image/png": "PNG", "image/jpeg": "JPEG", "image/webp": "WEBP"}
MAX_BYTES, MAX_PIXELS = 4_000_000, 24_000_000  # of an image
TURN = 10  # seconds that a request waits for its turn
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
    with Server(load_networks(args.run), args.port) as server:
        url = f"http://{server.hosts[0]}/"
        log(f"{server.networks[0].texts['name']}: {url} (Ctrl-C to stop)")
        if not args.no_browser:  # in a thread, because a browser in the terminal blocks
            threading.Thread(target=webbrowser.open, args=[url], daemon=True).start()
        server.serve_forever()


def load_networks(run=None):
    """The networks to choose from: that of `run`, of the latest runs, and the pretrained one."""
    networks = {os.path.realpath(find_checkpoint(run)): Network(run, run)} if run else {}
    latest = [(path, path.parent) for path, _ in latest_runs(RECIPES)]
    for path, name in [*latest, (PRETRAINED, "pretrained")]:
        try:
            if os.path.realpath(path) not in networks:
                networks[os.path.realpath(path)] = Network(path, name)
        except UserError as error:
            warn(f"warning: {error}; skipped")
    if not networks:
        raise UserError("no usable network; train one with train.py")
    return list(networks.values())


class Network:
    """The trained network at a path, under a name in the list on the page."""

    def __init__(self, path, name):
        model, checkpoint = load_model(path)
        self.predictor, self.stages = Predictor(model, checkpoint["recipe"]), []
        for layer in model.members[0].encoder.children():
            layer.register_forward_hook(self.record_maps)
        recipe, history = checkpoint["flags"]["recipe"], checkpoint["history"]
        text = f"{recipe}, {len(history)} epoch{'s' * (len(history) > 1)}, "
        text += f"{100 * history[-1]['test_digit_accuracy']:.2f} % test accuracy ({name})"
        self.texts = {"name": text, "caveat": training_caveat(checkpoint["flags"])}

    def record_maps(self, layer, inputs, output):
        """A hook: record at most 16 feature maps of a layer, those with the largest range first.

        Those of a layer without weights, such as pooling, replace those of the layer before it.
        """
        has_weights = any(parameter.ndim > 1 for parameter in layer.parameters())
        if output.ndim == 4 and output.shape[-1] > 1 and (has_weights or self.stages):
            maps = output[0] - output[0].amin((1, 2), keepdim=True)  # (C, H, W)
            strengths, order = maps.amax((1, 2)).sort(descending=True)
            maps = (maps[order[:16]] * 255 / strengths[0].clamp(min=1e-9)).byte()
            stage = {"maps": base64.b64encode(maps.numpy()).decode(), "shape": output.shape[1:]}
            self.stages = self.stages[: None if has_weights else -1] + [stage]

    def predict(self, image, addend):
        """The prediction for a Pillow image, with all that the page shows, in JSON types."""
        prepared, self.stages = prepare(image), []
        record, digits, sums = predict(self.predictor, prepared, addend)
        record |= {"digit_probabilities": digits.tolist(), "sum_probabilities": sums.tolist()}
        record |= {"pixels": prepared.pixels.tolist(), "stages": self.stages}
        return record | {"unsure": UNSURE}


class Server(ThreadingTCPServer):
    """Serves the page and predictions on 127.0.0.1, each request in a thread."""

    daemon_threads, request_queue_size = True, 512
    allow_reuse_address = sys.platform != "win32"  # there, two servers could share a port

    def __init__(self, networks, port=0):
        self.networks, self.lock = networks, threading.Lock()
        try:
            super().__init__(("127.0.0.1", port), Handler)
        except OSError as error:
            raise UserError(f"cannot use port {port} ({error.strerror})") from error
        self.hosts = [f"{name}:{self.server_address[1]}" for name in ("127.0.0.1", "localhost")]


class Handler(BaseHTTPRequestHandler):
    """GET / returns the page; POST /predict?addend=N&network=I the record of the posted image."""

    timeout = 15  # seconds without a byte from the client

    def handle(self):
        with suppress(OSError):  # the client is gone
            super().handle()

    def do_GET(self):
        if self.headers.get("Host") not in self.server.hosts or self.path != "/":
            return self.send_error(403 if self.path == "/" else 404)
        nonce, page = (
            secrets.token_urlsafe(),
            (ROOT / "handwriting/page.html").read_text("utf-8"),
        )
        networks = json.dumps([network.texts for network in self.server.networks])
        page = page.replace("{{nonce}}", nonce).replace("{{networks}}", html.escape(networks))
        self.reply("text/html; charset=utf-8", page, POLICY.format(nonce))

    def do_POST(self):
        if self.headers.get("Host") not in self.server.hosts:
            return self.send_error(403)  # before the body is read
        kind, length = (self.headers.get(f"Content-{name}", "") for name in ("Type", "Length"))
        size = int(length[:9]) if length.isdecimal() else 0
        body = self.rfile.read(size if size <= MAX_BYTES else 0)
        query = re.fullmatch(r"/predict\?addend=([0-9])(?:&network=([0-9]{1,3}))?", self.path)
        addend, index = (int(value or 0) for value in query.groups()) if query else (0, 0)
        checks = {404: query and index < len(self.server.networks), 415: kind in FORMATS}
        checks |= {411: length.isdecimal(), 413: size <= MAX_BYTES}
        if failed := [status for status, passed in checks.items() if not passed]:
            return self.send_error(failed[0])
        if not self.server.lock.acquire(timeout=TURN):
            return self.send_error(503, "demo.py is busy; try again")
        try:
            readable, _, _ = select.select([self.connection], [], [], 0)
            if readable and not self.connection.recv(1, socket.MSG_PEEK):
                return  # the client is gone
            image = read_picture(io.BytesIO(body), [FORMATS[kind]], MAX_PIXELS)
            record = self.server.networks[index].predict(image, addend)
        except UserError as error:
            return self.send_error(400, str(error))
        finally:
            self.server.lock.release()
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
