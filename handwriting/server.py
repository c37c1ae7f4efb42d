"""The page of demo.py: the networks that one can choose there, and the server."""

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
from contextlib import suppress
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from socketserver import ThreadingTCPServer

import torch

from dataset import NUM_DIGITS
from handwriting.picture import MAX_PIXELS, read_picture
from handwriting.predictor import UNSURE, Predictor, load_model, predict
from handwriting.prepare import prepare
from recipes import RECIPES
from training.checkpoint import find_checkpoint, latest_runs, training_caveat
from training.console import UserError, warn

PAGE = Path(__file__).with_name("page.html")
PRETRAINED = Path(__file__).parent.parent / "results" / "tiny.pt"
FORMATS = {"image/png": "PNG", "image/jpeg": "JPEG", "image/webp": "WEBP"}
MAX_BYTES = 4_000_000  # of an image
TURN = 10  # seconds that a request waits for its turn
POLICY = "default-src 'none'; script-src 'nonce-{0}'; style-src 'nonce-{0}'; connect-src 'self'; "
POLICY += "img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
# Hosts in the address of the page, with any port, which ssh -L and containers change. Another
# website could reach the server by a name of its own that it points here, but not by these.
LOOPBACK = r"(localhost|127\.0\.0\.1|\[::1\])(:\d+)?"
NUMERIC = r"(localhost|[\d.]+|\[[\da-fA-F:.]+\])(:\d+)?"  # with --host


def load_networks(run=None):
    """The networks to choose from: that of `run`, of the latest runs, and the pretrained one."""
    networks = {os.path.realpath(find_checkpoint(run)): Network(run, run)} if run else {}
    found = [(path, path.parent, checkpoint) for path, checkpoint in latest_runs(RECIPES)]
    for path, name, checkpoint in [*found, (PRETRAINED, "pretrained", None)]:
        try:
            if os.path.realpath(path) not in networks:
                networks[os.path.realpath(path)] = Network(path, name, checkpoint)
        except UserError as error:
            warn(f"warning: {error}; skipped")
    if not networks:
        raise UserError("no usable network; train one with train.py")
    return list(networks.values())


class Network:
    """The trained network at a path, under a name in the list on the page."""

    def __init__(self, path, name, checkpoint=None):
        model, checkpoint = load_model(path, checkpoint)
        self.predictor, self.stages, self.dials = Predictor(model, checkpoint["recipe"]), [], []
        for layer in model.encoder.children():
            layer.register_forward_hook(self.record_maps)
        flags, history = checkpoint["flags"], checkpoint["history"]
        text = f"{flags['recipe']}, {len(history)} epoch{'s' * (len(history) > 1)}, "
        text += f"{100 * history[-1]['test_digit_accuracy']:.2f} % test accuracy"
        text += " on synthetic digits" if flags["dataset"] != "mnist" else ""
        self.texts = {"name": f"{text} ({name})", "caveat": training_caveat(flags), "dials": []}
        if hasattr(model.head, "numbers"):
            numbers = model.head.planes()  # (19, C)
            self.numbers = numbers / numbers.abs().square().mean().sqrt()  # about 1 long
            products = self.numbers[:NUM_DIGITS, None] * self.numbers[:NUM_DIGITS]  # (10, 10, C)
            self.highest = (products @ self.numbers.mH).real.max()  # score of a sum
            self.texts["dials"] = points(self.numbers)
            model.head.register_forward_hook(self.record_dials)

    def record_dials(self, head, inputs, output):
        """A hook: record how `ComplexNumbers` multiplies, and how it compares the product.

        A dial has the path from the digit to its product with the addend, (25, 2), and its part of
        the scores of the sums, (19,): added up they are the logits, but for a factor with which
        the highest of all is 1.
        """
        weights = torch.cat([output[0].softmax(dim=1), inputs[1]])  # (2, 10)
        digit, addend = weights.to(self.numbers.dtype) @ self.numbers[:NUM_DIGITS]  # (C,) each
        turned = torch.linspace(0, 1, 25)[:, None]  # parts of the way; a power of 0 would be NaN
        path = digit * torch.polar(addend.abs() ** turned, addend.angle() * turned)  # (25, C)
        scores = (path[-1] * self.numbers.conj()).real.T / self.highest  # (C, 19)
        pairs = zip(points(path), scores.tolist(), strict=True)
        self.dials = [{"path": path, "scores": scores} for path, scores in pairs]

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
        prepared, self.stages, self.dials = prepare(image), [], []
        record, digits, sums = predict(self.predictor, prepared, addend)
        record |= {"digit_probabilities": digits.tolist(), "sum_probabilities": sums.tolist()}
        record |= {"pixels": prepared.pixels.tolist(), "stages": self.stages, "dials": self.dials}
        return record | {"unsure": UNSURE}


def points(numbers):
    """Complex numbers (N, C) as lists of [real, imaginary] for each component: (C, N, 2)."""
    return torch.view_as_real(numbers.T).tolist()


class Server(ThreadingTCPServer):
    """Serves the page and predictions on an address of this computer, each request in a thread."""

    daemon_threads, request_queue_size = True, 512
    allow_reuse_address = sys.platform != "win32"  # there, two servers could share a port

    def __init__(self, networks, port=0, host="127.0.0.1"):
        self.networks, self.lock, self.warned = networks, threading.Lock(), False
        self.names = LOOPBACK if host == "127.0.0.1" else NUMERIC
        try:
            super().__init__((host, port), Handler)
        except OSError as error:
            raise UserError(f"cannot use port {port} of {host} ({error.strerror})") from error
        name = "127.0.0.1" if host == "0.0.0.0" else host
        self.url = f"http://{name}:{self.server_address[1]}/"


class Handler(BaseHTTPRequestHandler):
    """GET / returns the page; POST /predict?addend=N&network=I the record of the posted image."""

    timeout = 15  # seconds without a byte from the client

    def handle(self):
        with suppress(OSError):  # the client is gone
            super().handle()

    def is_allowed(self):
        """Whether the host in the address is one of ours; if not, the reason is the reply."""
        host = self.headers.get("Host", "")
        if re.fullmatch(self.server.names, host):
            return True
        reason = f"not served as {host!a:.80}: open {self.server.url} or see demo.py --host"
        if not self.server.warned:
            warn(f"warning: a request was refused: {reason}")
        self.server.warned = True
        self.send_error(403, reason)

    def do_GET(self):
        if not self.is_allowed():
            return
        if self.path.partition("?")[0] != "/":
            return self.send_error(404)
        nonce, page = secrets.token_urlsafe(), PAGE.read_text("utf-8")
        networks = json.dumps([network.texts for network in self.server.networks])
        page = page.replace("{{nonce}}", nonce).replace("{{networks}}", html.escape(networks))
        for name, limit in (("bytes", MAX_BYTES), ("pixels", MAX_PIXELS)):
            page = page.replace(f"{{{{max_{name}}}}}", str(limit))
        self.reply("text/html; charset=utf-8", page, POLICY.format(nonce))

    do_HEAD = do_GET

    def do_POST(self):
        if not self.is_allowed():  # before the body is read
            return
        kind, length = (self.headers.get(f"Content-{name}", "") for name in ("Type", "Length"))
        size = int(length) if length.isdecimal() else 0
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
            image = read_picture(io.BytesIO(body), [FORMATS[kind]])
            record = self.server.networks[index].predict(image, addend)
        except UserError as error:
            return self.send_error(400, str(error))
        finally:
            self.server.lock.release()
        self.reply("application/json", json.dumps(record))

    def reply(self, kind, text, policy=None):
        self.send_response(200)
        self.send_header("Content-Type", kind)
        if policy:
            self.send_header("Content-Security-Policy", policy)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(text.encode())

    def log_message(self, *args): ...
