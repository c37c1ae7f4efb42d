"""demo.py: its server, and its page in Chromium."""

import base64
import http.client
import io
import json
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

import pytest
import torch
from conftest import ROOT
from PIL import Image, ImageDraw
from torch.func import functional_call

import demo
import train
from benchmarks.drawings import STYLES
from handwriting import predictor, server
from handwriting.picture import read_picture
from handwriting.prepare import NO_INK, prepare
from model import build_model
from recipes import RECIPES

MNIST_DIR = os.environ.get("MNIST_DIR")
PNG = {"Content-Type": "image/png"}
STROKES = dict(reversed(STYLES))  # the first style of each digit


def trained(path, *flags):
    assert train.main(["--recipe", "fast", "--quiet", "--output-dir", str(path), *flags]) == 0
    return path


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run of `fast` on MNIST, or else a dry run on synthetic digits."""
    data = ["--data-dir", MNIST_DIR] if MNIST_DIR else ["--dataset", "synthetic", "--dry-run"]
    return trained(tmp_path_factory.mktemp("run"), *data)


@pytest.fixture(scope="module")
def other(tmp_path_factory):
    """A dry run with a head that has no complex numbers, which is not the head of its recipe."""
    flags = ["--head", "OuterProduct", "--dataset", "synthetic", "--dry-run"]
    return trained(tmp_path_factory.mktemp("other"), *flags)


@pytest.fixture(scope="module")
def site(run, other):
    with server.Server([server.Network(run, "run"), server.Network(other, "other")]) as site:
        threading.Thread(target=site.serve_forever, daemon=True).start()
        yield site
        site.shutdown()


def drawing(digit, side=280):
    image = Image.new("L", (side, side), "white")
    for stroke in STROKES[digit]:
        points = [(side * (0.25 + x / 2), side * (0.2 + 0.6 * y)) for x, y in stroke]
        ImageDraw.Draw(image).line(points, "black", side // 12, "curve")
    return image


def encode(image, kind="PNG"):
    image.save(content := io.BytesIO(), kind)
    return content.getvalue()


def request(site, method="POST", path="/predict?addend=5", body=None, headers=PNG):
    """Returns the status, the headers and the body of the reply."""
    connection = http.client.HTTPConnection("127.0.0.1", site.server_address[1], timeout=30)
    connection.request(method, path, body, headers)
    reply = connection.getresponse()
    return reply.status, reply.headers, reply.read()


def predicted(site, body, addend=5):
    status, _, content = request(site, path=f"/predict?addend={addend}", body=body)
    assert status == 200, content
    return json.loads(content)


def from_python(run, image, addend):
    """The record of an image without the server."""
    model, checkpoint = predictor.load_model(run)
    network = predictor.Predictor(model, checkpoint["recipe"])
    return predictor.predict(network, prepare(read_picture(io.BytesIO(image))), addend)[0]


def test_the_record(site, run):
    image = encode(drawing(7))
    record = predicted(site, image, 3)
    assert record | from_python(run, image, 3) == record
    assert len(record["pixels"]) == len(record["pixels"][0]) == 28
    assert max(record["digit_probabilities"]) == record["digit_probability"]
    assert record["sum_probabilities"][record["sum"]] == record["sum_probability"]
    blank = predicted(site, encode(Image.new("L", (100, 100), "white")))
    assert (blank["digit"], blank["sum"], blank["warnings"]) == (None, None, [NO_INK])


@pytest.mark.parametrize(
    "status, change",
    [
        (200, {"headers": {"Content-Type": "image/webp"}, "body": encode(drawing(1), "WEBP")}),
        (200, {"method": "GET", "path": "/?x=1"}),
        (404, {"method": "GET", "path": "/../demo.py"}),
        (404, {"path": "/predict?addend=10"}),
        (404, {"path": "/predict?addend=1&network=2"}),
        (415, {"headers": {"Content-Type": "image/svg+xml"}}),
        (411, {"headers": PNG | {"Content-Length": "-5"}, "body": None}),
        (413, {"headers": PNG | {"Content-Length": "4000001"}, "body": None}),
        (400, {"body": encode(drawing(3))[:-500]}),
        (400, {"body": encode(Image.new("1", (10_000, 10_000)))}),
        (400, {"body": encode(drawing(3), "GIF")}),
        (501, {"method": "PUT"}),
    ],
)
def test_requests(site, status, change):
    assert request(site, **{"body": b"", **change})[0] == status


def test_the_page_allows_only_its_own_script(site):
    replies = [request(site, method, "/", headers={}) for method in ("GET", "GET", "HEAD")]
    nonces = {re.search("script-src 'nonce-(.+?)'", str(headers))[1] for _, headers, _ in replies}
    assert len(nonces) == 3 and all("default-src 'none'" in str(reply[1]) for reply in replies)
    assert [status for status, _, _ in replies] == [200] * 3 and replies[2][2] == b""
    for _, headers, body in replies[:2]:
        (nonce,) = re.findall(b'<script nonce="(.+?)">', body)
        assert nonce.decode() in str(headers) and b"{{" not in body


def head(size, host="localhost"):
    lines = ["POST /predict?addend=5 HTTP/1.1", f"Host: {host}", "Content-Type: image/png"]
    return "\r\n".join([*lines, f"Content-Length: {size}", "", ""]).encode()


def test_bad_requests_do_not_stop_the_server(site, monkeypatch):
    """Noise, bodies that are too large or too short, and silence; and clients that are gone."""
    monkeypatch.setattr(server.Handler, "timeout", 2)
    image, clients = encode(drawing(4)), []
    for i in range(60):
        noise = random.Random(i).randbytes(2000)
        bodies = noise, head(9_999_999) + noise, head(90_000) + image, head(len(image)) + image
        clients.append(socket.create_connection(site.server_address, timeout=30))
        clients[-1].sendall(bodies[i % 4])
        if i % 4 == 3:
            clients[-1].close()
    assert predicted(site, image)["digit"] is not None  # among them
    for client in clients[::4] + clients[1::4] + clients[2::4]:
        with client, suppress(ConnectionError):
            while client.recv(65536):  # raises TimeoutError after 30 seconds
                pass


def test_a_busy_server(site, monkeypatch):
    """Requests wait for their turn, but not for too long."""
    image = encode(drawing(4))
    with ThreadPoolExecutor(20) as pool:
        assert set(pool.map(lambda _: request(site, body=image)[0], range(40))) == {200}
    monkeypatch.setattr(server, "TURN", 0.01)
    with site.lock:
        assert request(site, body=image)[0] == 503


LOOPBACK = ["127.0.0.1:1234", "localhost", "localhost:80", "[::1]:9"]
NUMERIC = ["192.168.1.5", "10.0.0.1:8000", "[fe80::1]:80"]
NAMES = ["example.com", "localhost.example.com", "127.0.0.1.example.com:80", "1.2.3.4x", ""]


@pytest.mark.parametrize("host, allowed", [("127.0.0.1", []), ("0.0.0.0", NUMERIC)])
def test_the_names_of_the_page(host, allowed, capsys):
    """Those that another website cannot have; the reason is in the reply and once on stderr."""
    with server.Server([], host=host) as site:
        threading.Thread(target=site.serve_forever, daemon=True).start()
        for name in LOOPBACK + NUMERIC + NAMES:
            status, _, body = request(site, "GET", "/", headers={"Host": name})
            assert status == (200 if name in LOOPBACK + allowed else 403), name
            assert status == 200 or b"--host" in body
        with socket.create_connection(("127.0.0.1", site.server_address[1]), 5) as client:
            client.sendall(head(1000, "example.com"))  # and its body is not read
            assert client.recv(100).startswith(b"HTTP/1.0 403")
        site.shutdown()
    assert capsys.readouterr().err.count("--host") == 1


def save(checkpoint, name):
    os.makedirs(f"runs/{name}")
    torch.save(checkpoint, f"runs/{name}/last.pt")


def test_the_list(run, other, tmp_path, monkeypatch, capsys):
    """Usable runs, in the order of their ends and not of their files, and the pretrained one."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(server, "PRETRAINED", other / "last.pt")
    saved = torch.load(run / "last.pt", weights_only=True)
    saved["flags"] |= {"dry_run": False, "dataset": "mnist"}
    save(saved, "new")
    save(saved | {"time": saved["time"] - 9}, "old")
    save(saved | {"recipe": saved["recipe"] | {"head": "Gone"}}, "no-head")
    save(saved | {"network": {}}, "changed")
    for name in ("gone-a", "gone-b"):
        save(saved | {"flags": saved["flags"] | {"recipe": "gone"}}, name)
    names = [network.texts["name"] for network in server.load_networks()]
    assert [name.partition("(")[2] for name in names] == ["runs/new)", "runs/old)", "pretrained)"]
    assert ["synthetic" in name for name in names] == [False, False, True]
    lines = capsys.readouterr().err.splitlines()
    assert sorted(len(re.findall("no-head|changed|gone-", line)) for line in lines) == [1, 1, 2]
    assert len(server.load_networks("runs/old")) == 3  # each only once


def test_the_feature_maps(site):
    """The strongest of the last stage, against the layers called one by one."""
    network = site.networks[0]
    record = network.predict(drawing(3), 5)
    x = torch.tensor(record["pixels"])[None, None] / 255
    x = (x - network.predictor.recipe["mean"]) / network.predictor.recipe["std"]
    x = network.predictor.model.encoder[:3](x)[0]  # (48, 4, 4)
    x = x - x.amin((1, 2), keepdim=True)
    maps = torch.tensor(list(base64.b64decode(record["stages"][-1]["maps"]))).view(16, 4, 4)
    assert (maps[0] - x[x.amax((1, 2)).argmax()] / x.max() * 255).abs().max() < 1.01


@pytest.mark.parametrize("recipe", RECIPES)
def test_every_recipe_can_be_shown(recipe, monkeypatch):
    model = build_model(RECIPES[recipe].encoder, RECIPES[recipe].head).eval()
    saved = {"recipe": RECIPES[recipe].as_plain(), "history": [{"test_digit_accuracy": 0.1}]}
    saved["flags"] = {"recipe": recipe, "dataset": "mnist", "dry_run": False}
    monkeypatch.setattr(server, "load_model", lambda *args: (model, saved))
    network = server.Network("path", "name")
    for _ in range(2):  # the second record has only its own maps
        record = network.predict(drawing(7), 0)
    convolutions = sum(parameter.ndim == 4 for parameter in model.encoder.parameters())
    assert min(2, convolutions) <= len(record["stages"]) <= convolutions
    assert bool(record["dials"]) == (RECIPES[recipe].head.__name__ == "ComplexNumbers")


def test_the_dials_are_those_of_the_head(site):
    """Against the head with all components but one set to zero."""
    network, calls = site.networks[0], []
    head = network.predictor.model.head
    hook = head.register_forward_hook(lambda _, *call: calls.append(call))
    dials = network.predict(drawing(7), 5)["dials"]
    hook.remove()
    inputs, (digit_logits, sum_logits) = calls[0]
    points = torch.view_as_complex(torch.tensor(network.texts["dials"])).T  # (19, C)
    numbers = torch.complex(*head.numbers)
    unit = numbers.norm() / points.norm()
    distances = (unit * points[:, :, None] - numbers[:, None, :]).abs().amax(dim=0)
    order = distances.argmin(dim=1)  # the component of each dial
    assert len(set(order.tolist())) == len(order) and distances.amin(dim=1).max() < 1e-5
    scores = torch.tensor([dial["scores"] for dial in dials])  # (C, 19)
    factor = sum_logits.norm() / scores.sum(dim=0).norm()
    assert torch.allclose(factor * scores.sum(dim=0), sum_logits[0], atol=1e-4)
    paths = torch.view_as_complex(torch.tensor([dial["path"] for dial in dials]))  # (C, 25)
    digit = digit_logits[0].softmax(dim=0).to(points.dtype) @ points[:10]
    assert torch.allclose(paths[:, 0], digit, atol=1e-5)
    assert torch.allclose(paths[:, -1], digit * points[5], atol=1e-5)
    for component, score in zip(order.tolist(), scores, strict=True):
        alone = torch.zeros_like(head.numbers)
        alone[:, :, component] = head.numbers[:, :, component]
        _, logits = functional_call(head, {"numbers": alone}, inputs)
        assert torch.allclose(factor * score, logits[0], atol=1e-4)


@pytest.mark.parametrize(
    "status, flags",
    [(1, "nowhere"), (1, "RUN --port USED"), (1, "RUN --host 192.0.2.1"), (2, "")]
    + [(2, "--port 0"), (2, "--host localhost")],
)
def test_errors_are_one_line(site, run, tmp_path, monkeypatch, capsys, status, flags):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(server, "PRETRAINED", run / "last.pt")
    flags = flags.replace("RUN", str(run)).replace("USED", str(site.server_address[1]))
    assert demo.main([*flags.split(" "), "--no-browser"]) == status
    out, err = capsys.readouterr()
    assert out == "" and re.fullmatch(r"error: [^\n]+\n", err), err


def test_torch_is_not_imported_for_help():
    code = "import sys, demo; demo.parse_args([]); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


@pytest.mark.parametrize("flags", [[], ["--host", "0.0.0.0"]])
def test_the_default_run_and_ctrl_c(run, tmp_path, monkeypatch, flags):
    monkeypatch.chdir(tmp_path)
    saved = torch.load(run / "last.pt", weights_only=True)
    for name in ("usable", "dry"):
        save(saved | {"flags": saved["flags"] | {"dry_run": name == "dry"}}, name)
    command = [sys.executable, ROOT / "demo.py", "--no-browser", *flags]
    process = subprocess.Popen(command, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    line = process.stdout.readline()
    assert re.fullmatch(r".*\(runs.usable\): http://127\.0\.0\.1:\d+/ \(Ctrl-C to stop\)\n", line)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=20)
    assert (out, process.returncode) == ("", 130) and err.endswith("interrupted\n")
    assert ("unencrypted" in err) == bool(flags)


@pytest.fixture(scope="module")
def chromium():
    executable = shutil.which("chromium")
    try:
        from playwright.sync_api import sync_playwright
    except ImportError:
        executable = None
    if not executable:
        assert not os.environ.get("REQUIRE_BROWSER"), "Chromium or Playwright is missing"
        pytest.skip("needs chromium and playwright")
    with sync_playwright() as playwright:
        # Its sandbox does not work for root, nor in many containers.
        browser = playwright.chromium.launch(executable_path=executable, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def page(chromium, site):
    page = chromium.new_page(viewport={"width": 1100, "height": 860})
    page.problems = problems = []
    page.on("console", lambda message: problems.append(message.text))
    page.on("pageerror", lambda error: problems.append(str(error)))
    own = (site.url, "data:", "blob:")
    page.on("request", lambda it: it.url.startswith(own) or problems.append(it.url))
    page.goto(site.url)
    yield page
    page.close()
    assert problems == []


def draw(page, digit, wait=True, side=0.6, left=0.25, top=0.2):
    box = page.locator("#paper").bounding_box()
    for stroke in STROKES[digit]:
        for i, (x, y) in enumerate(stroke):
            place = left + 0.7 * side * x, top + side * y
            page.mouse.move(*(box[a] + box["width"] * p for a, p in zip("xy", place, strict=True)))
            if i == 0:
                page.mouse.down()
        page.mouse.up()
    return result(page) if wait else None


def result(page):
    page.wait_for_selector("main[aria-busy=false]")
    return page.inner_text("#digit"), page.inner_text("#sum")


def pixels(page):
    url = page.evaluate("document.getElementById('paper').toDataURL()")
    return base64.b64decode(url.split(",")[1])


def test_drawn_digits(page, run):
    correct = 0
    for i in range(20):
        digit, addend = i % 10, (3 * i) % 10
        page.keyboard.press(str(addend))
        shown = draw(page, digit, side=0.6 if i < 10 else 0.35)
        record = from_python(run, pixels(page), addend)
        assert shown == (str(record["digit"]), str(record["sum"]))
        assert page.inner_text("#digit-percent") == f"{100 * record['digit_probability']:.1f} %"
        assert page.inner_text("#warnings") == "; ".join(record["warnings"])
        correct += shown == (str(digit), str(digit + addend))
        page.keyboard.press("Escape")
    assert correct >= 18 or not MNIST_DIR


def drawn(page, kind):
    """The points of a line of the large dial: (N, 2)."""
    text = page.get_attribute(f"svg:not(figure svg) .{kind}", "points")
    return torch.tensor([[float(v) for v in end.split(",")] for end in text.split()])


def test_how_the_sum_is_made(page, site):
    draw(page, 7)
    for addend in (8, 2):
        page.locator(".number").nth(addend).click()
        result(page)
        record = predicted(site, pixels(page), addend)
        path = torch.tensor(record["dials"][0]["path"])
        lines = {"from": path[:1], "hand": path[-1:], "turn": path}
        lines["order"] = torch.tensor(site.networks[0].texts["dials"][0])
        for kind, points in lines.items():
            error = drawn(page, kind)[-len(points) :] - points * torch.tensor([100, -100])
            assert error.abs().max() < 0.06, kind
        scores = torch.tensor([dial["scores"] for dial in record["dials"]])  # (C, 19)
        script = "all => all.map((one) => Number(one.style.getPropertyValue('--p')))"
        bars = torch.tensor(page.eval_on_selector_all("#dials .bars div", script)).view(-1, 19)
        assert torch.allclose(bars[:-1], 8 / len(scores) * scores, atol=1e-6)
        assert torch.allclose(bars[-1], scores.mean(dim=0), atol=1e-6)
        assert bars[-1].argmax() == record["sum"]
        chosen = page.locator("svg:not(figure svg) .chosen").all_text_contents()
        assert set(chosen) == {str(record["digit"]), str(record["sum"])}


def test_another_network(page, site):
    """One with another head shows its outputs, and not how another would add."""
    caveat = page.locator(".caveat")
    assert caveat.is_visible() != bool(MNIST_DIR) and page.locator("#how").is_visible()
    draw(page, 3)
    page.select_option("#network", "1")
    assert "synthetic digits, NOT MNIST" in caveat.inner_text()
    shown, expected = result(page), predicted(site, pixels(page), "5&network=1")
    assert shown == (str(expected["digit"]), str(expected["sum"]))
    assert page.inner_text("#addend") == "5" and not page.locator("#how").is_visible()


def test_undo_and_clear(page):
    blank = pixels(page)
    shown, one = draw(page, 1), pixels(page)
    draw(page, 7)
    for key, expected in (("Control+z", one), ("Delete", blank), ("Backspace", one)):
        page.keyboard.press(key)
        assert result(page) == (shown if expected == one else ("–", "–"))
        assert pixels(page) == expected
    page.click("#undo")
    assert pixels(page) == blank and page.get_attribute("#undo", "aria-disabled") == "true"
    draw(page, 1)
    page.focus("#clear")
    page.keyboard.press("Enter")  # the focus stays, for whoever uses the keyboard
    assert pixels(page) == blank and page.evaluate("document.activeElement.id") == "clear"


def test_a_chosen_image(page, site):
    def choose(content):
        page.set_input_files("#file", {"name": "a.png", "mimeType": "image/png", "buffer": content})

    draw(page, 1)
    for side in (900, 4500):
        choose(encode(drawing(2, side)))
        page.keyboard.press("3")
        digit = predicted(site, encode(drawing(2, 900)), 3)["digit"]
        page.wait_for_selector(f"#terms:text('{digit} + 3')")
        page.keyboard.press("Delete")
    choose(b"not an image")
    page.wait_for_selector("#warnings:text('not an image')")
    assert result(page) == ("–", "–")


def test_the_panels_and_the_empty_page(page):
    """While one draws the dials change, and after Clear the page is as at the start."""
    script = "[document.body.innerText, document.querySelectorAll('.hand, #stages canvas').length]"
    start, dials = page.evaluate(script), set()
    page.locator("#paper").hover()
    page.mouse.down()
    for x in (400, 250, 150):
        page.mouse.move(x, 300, steps=5)
        page.wait_for_timeout(300)
        dials.add(page.inner_html("#dials"))
    page.mouse.up()
    assert len(dials) == 3 and page.evaluate(script)[1] > 16
    page.keyboard.press("Escape")
    result(page)
    assert page.evaluate(script) == start


def test_busy_and_errors(page, site, monkeypatch):
    with site.lock:
        draw(page, 7, wait=False)
        assert page.get_attribute("main", "aria-busy") == "true"
        page.keyboard.press("Escape")  # needs no answer
        assert result(page) == ("–", "–")
    monkeypatch.setattr(server, "FORMATS", {"image/png": "JPEG"})
    assert draw(page, 3) == ("–", "–")
    assert page.inner_text("#warnings") == "not a readable image"
    assert all("status of 400" in problem for problem in page.problems)
    page.problems.clear()


@pytest.mark.parametrize("width", [320, 390, 768, 1440])
def test_screens(page, width):
    """The page is never wider than the screen, and the answer is visible while one draws."""
    page.set_viewport_size({"width": width, "height": 664})
    draw(page, 7)
    page.evaluate("document.querySelectorAll('details').forEach((panel) => { panel.open = true })")
    assert page.evaluate("document.documentElement.scrollWidth") == width
    page.evaluate("scrollTo(0, 200)")
    box = page.locator("#sum-percent").bounding_box()
    assert width > 800 or 0 <= box["y"] < 664
