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
from contextlib import suppress
from importlib.util import find_spec

import pytest
import torch
from conftest import ROOT
from PIL import Image, ImageDraw
from torch.func import functional_call

import demo
import train
from benchmarks.drawings import STYLES
from handwriting import predictor, server
from handwriting.prepare import NO_INK, prepare
from model import build_model
from recipes import RECIPES

MNIST_DIR = os.environ.get("MNIST_DIR")
PNG = {"Content-Type": "image/png"}
STROKES = dict(reversed(STYLES))  # the first style of each digit


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A run of `fast` on MNIST, or else a dry run on synthetic digits; and one of another head."""
    dry = ["--dataset", "synthetic", "--dry-run"]
    paths = tmp_path_factory.mktemp("run"), tmp_path_factory.mktemp("other")
    flags = ["--data-dir", MNIST_DIR] if MNIST_DIR else dry, ["--head", "OuterProduct", *dry]
    for path, given in zip(paths, flags, strict=True):
        assert train.main(["--recipe", "fast", "-q", "--output-dir", str(path), *given]) == 0
    return paths


@pytest.fixture(scope="module")
def site(runs):
    with server.Server([server.Network(path, path.name) for path in runs]) as site:
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
    connection = http.client.HTTPConnection("127.0.0.1", site.server_address[1], timeout=30)
    connection.request(method, path, body, headers)
    reply = connection.getresponse()
    return reply.status, reply.headers, reply.read()


def predicted(site, body, addend=5):
    status, _, content = request(site, path=f"/predict?addend={addend}", body=body)
    assert status == 200, content
    return json.loads(content)


def test_the_record(site, runs):
    """That of the same picture without the server; and that of a blank one."""
    model, checkpoint = predictor.load_model(runs[0])
    network = predictor.Predictor(model, checkpoint["recipe"])
    record, digits, sums = predictor.predict(network, prepare(drawing(7)), 3)
    record |= {"digit_probabilities": digits.tolist(), "sum_probabilities": sums.tolist()}
    served = predicted(site, encode(drawing(7)), 3)
    assert served | record == served
    blank = predicted(site, encode(Image.new("L", (100, 100), "white")))
    assert (blank["digit"], blank["sum"], blank["warnings"]) == (None, None, [NO_INK])


@pytest.mark.parametrize(
    "status, change",
    [
        (200, {"headers": {"Content-Type": "image/webp"}, "body": encode(drawing(1), "WEBP")}),
        (200, {"method": "GET", "path": "/?x=1"}),
        (200, {"method": "HEAD", "path": "/"}),
        (200, {"body": encode(Image.new("RGBA", (5120, 2880)))}),
        (404, {"path": "/predict?addend=10"}),
        (404, {"path": "/predict?addend=1&network=2"}),
        (415, {"headers": {"Content-Type": "image/svg+xml"}}),
        (411, {"headers": PNG | {"Content-Length": "-5"}, "body": None}),
        (413, {"headers": PNG | {"Content-Length": "4000001"}, "body": None}),
        (400, {"body": encode(drawing(3))[:-500]}),
        (400, {"body": encode(drawing(3), "GIF")}),
    ],
)
def test_requests(site, status, change):
    assert request(site, **{"body": b"", **change})[0] == status


def test_the_page_allows_only_its_own_script(site):
    nonces = set()
    for _ in range(2):
        _, headers, body = request(site, "GET", "/", headers={})
        (nonce,) = re.findall("script-src 'nonce-(.+?)'", headers["Content-Security-Policy"])
        assert f'<script nonce="{nonce}">' in body.decode() and b"{{" not in body
        nonces.add(nonce)
    assert len(nonces) == 2


def test_bad_requests_do_not_stop_the_server(site, monkeypatch):
    """Noise, bodies that are too large or too short, and silence; and clients that are gone."""
    monkeypatch.setattr(server.Handler, "timeout", 2)
    start = b"POST /predict?addend=5 HTTP/1.1\r\nHost: localhost\r\nContent-Type: image/png\r\n"
    start, image, clients = start + b"Content-Length: %d\r\n\r\n", encode(drawing(4)), []
    for i in range(60):
        noise = random.Random(i).randbytes(2000)
        bodies = [noise, start % 9_999_999 + noise]
        bodies += [start % size + image for size in (90_000, len(image))]
        clients.append(socket.create_connection(site.server_address, timeout=30))
        clients[-1].sendall(bodies[i % 4])
        if i % 4 == 3:
            clients[-1].close()
    assert predicted(site, image)["digit"] is not None  # among them
    for client in clients[::4] + clients[1::4] + clients[2::4]:
        with client, suppress(ConnectionError):
            while client.recv(65536):  # raises TimeoutError after 30 seconds
                pass


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
        site.shutdown()
    assert capsys.readouterr().err.count("--host") == 1


def save(checkpoint, name):
    os.makedirs(f"runs/{name}")
    torch.save(checkpoint, f"runs/{name}/last.pt")


def test_the_list(runs, tmp_path, monkeypatch, capsys):
    """Usable runs, in the order of their ends and not of their files, and the pretrained one."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(server, "PRETRAINED", runs[1] / "last.pt")
    saved = torch.load(runs[0] / "last.pt", weights_only=True)
    saved["flags"] |= {"dry_run": False, "dataset": "mnist"}
    save(saved, "new")
    save(saved | {"time": saved["time"] - 9}, "old")
    save(saved | {"recipe": saved["recipe"] | {"head": "Gone"}}, "no-head")
    save(saved | {"network": {}}, "changed")
    save(gone := saved | {"flags": saved["flags"] | {"recipe": "gone"}}, "gone-a")
    save(gone, "gone-b")
    names = [network.texts["name"] for network in server.load_networks()]
    assert [name.partition("(")[2] for name in names] == ["runs/new)", "runs/old)", "pretrained)"]
    assert ["synthetic" in name for name in names] == [False, False, True]
    lines = capsys.readouterr().err.splitlines()
    assert sorted(len(re.findall("no-head|changed|gone-", line)) for line in lines) == [1, 1, 2]
    assert len(server.load_networks("runs/old")) == 3  # each only once


@pytest.mark.parametrize("recipe", RECIPES)
def test_every_recipe_can_be_shown(recipe, monkeypatch):
    model = build_model(RECIPES[recipe].encoder, RECIPES[recipe].head).eval()
    saved = {"recipe": RECIPES[recipe].as_plain(), "history": [{"test_digit_accuracy": 0.1}]}
    saved["flags"] = {"recipe": recipe, "dataset": "mnist", "dry_run": False}
    monkeypatch.setattr(server, "load_model", lambda *args: (model, saved))
    network = server.Network("path", "name")
    record = [network.predict(drawing(7), 0) for _ in range(2)][1]  # has only its own maps
    stages = [(stage["shape"], base64.b64decode(stage["maps"])) for stage in record["stages"]]
    assert all(len(maps) == min(c, 16) * h * w for (c, h, w), maps in stages)
    convolutions = sum(parameter.ndim == 4 for parameter in model.encoder.parameters())
    assert min(2, convolutions) <= len(stages) <= convolutions
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
    assert distances.amin(dim=1).max() < 1e-5 and distances.amin(dim=0).max() < 1e-5
    scores = torch.tensor([dial["scores"] for dial in dials])  # (C, 19)
    factor = sum_logits.norm() / scores.sum(dim=0).norm()
    assert torch.allclose(factor * scores.sum(dim=0), sum_logits[0], atol=1e-4)
    paths = torch.view_as_complex(torch.tensor([dial["path"] for dial in dials]))  # (C, 25)
    digit = digit_logits[0].softmax(dim=0).to(points.dtype) @ points[:10]
    assert torch.allclose(paths[:, [0, -1]].T, torch.stack([digit, digit * points[5]]), atol=1e-5)
    for component, score in zip(distances.argmin(dim=1), scores, strict=True):
        alone = torch.zeros_like(head.numbers)
        alone[:, :, component] = head.numbers[:, :, component]
        _, logits = functional_call(head, {"numbers": alone}, inputs)
        assert torch.allclose(factor * score, logits[0], atol=1e-4)


@pytest.mark.parametrize(
    "status, flags",
    [(1, "nowhere"), (1, "RUN --port USED"), (1, "RUN --host 192.0.2.1"), (2, "")]
    + [(2, "--port 0"), (2, "--host localhost")],
)
def test_errors_are_one_line(site, runs, tmp_path, monkeypatch, capsys, status, flags):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(server, "PRETRAINED", runs[0] / "last.pt")
    monkeypatch.setattr(server.Server, "serve_forever", lambda self: None)
    flags = flags.replace("RUN", str(runs[0])).replace("USED", str(site.server_address[1]))
    assert demo.main([*flags.split(" "), "--no-browser"]) == status
    out, err = capsys.readouterr()
    assert out == "" and re.fullmatch(r"error: [^\n]+\n", err), err


@pytest.mark.parametrize("flags", [[], ["--host", "0.0.0.0"]])
def test_the_default_run_and_ctrl_c(runs, tmp_path, monkeypatch, flags):
    monkeypatch.chdir(tmp_path)
    saved = torch.load(runs[0] / "last.pt", weights_only=True)
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
    if not executable or not find_spec("playwright"):
        assert not os.environ.get("REQUIRE_BROWSER"), "Chromium or Playwright is missing"
        pytest.skip("needs chromium and playwright")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        flags = ["--no-sandbox"]  # which does not work for root, nor in many containers
        browser = playwright.chromium.launch(executable_path=executable, args=flags)
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
    return base64.b64decode(page.evaluate("paper.toDataURL().split(',')[1]"))


def test_drawn_digits(page, site):
    correct = 0
    for i in range(20):
        digit, addend = i % 10, 3 * i % 10
        page.keyboard.press(str(addend))
        shown = draw(page, digit, side=0.6 if i < 10 else 0.35)
        record = predicted(site, pixels(page), addend)
        assert shown == (str(record["digit"]), str(record["sum"]))
        assert page.inner_text("#digit-percent") == f"{100 * record['digit_probability']:.1f} %"
        assert page.inner_text("#warnings") == "; ".join(record["warnings"])
        correct += shown == (str(digit), str(digit + addend))
        page.keyboard.press("Escape")
    assert correct >= 18 or not MNIST_DIR


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
            text = page.get_attribute(f"svg:not(figure svg) .{kind}", "points")
            shown = torch.tensor([[float(v) for v in end.split(",")] for end in text.split()])
            error = shown[-len(points) :] - points * torch.tensor([100, -100])
            assert error.abs().max() < 0.06, kind
        scores = torch.tensor([dial["scores"] for dial in record["dials"]])  # (C, 19)
        script = "all => all.map((one) => Number(one.style.getPropertyValue('--p')))"
        bars = torch.tensor(page.eval_on_selector_all("#dials .bars div", script)).view(-1, 19)
        expected = torch.cat([8 * scores, scores.sum(dim=0, keepdim=True)])
        assert torch.allclose(bars, expected, atol=1e-6) and bars[-1].argmax() == record["sum"]
        chosen = page.locator("svg:not(figure svg) .chosen").all_text_contents()
        assert set(chosen) == {str(record["digit"]), str(record["sum"])}


def test_another_network(page, site):
    """One with another head shows its outputs, and not how another would add."""
    assert page.locator(".caveat").is_visible() != bool(MNIST_DIR)
    assert page.locator("#how").is_visible()
    draw(page, 3)
    page.select_option("#network", "1")
    assert "synthetic digits, NOT MNIST" in page.inner_text(".caveat")
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


def test_a_chosen_image(page, site):
    def choose(content):
        page.set_input_files("#file", {"name": "a.png", "mimeType": "image/png", "buffer": content})

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
    start, changed = page.evaluate(script), "(old) => $('dials').innerHTML !== old"
    page.locator("#paper").hover()
    page.mouse.down()
    for x in (400, 250, 150):
        before = page.inner_html("#dials")
        page.mouse.move(x, 300, steps=5)
        page.wait_for_function(changed, arg=before)
    assert page.evaluate(script)[1] > 16
    page.mouse.up()
    page.keyboard.press("Escape")
    result(page)
    assert page.evaluate(script) == start


def test_busy_and_errors(page, site, monkeypatch):
    with site.lock:
        draw(page, 7, wait=False)
        assert page.get_attribute("main", "aria-busy") == "true"
        page.keyboard.press("Escape")  # needs no answer
        assert result(page) == ("–", "–")
        monkeypatch.setattr(server, "TURN", 0.01)
        assert draw(page, 3) == ("–", "–")
    assert page.inner_text("#warnings") == "demo.py is busy; try again"
    page.problems[:] = [text for text in page.problems if "status of 503" not in text]


@pytest.mark.parametrize("width", [320, 390, 768, 1440])
def test_screens(page, width):
    """The page is never wider than the screen, and the answer is visible while one draws."""
    page.set_viewport_size({"width": width, "height": 664})
    draw(page, 7)
    page.evaluate("document.querySelectorAll('details').forEach((panel) => { panel.open = true })")
    assert page.evaluate("document.documentElement.scrollWidth") == width
    page.evaluate("scrollTo(0, 200)")
    assert width > 800 or 0 <= page.locator("#sum").bounding_box()["y"] < 600
