"""demo.py: its server, and its page in Chromium."""

import base64
import http.client
import io
import itertools
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
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from conftest import ROOT
from PIL import Image, ImageDraw
from torch import nn

import demo
import predict
import train
from handwriting import predictor
from handwriting.prepare import NO_INK
from model import build_model
from recipes import RECIPES

MNIST_DIR = os.environ.get("MNIST_DIR")
PNG = {"Content-Type": "image/png"}
# The strokes of the digits, as points x,y in percent of a square.
STROKES = """
60,0 25,10 10,50 25,90 55,100 85,80 90,40 60,0
50,0 47,50 45,100
10,25 30,3 70,3 80,30 50,65 10,100 95,97
10,5 60,0 80,20 70,38 40,47 80,60 85,80 60,100 10,95
20,0 10,55 90,52 | 75,5 68,100
85,0 25,2 20,42 60,40 85,60 80,85 50,100 10,93
65,0 30,30 15,70 30,97 65,98 80,75 60,55 20,65
10,3 90,0 60,50 40,100
80,10 45,0 20,20 45,45 80,70 70,95 35,100 20,75 50,48 80,25 80,10
80,20 50,0 20,20 30,45 65,42 80,15 75,50 60,100
"""
STROKES = [
    [
        [tuple(int(v) / 100 for v in p.split(",")) for p in stroke.split()]
        for stroke in line.split("|")
    ]
    for line in STROKES.strip().splitlines()
]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run of `fast` on MNIST, or else a dry run on synthetic digits."""
    path = tmp_path_factory.mktemp("run") / "run"
    data = ["--data-dir", MNIST_DIR] if MNIST_DIR else ["--dataset", "synthetic", "--dry-run"]
    assert train.main(["--recipe", "fast", "--quiet", "--output-dir", str(path), *data]) == 0
    return path


@pytest.fixture(scope="module")
def server(run):
    networks = [demo.Network(run, "run"), demo.Network(demo.PRETRAINED, "pretrained")]
    with demo.Server(networks) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


def drawing(digit, side=280):
    image = Image.new("L", (side, side), "white")
    for stroke in STROKES[digit]:
        points = [(side * (0.25 + x / 2), side * (0.2 + 0.6 * y)) for x, y in stroke]
        ImageDraw.Draw(image).line(points, "black", side // 12, "curve")
    return image


def encode(image, kind="PNG", **options):
    content = io.BytesIO()
    image.save(content, kind, **options)
    return content.getvalue()


def request(server, method="POST", path="/predict?addend=5", body=None, headers=PNG):
    """Returns the status, the headers and the body of the reply."""
    connection = http.client.HTTPConnection(*server.server_address, timeout=30)
    connection.request(method, path, body, headers)
    reply = connection.getresponse()
    return reply.status, reply.headers, reply.read()


def predicted(server, body, addend=5):
    status, _, content = request(server, path=f"/predict?addend={addend}", body=body)
    assert status == 200, content
    return json.loads(content)


def from_predict(run, image, addend, tmp_path, capsys):
    (tmp_path / "image.png").write_bytes(image)
    capsys.readouterr()
    predict.main([str(run), str(tmp_path / "image.png"), "--add", str(addend), "--json"])
    (record,) = json.loads(capsys.readouterr().out)
    return record


def test_the_record_is_that_of_predict(server, run, tmp_path, capsys):
    image = encode(drawing(7))
    record, expected = predicted(server, image, 3), from_predict(run, image, 3, tmp_path, capsys)
    assert len(record["pixels"]) == len(record["pixels"][0]) == 28
    assert (len(record["digit_probabilities"]), len(record["sum_probabilities"])) == (10, 19)
    assert sum(record["digit_probabilities"]) == pytest.approx(1)
    del expected["file"]
    assert {key: record[key] for key in expected} == {
        key: pytest.approx(value) if isinstance(value, float) else value
        for key, value in expected.items()
    }


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
def test_the_formats(server, kind):
    headers = {"Content-Type": f"image/{kind.lower()}"}
    assert request(server, body=encode(drawing(1), kind), headers=headers)[0] == 200


def test_an_image_without_ink_has_no_digit(server):
    record = predicted(server, encode(Image.new("L", (100, 100), "white")))
    assert (record["digit"], record["sum"], record["warnings"]) == (None, None, [NO_INK])
    assert not any(record["digit_probabilities"] + record["sum_probabilities"])


@pytest.mark.parametrize(
    "status, change",
    [
        (403, {"headers": PNG | {"Host": "example.com"}}),
        (403, {"headers": {"Host": "127.0.0.1"}, "method": "GET", "path": "/"}),
        (404, {"method": "GET", "path": "/../demo.py"}),
        (404, {"path": "/other"}),
        (404, {"path": "/predict?addend=10"}),
        (404, {"path": "/predict?addend=-1"}),
        (404, {"path": "/predict?addend=1&network=2"}),
        (415, {"headers": {"Content-Type": "image/svg+xml"}}),
        (415, {"headers": {}}),
        (411, {"headers": PNG | {"Transfer-Encoding": "chunked"}, "body": iter([b"0\r\n\r\n"])}),
        (411, {"headers": PNG | {"Content-Length": "-5"}, "body": None}),
        (413, {"headers": PNG | {"Content-Length": "4000001"}, "body": None}),
        (413, {"headers": PNG | {"Content-Length": "9" * 5000}, "body": None}),
        (400, {"body": b"not an image"}),
        (400, {"body": encode(drawing(3))[:-500]}),
        (400, {"body": encode(Image.new("1", (5_000, 5_000)))}),
        (400, {"body": encode(Image.new("RGBA", (3_500, 3_500)))}),
        (400, {"body": encode(drawing(3), "GIF")}),
        (400, {"body": encode(drawing(3), exif=b"Exif\0\0damaged")}),
        (501, {"method": "PUT"}),
    ],
)
def test_what_is_refused(server, status, change):
    assert request(server, **{"body": b"", **change})[0] == status


def test_the_page_allows_only_its_own_script(server):
    nonces = set()
    for _ in range(2):
        status, headers, body = request(server, "GET", "/", headers={})
        policy = headers["Content-Security-Policy"]
        (nonce,) = re.findall("script-src 'nonce-(.+?)'", policy)
        nonces.add(nonce)
        assert status == 200 and "default-src 'none'" in policy
        assert f'<script nonce="{nonce}">' in body.decode() and b"{{" not in body
        assert "Access-Control-Allow-Origin" not in headers
        assert not re.search(rb"https?://|(src|href)=\"(?!data:)", body)
    assert len(nonces) == 2


def test_bad_requests_do_not_stop_the_server(server, monkeypatch):
    """200 requests, 20 at once: noise, truncated, oversized and slow."""
    image = encode(drawing(4))
    before = predicted(server, image)
    head = b"POST /predict?addend=1 HTTP/1.1\r\nHost: " + server.hosts[0].encode()
    head += b"\r\nContent-Type: image/png\r\nContent-Length: "

    def attack(i):
        noise = random.Random(i).randbytes(2000)
        content = [
            noise,
            head + b"9999999\r\n\r\n" + noise,
            head + b"2000\r\n\r\n" + noise,
            head + b"90000\r\n\r\n" + image,
            head + b"%d\r\n\r\n" % len(image) + image[:40] + noise[: len(image) - 40],
        ][i % 5]
        start = time.monotonic()
        with socket.create_connection(server.server_address, timeout=30) as client:
            try:
                client.sendall(content)
                if i % 2 and i % 20 != 3:  # those wait without a word
                    client.shutdown(socket.SHUT_WR)
                while client.recv(65536):
                    pass
            except ConnectionError:
                pass
        return time.monotonic() - start

    with ThreadPoolExecutor(20) as pool, monkeypatch.context() as patch:
        patch.setattr(demo.Handler, "timeout", 5)
        attacks = [pool.submit(attack, i) for i in range(200)]
        time.sleep(1)
        assert predicted(server, image) == before  # among them
        assert max(one.result() for one in attacks) < 10
    with ThreadPoolExecutor(20) as pool:
        assert all(one == before for one in pool.map(predicted, [server] * 20, [image] * 20))


def head(server, size, host=None):
    lines = ["POST /predict?addend=5 HTTP/1.1", f"Host: {host or server.hosts[0]}"]
    lines += ["Content-Type: image/png", f"Content-Length: {size}", "", ""]
    return "\r\n".join(lines).encode()


def test_every_request_under_load_is_answered(server, monkeypatch):
    """150 requests, 50 at a time: 200, or 503 for those that waited too long."""
    image = encode(drawing(4))
    with ThreadPoolExecutor(50) as pool:
        statuses = list(pool.map(lambda _: request(server, body=image)[0], range(150)))
        assert set(statuses) <= {200, 503}
        monkeypatch.setattr(demo, "TURN", 0.01)
        statuses = list(pool.map(lambda _: request(server, body=image)[0], range(50)))
    assert set(statuses) == {200, 503}


def test_requests_whose_clients_are_gone_are_skipped(server):
    image = encode(drawing(4))
    for _ in range(150):
        with socket.create_connection(server.server_address) as client:
            client.sendall(head(server, len(image)) + image)
    start = time.monotonic()
    predicted(server, image)
    assert time.monotonic() - start < 2


def test_the_body_of_another_host_is_not_read(server):
    with socket.create_connection(server.server_address, timeout=5) as client:
        client.sendall(head(server, 1000, "example.com"))
        assert client.recv(100).startswith(b"HTTP/1.0 403")


def test_unusable_runs_are_not_in_the_list(run, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for name in ("good", "removed-recipe", "not-a-number"):
        checkpoint = torch.load(run / "last.pt", weights_only=True)
        checkpoint["flags"] |= {"dry_run": False}
        if name == "removed-recipe":
            checkpoint["flags"]["recipe"] = "removed"
        elif name == "not-a-number":
            next(iter(checkpoint["network"].values())).fill_(torch.nan)
        (tmp_path / "runs" / name).mkdir(parents=True)
        torch.save(checkpoint, tmp_path / "runs" / name / "last.pt")
    names = [network.texts["name"] for network in demo.load_networks()]
    assert [re.search(r"\((.*)\)", name)[1] for name in names] == ["runs/good", "pretrained"]
    assert "fast, 1 epoch, " in names[0] and "tiny, 60 epochs, 99.58 % test accuracy" in names[1]
    err = capsys.readouterr().err
    assert err.count("skipped") == 2 and "removed" in err and "not numbers" in err
    assert len(demo.load_networks("runs/good")) == 2  # each only once


def test_the_feature_maps(server):
    """Those of the last stage, against the layers called one by one."""
    network = server.networks[1]
    image, encoder = drawing(3), network.predictor.model.encoder
    record = network.predict(image, 5)
    pixels = torch.tensor(record["pixels"])[None, None] / 255
    x = (pixels - network.predictor.recipe["mean"]) / network.predictor.recipe["std"]
    shapes = []
    for layer in encoder[:5]:
        x = layer(x)
        shapes.append(tuple(x.shape[1:]))
    assert [tuple(stage["shape"]) for stage in record["stages"]] == shapes[1:]
    span = x[0].flatten(1).max(1).values - x[0].flatten(1).min(1).values
    strongest = x[0, span.argmax()]
    expected = (strongest - strongest.min()) / span.max() * 255
    maps = torch.tensor(list(base64.b64decode(record["stages"][-1]["maps"])))
    assert len(maps) == 16 * 36
    assert (maps[:36].view(6, 6) - expected).abs().max() < 1.01


class Committee(nn.Module):
    def __init__(self, model):
        super().__init__()
        self.members = nn.ModuleList([model])

    def forward(self, image, addend):
        return self.members[0](image, addend)


@pytest.mark.parametrize("recipe", RECIPES)
def test_every_recipe_has_feature_maps(recipe, monkeypatch):
    row = RECIPES[recipe]
    model = Committee(build_model(row.encoder, row.head)).eval()
    checkpoint = {"recipe": row.as_plain(), "history": [{"test_digit_accuracy": 0.1}]}
    checkpoint["flags"] = {"recipe": recipe, "dataset": "mnist", "dry_run": False}
    monkeypatch.setattr(demo, "load_model", lambda path: (model, checkpoint))
    network = demo.Network("path", "name")
    for _ in range(2):  # the second record has only its own maps
        stages = network.predict(drawing(7), 0)["stages"]
    convolutions = [p for p in model.members[0].encoder.parameters() if p.ndim == 4]
    assert min(2, len(convolutions)) <= len(stages) <= len(convolutions)
    for stage in stages:
        channels, height, width = stage["shape"]
        assert len(base64.b64decode(stage["maps"])) == min(channels, 16) * height * width


def test_a_port_in_use(server, run, capsys):
    port = server.server_address[1]
    assert demo.main([str(run), "--port", str(port), "--no-browser"]) == 1
    assert re.fullmatch(rf"error: cannot use port {port} [^\n]+\n", capsys.readouterr().err)
    with demo.Server([]) as other:
        assert other.server_address != server.server_address


@pytest.mark.parametrize(
    "arguments, status", [(["nowhere"], 1), (["--port", "0"], 2), (["--port", "x"], 2)]
)
def test_errors_are_one_line(capsys, arguments, status):
    assert demo.main([*arguments, "--no-browser"]) == status
    out, err = capsys.readouterr()
    assert out == "" and re.fullmatch(r"error: [^\n]+\n", err), err


@pytest.mark.parametrize(
    "runs, expected", [(["old", "new", "dry"], "runs.new"), (["dry"], "pretrained")]
)
def test_the_default_run_and_ctrl_c(run, tmp_path, runs, expected):
    for age, name in enumerate(reversed(runs)):
        checkpoint = torch.load(run / "last.pt", weights_only=True)
        checkpoint["flags"]["dry_run"] = name == "dry"
        (tmp_path / "runs" / name).mkdir(parents=True)
        torch.save(checkpoint, tmp_path / "runs" / name / "last.pt")
        os.utime(tmp_path / "runs" / name / "last.pt", (time.time() - age,) * 2)
    command = [sys.executable, ROOT / "demo.py", "--no-browser"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    process = subprocess.Popen(command, cwd=tmp_path, text=True, **pipes)
    line = process.stdout.readline()
    assert re.fullmatch(rf".*\({expected}\): http://127\.0\.0\.1:\d+/ \(Ctrl-C to stop\)\n", line)
    process.send_signal(signal.SIGINT)
    assert process.communicate(timeout=20) == ("", "interrupted\n")
    assert process.returncode == 130


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
def page(chromium, server):
    page = chromium.new_page(viewport={"width": 1100, "height": 860})
    page.problems = problems = []
    page.on("console", lambda message: problems.append(message.text))
    page.on("pageerror", lambda error: problems.append(str(error)))
    own = (f"http://{server.hosts[0]}/", "data:", "blob:")
    page.on("request", lambda it: it.url.startswith(own) or problems.append(it.url))
    page.goto(own[0])
    yield page
    page.close()
    assert problems == []


def draw(page, digit, scale=0.6, left=0.25, top=0.2, wait=True):
    box = page.locator("#paper").bounding_box()
    for stroke in STROKES[digit]:
        for i, (x, y) in enumerate(stroke):
            place = (left + 0.7 * scale * x, top + scale * y)
            at = [box[a] + box["width"] * p for a, p in zip("xy", place, strict=True)]
            page.mouse.move(*at)
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


def test_drawn_digits(page, run, tmp_path, capsys):
    correct = 0
    for i in range(20):
        digit, addend = i % 10, (3 * i) % 10
        page.keyboard.press(str(addend))
        shape = (0.6, 0.25, 0.2) if i < 10 else (0.35, 0.55, 0.08)
        shown = draw(page, digit, *shape)
        record = from_predict(run, pixels(page), addend, tmp_path, capsys)
        assert shown == (str(record["digit"]), str(record["sum"]))
        assert page.inner_text("#digit-percent") == f"{100 * record['digit_probability']:.1f} %"
        assert page.inner_text("#warnings") == "; ".join(record["warnings"])
        correct += shown == (str(digit), str(digit + addend))
        page.keyboard.press("Escape")
        result(page)
    print(f"{correct} of 20 read correctly")
    assert correct >= 18 or not MNIST_DIR


def test_the_number_changes_only_the_sum(page):
    draw(page, 7)
    digit, percent = page.inner_text("#digit"), page.inner_text("#digit-percent")
    terms = set()
    for addend in range(10):
        page.locator(".number").nth(addend).click()
        assert result(page)[0] == digit and page.inner_text("#digit-percent") == percent
        terms.add(page.inner_text("#terms").strip())
    assert terms == {f"{digit} + {addend} =" for addend in range(10)}


def test_a_hand_that_rests_beside_the_pen_draws_nothing(page):
    shown, drawn = draw(page, 7), pixels(page)
    page.keyboard.press("Delete")
    result(page)
    page.evaluate("""() => {
        const paper = document.getElementById("paper");
        const hand = { pointerId: 99, isPrimary: true, clientX: 300, clientY: 300 };
        paper.addEventListener("pointermove", ({ pointerId }) => {
            if (pointerId === 99) return;
            for (const type of ["pointermove", "pointerup"])
                paper.dispatchEvent(new PointerEvent(type, hand));
        });
    }""")
    assert draw(page, 7) == shown and pixels(page) == drawn


def test_undo_and_clear(page):
    blank = pixels(page)
    draw(page, 1)
    one, shown = pixels(page), result(page)
    draw(page, 7)
    for key, expected in (("Control+z", one), ("Delete", blank), ("Backspace", one)):
        page.keyboard.press(key)
        after = result(page)
        assert pixels(page) == expected
        assert after == (shown if expected == one else ("–", "–"))
        assert expected == one or page.inner_text("#warnings") == ""
    page.click("#undo")
    assert pixels(page) == blank
    for name in ("undo", "clear"):
        assert page.get_attribute(f"#{name}", "aria-disabled") == "true"
    draw(page, 1)
    page.focus("#clear")
    page.keyboard.press("Enter")  # the focus stays, for whoever uses the keyboard
    assert pixels(page) == blank and page.evaluate("document.activeElement.id") == "clear"


def test_a_chosen_image(page, server):
    image = encode(drawing(2, 900))
    page.set_input_files("#file", {"name": "2.png", "mimeType": "image/png", "buffer": image})
    page.wait_for_selector("#undo[aria-disabled=false]")
    record = predicted(server, image)
    assert result(page) == (str(record["digit"]), str(record["sum"]))
    page.keyboard.press("Delete")
    assert result(page) == ("–", "–")
    large = encode(drawing(2, 4500))
    page.set_input_files("#file", {"name": "2.png", "mimeType": "image/png", "buffer": large})
    page.wait_for_selector("#clear[aria-disabled=false]")
    assert result(page)[0] == str(record["digit"])
    text = {"name": "text.png", "mimeType": "image/png", "buffer": b"not an image"}
    page.set_input_files("#file", text)
    page.wait_for_selector("#warnings:text('not an image')")
    assert result(page) == ("–", "–")


def test_a_number_chosen_while_an_image_loads(page, server):
    page.evaluate("""() => {
        const create = createImageBitmap;
        window.createImageBitmap = async (file) => {
            await new Promise((done) => setTimeout(done, 1000));
            return create(file);
        };
    }""")
    draw(page, 1)
    image = encode(drawing(2, 900))
    page.set_input_files("#file", {"name": "2.png", "mimeType": "image/png", "buffer": image})
    page.keyboard.press("3")
    record = predicted(server, image, 3)
    page.wait_for_selector(f"#terms:text('{record['digit']} + 3')")
    assert result(page) == (str(record["digit"]), str(record["sum"]))


def test_the_network_is_chosen(page, server, monkeypatch):
    caveat = page.locator(".caveat")
    assert caveat.is_visible() != bool(MNIST_DIR)
    monkeypatch.setitem(server.networks[1].texts, "caveat", "synthetic digits, NOT MNIST")
    page.reload()
    draw(page, 3)
    page.select_option("#network", "1")
    assert caveat.inner_text() == "This network was trained on synthetic digits, NOT MNIST."
    shown = result(page)
    expected = predicted(server, pixels(page), "5&network=1")
    assert shown == (str(expected["digit"]), str(expected["sum"]))
    assert page.inner_text("#digit-percent") == f"{100 * expected['digit_probability']:.1f} %"
    assert "tiny, 60 epochs" in page.inner_text("#network option:checked")


def bars(page, selector):
    script = "all => all.map((one) => Number(one.style.getPropertyValue('--p')))"
    return page.eval_on_selector_all(selector, script)


def test_how_the_sum_is_made(page, server):
    page.keyboard.press("8")
    draw(page, 7)
    record = predicted(server, pixels(page), 8)
    digits = record["digit_probabilities"]
    products = torch.tensor(bars(page, ".cell")).view(10, 10)
    expected = torch.zeros(10, 10)
    expected[:, 8] = torch.tensor(digits)
    assert torch.allclose(products, expected)
    assert bars(page, ".row-label") == pytest.approx(digits)
    assert bars(page, "#total-bars div") == pytest.approx([0] * 8 + digits + [0])
    assert bars(page, "#output-bars div") == pytest.approx(record["sum_probabilities"])
    sums = page.eval_on_selector_all(".cell, #total-bars div", "all => all.map(({ offsetLeft: x, "
        "offsetWidth: w }) => Math.round(x + w / 2))")  # fmt: skip
    for digit, addend in itertools.product(range(10), range(10)):  # above its sum
        assert abs(sums[10 * digit + addend] - sums[100 + digit + addend]) <= 1


def test_the_panels_and_the_empty_page(page):
    """After Clear the page is as at the start, and while one draws the panels change."""
    script = "[document.body.innerText, document.getElementById('table').ariaLabel]"
    start = page.evaluate(script)
    draw(page, 7)
    assert page.locator("#stages canvas").count() > 16
    seven = page.inner_html("main")
    box = page.locator("#paper").bounding_box()
    page.mouse.move(box["x"] + 30, box["y"] + 30)
    page.mouse.down()
    page.mouse.move(box["x"] + 400, box["y"] + 200, steps=20)
    page.wait_for_function("(old) => document.querySelector('main').innerHTML !== old", arg=seven)
    result(page)
    page.mouse.up()
    result(page)
    page.keyboard.press("Escape")
    assert page.evaluate(script) == start and page.locator("#stages canvas").count() == 0


def test_an_uncertain_answer_is_gray(page, server, monkeypatch):
    colors = "['digit', 'sum'].map((id) => getComputedStyle(document.getElementById(id)).color)"
    page.select_option("#network", label=server.networks[1].texts["name"])
    draw(page, 7)
    certain = page.evaluate(colors)
    for module in (demo, predictor):
        monkeypatch.setattr(module, "UNSURE", 1.1)
    page.keyboard.press("1")
    result(page)
    assert not set(page.evaluate(colors)) & set(certain)
    digit, warning = (page.locator(f"#{name}").bounding_box() for name in ("digit", "warnings"))
    assert abs(digit["y"] - warning["y"]) < 40 and warning["x"] < digit["x"] + 100


def test_the_page_is_busy_until_the_answer(page, server):
    with server.lock:
        page.keyboard.press("Escape")
        draw(page, 7, wait=False)
        assert page.get_attribute("main", "aria-busy") == "true"
        page.wait_for_timeout(600)
        opacity = "Number(getComputedStyle(document.querySelector('.answer .digit')).opacity)"
        assert page.evaluate(opacity) < 0.9
        page.keyboard.press("Escape")  # needs no answer
        assert result(page) == ("–", "–")


def test_on_a_phone_the_answer_is_visible_while_one_draws(page):
    page.set_viewport_size({"width": 390, "height": 664})
    page.reload()
    assert not page.locator(".table").is_visible()
    for scroll in (0, 200):
        page.evaluate(f"scrollTo(0, {scroll})")
        draw(page, 7)
        for name in ("#digit", "#sum", "#sum-percent"):
            box = page.locator(name).bounding_box()
            assert box["y"] >= 0 and box["y"] + box["height"] < 664
        page.keyboard.press("Escape")


def test_an_error_of_the_server(page, server, monkeypatch):
    monkeypatch.setattr(demo, "FORMATS", {"image/png": "JPEG"})
    assert draw(page, 3) == ("–", "–")
    assert page.inner_text("#warnings") == "not a readable image"
    assert all("status of 400" in problem for problem in page.problems)
    page.problems.clear()


@pytest.mark.parametrize("width", [320, 375, 768, 1440])
def test_the_page_is_never_wider_than_the_screen(page, width):
    page.set_viewport_size({"width": width, "height": 800})
    assert page.evaluate("document.documentElement.scrollWidth") == width
