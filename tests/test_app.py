"""The server of app.py: what every route answers, what is refused, the queue, runs that are read while they train."""

import base64
import contextlib
import http.client
import io
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
import torch
from conftest import ROOT
from PIL import Image

import app
import sample

HEADERS = {"Content-Type": "application/json"}


@pytest.fixture(scope="module")
def serve(runs, tmp_path_factory):
    """serve(name) -> the address of a server with that tiny checkpoint, and a folder of one run."""
    folder, servers = tmp_path_factory.mktemp("out"), {}
    write_run(folder / "one", [progress(step) for step in (1, 2, 3)])
    for step in (1, 3):
        Image.new("RGB", (8, 8)).save(folder / f"one/samples_0000000{step}.png")
    (folder / "secret_1.png").write_bytes(b"secret")

    def serve(name):
        if name not in servers:
            model = app.Model({"ckpt": runs[name].path, "device": "cpu", "dtype": "float32"})
            servers[name] = app.Server("127.0.0.1", 0, model, app.Runs(folder))
            threading.Thread(target=servers[name].serve_forever, daemon=True).start()
        return servers[name]

    yield serve
    for server in servers.values():
        server.shutdown()
        server.server_close()


@pytest.fixture
def gate(monkeypatch):
    """Generating waits for gate.set()."""
    gate, plain = threading.Event(), sample.generate

    def generate(**job):
        assert gate.wait(60)
        return plain(**job)

    monkeypatch.setattr(sample, "generate", generate)
    yield gate
    gate.set()


def connect(server, method, path, body=None, headers=None):
    """The connection, after the request is sent."""
    connection = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=60)
    body = json.dumps(body).encode() if isinstance(body, dict) else body
    connection.request(method, path, body, headers or {})
    return connection


def ask(server, method, path, body=None, headers=None):
    """(status, body, headers) of an answer."""
    with contextlib.closing(connect(server, method, path, body, headers)) as connection:
        response = connection.getresponse()
        return response.status, response.read(), response.headers


def start(server, **request):
    """The response to a request to generate, of which events can be read."""
    return connect(server, "POST", "/generate", {"prompt": "a", "n": 1, "steps": 2} | request, HEADERS).getresponse()


def next_event(response):
    line = response.readline()
    assert line.startswith(b"data: ") and response.readline() == b"\n", line
    return json.loads(line[6:])


def generated(server, **request):
    """All events of a request."""
    status, body, _ = ask(server, "POST", "/generate", request, HEADERS)
    assert status == 200, body
    return [json.loads(part.removeprefix("data: ")) for part in body.decode().split("\n\n") if part]


def idle(server):
    """Wait until nobody is in the queue."""
    end = time.time() + 60
    while server.line:
        assert time.time() < end, "the queue is not freed"
        time.sleep(0.02)


def upload(path):
    return {"name": os.path.basename(path), "data": base64.b64encode(path.read_bytes()).decode()}


# --- routes ---


def test_every_route(serve):
    server = serve("text")
    for path, kind, content in (
        ("/", "text/html; charset=utf-8", b"<!doctype html>"),
        ("/model", "application/json", b'"text": true'),
        ("/runs", "application/json", b'{"one": {'),
        ("/runs/one", "application/json", b'"samples_00000003.png": '),
        ("/runs/one/samples_00000003.png?now", "image/png", b"\x89PNG"),
    ):
        status, body, headers = ask(server, "GET", path)
        assert (status, headers["Content-Type"]) == (200, kind) and content in body, path
        assert all(headers[name] == value for name, value in app.SAFE_HEADERS.items())


def test_what_the_page_knows_of_a_checkpoint(serve):
    for name, expected in (
        ("text", {"text": True, "classes": [], "size": [32, 32], "examples": ["a red star", "a blue circle"]}),
        ("class", {"text": False, "classes": ["cat", "dog", "7", "tench, Tinca"], "examples": []}),
        ("sr", {"task": "sr", "sr_noise": 10}),
    ):
        about = json.loads(ask(serve(name), "GET", "/model")[1])
        assert about.items() >= expected.items() and about["defaults"]["steps"] == 20


EVIL = "http://evil.example"
REFUSED = [
    ("GET", "/nothing", {}, 404),
    ("GET", "/app.py", {}, 404),
    ("GET", "//etc/passwd", {}, 404),
    ("GET", "/../../etc/passwd", {}, 404),
    ("GET", "/runs/nowhere", {}, 404),
    ("GET", "/runs/..", {}, 404),
    ("GET", "/runs/.", {}, 404),
    ("GET", "/runs/%2e%2e%2f", {}, 404),
    ("GET", "/runs/%00", {}, 404),
    ("GET", "/runs/%ff/%ff", {}, 404),
    ("GET", "/runs/one/log.jsonl", {}, 404),
    ("GET", "/runs/one/../secret_1.png", {}, 404),
    ("GET", "/runs/one/..%2fsecret_1.png", {}, 404),
    ("GET", "/runs/../secret_1.png", {}, 404),
    ("GET", "/runs/one/samples_00000003.png/", {}, 404),
    ("GET", "/" + "x" * 70000, {}, 414),
    ("GET", "/", {f"X-{i}": "1" for i in range(200)}, 431),
    ("GET", "/", {"X": "1" * 70000}, 431),
    ("GET", "/", {"Host": "evil.example"}, 403),
    ("GET", "/runs", {"Host": "127.0.0.1.evil.example:8000"}, 403),
    ("GET", "/model", {"Host": ""}, 403),
    ("POST", "/generate", {"Host": "evil.example"}, 403),
    ("POST", "/generate", {"Origin": EVIL}, 403),
    ("POST", "/generate", {"Origin": "null"}, 403),
    ("POST", "/generate", {"Origin": "http://localhost:1"}, 403),
    ("POST", "/generate", {"Sec-Fetch-Site": "cross-site"}, 403),
    ("POST", "/generate", {"Sec-Fetch-Site": "same-site"}, 403),
    ("POST", "/runs", {}, 404),
    ("POST", "/generate", {}, 415),
    ("POST", "/generate", {"Content-Type": "text/plain"}, 415),
    ("POST", "/generate", {"Content-Length": "-1"}, 415),
    ("POST", "/generate", {"Content-Length": "many"}, 415),
    ("POST", "/generate", {"Content-Length": "9" * 5000}, 415),
    ("POST", "/generate", {"Content-Length": str(app.MAX_BODY + 1)}, 413),
    ("PUT", "/generate", {}, 501),
    ("DELETE", "/runs/one", {}, 501),
]


@pytest.mark.parametrize("method, path, headers, expected", REFUSED, ids=lambda value: str(value)[:40])
def test_what_is_refused(serve, method, path, headers, expected):
    headers = (HEADERS if "Content-Length" in headers or len(headers) == 1 and method == "POST" else {}) | headers
    status, body, _ = ask(serve("text"), method, path, headers=headers)
    assert status == expected and body.count(b"\n") == 1 and b"Traceback" not in body and b"secret" not in body, body


@pytest.mark.parametrize("host", ["localhost", "LOCALHOST:1", "127.0.0.1"])
def test_own_hosts(serve, host):
    """With any port: ssh -L forwards another one."""
    assert ask(serve("text"), "GET", "/runs", headers={"Host": host})[0] == 200
    own = {"Host": host, "Origin": f"http://{host}", "Sec-Fetch-Site": "same-origin"}
    assert ask(serve("text"), "POST", "/generate", {"steps": 0}, HEADERS | own)[0] == 400


# --- wrong requests ---

DOT = {"name": "a.png", "data": "AAAA"}
WRONG = [
    ("text", b"", "a request is JSON"),
    ("text", b"{", "a request is JSON"),
    ("text", b"\xff", "a request is JSON"),
    ("text", b"[" * 100000, "a request is JSON"),
    ("text", b"[1]", "a request is a JSON object"),
    ("text", {}, "--prompt is empty"),
    ("text", {"promt": "a"}, "unknown setting 'promt': did you mean 'prompt'"),
    ("text", {"prompt": "a", "ckpt": "other"}, "unknown setting 'ckpt'"),
    ("text", {"prompt": "a", "out_dir": "/tmp"}, "unknown setting 'out_dir'"),
    ("text", {"prompt": "a", "prompts": "/etc/passwd"}, "unknown setting 'prompts'"),
    ("text", {"prompt": ["a"]}, "--prompt=['a'] must be str"),
    ("text", {"prompt": "a" * 2001}, "--prompt is longer than 2000 characters"),
    ("text", b'{"prompt": "a \\ud83c"}', "--prompt has half a character"),
    ("text", {"prompt": "a", "steps": 0}, "--steps=0 must be in [1, 1000]"),
    ("text", {"prompt": "a", "steps": None}, "--steps=None must be int"),
    ("text", {"prompt": "a", "steps": {"a": 1}}, "--steps="),
    ("text", b'{"prompt": "a", "guidance": NaN}', "--guidance=nan must be >= 0"),
    ("text", b'{"prompt": "a", "seed": 1e400}', "--seed=inf must be in"),
    ("text", {"prompt": "a", "sampler": "magic"}, "--sampler=magic must be one of"),
    ("text", {"prompt": "a", "size": [30]}, "size=30 must be one or two multiples of 8"),
    ("text", {"prompt": "a", "size": [0, -8]}, "--size=[0, -8] must be each >= 1"),
    ("text", {"prompt": "a", "size": [8, 8, 8]}, "size=8,8,8 must be"),
    ("text", {"prompt": "a", "n": 17}, "17 x 32x32: the page generates at most 16 images"),
    ("text", {"prompt": "a", "n": 1, "size": [8, 8000000]}, "1 x 8000000x8: the page generates at most"),
    ("text", {"prompt": "a", "cls": "dog"}, "--cls=dog has no effect here"),
    ("text", {"prompt": "a", "strength": 0.5}, "--strength=0.5 has no effect here; it needs --init_image"),
    ("text", {"prompt": "a", "negative": "b", "guidance": 1}, "--negative=b has no effect here; it needs guidance"),
    ("text", {"prompt": "a", "init_image": "/etc/passwd"}, "init_image is no upload"),
    ("text", {"prompt": "a", "init_image": {"name": "a.png"}}, "init_image is no upload"),
    ("text", {"prompt": "a", "init_image": {"name": 1, "data": ""}}, "init_image is no upload"),
    ("text", {"prompt": "a", "init_image": {"name": "a.png", "data": "no base64"}}, "init_image is no upload"),
    ("text", {"prompt": "a", "init_image": DOT}, "--init_image: does not open as an image"),
    ("text", {"prompt": "a", "mask": DOT}, "has no effect here; it needs --init_image"),
    ("text", {"prompt": "a", "semantic_map": DOT}, "it needs a checkpoint with task=semantic"),
    ("class", {"steps": 2}, "--cls is empty: choose a class"),
    ("class", {"cls": "cow"}, "--cls=cow is not a class of this checkpoint"),
    ("class", {"cls": "cat,dog,7", "n": 8}, "24 x 32x32: the page generates at most 16 images"),
    ("none", {"guidance": 2}, "--guidance=2.0 has no effect here"),
    ("sr", {}, "this checkpoint (task=sr) needs --init_image"),
    ("sr", {"init_image": DOT, "noise_level": 11}, "--noise_level=11"),
    ("sr", {"init_image": DOT}, "--init_image: does not open as an image"),
    ("inpaint", {"prompt": "a"}, "this checkpoint (task=inpaint) needs --init_image"),
    ("semantic", {"semantic_map": DOT}, "--semantic_map: does not open as an image"),
]


@pytest.mark.parametrize("name, body, message", WRONG, ids=lambda value: str(value)[:40])
def test_wrong_requests(serve, name, body, message):
    status, answer, _ = ask(serve(name), "POST", "/generate", body, HEADERS)
    assert status == 400 and answer.count(b"\n") == 1 and message in answer.decode(), answer
    assert b"/tmp" not in answer.replace(b"out_dir=/tmp", b"") and not serve(name).line


def test_uploads_that_are_too_large(serve, tmp_path):
    data = base64.b64encode(bytes(app.MAX_UPLOAD + 1)).decode()
    body = {"prompt": "a", "init_image": {"name": "a.png", "data": data}}
    status, answer, _ = ask(serve("text"), "POST", "/generate", body, HEADERS)
    assert status == 413 and answer == b"init_image has 20,971,521 bytes: send at most 20,971,520\n"
    Image.new("L", (3000, 3000)).save(tmp_path / "a.png")  # 27 kB
    body = {"n": 1, "init_image": upload(tmp_path / "a.png")}
    status, answer, _ = ask(serve("sr"), "POST", "/generate", body, HEADERS)
    assert status == 400 and b"1 x 6000x6000: the page generates at most" in answer
    Image.new("1", (10000, 10000)).save(tmp_path / "a.png")  # 12 kB, 300 MB as RGB
    body = {"prompt": "a", "n": 1, "init_image": upload(tmp_path / "a.png")}
    status, answer, _ = ask(serve("text"), "POST", "/generate", body, HEADERS)
    assert status == 400 and b"10000x10000 is over PIL.Image.MAX_IMAGE_PIXELS" in answer


# --- generating ---

GENERATED = [
    ("text", {"prompt": "a red star", "n": 2, "seed": 5, "guidance": 2.5}, ()),
    ("text", {"prompt": "é 🌟", "negative": "dark", "size": [16, 48], "sampler": "heun"}, ()),
    ("class", {"cls": "tench, Tinca", "n": 1, "sampler": "ddpm"}, ()),
    ("tokens", {"cls": "dog", "n": 1}, ()),
    ("none", {"n": 3}, ()),
    ("pixels", {"n": 1}, ()),
    ("text", {"prompt": "b", "n": 1, "strength": 0.5, "steps": 4}, ("init_image",)),
    ("none", {"n": 1, "size": [32, 40]}, ("init_image", "mask")),
    ("inpaint", {"prompt": "b", "n": 1}, ("init_image", "mask")),
    ("sr", {"n": 1, "noise_level": 3}, ("init_image",)),
    ("semantic", {"n": 1}, ("semantic_map",)),
]


@pytest.mark.parametrize("name, request_, files", GENERATED)
def test_images_are_the_files_of_sample_py(serve, runs, command, tmp_path, name, request_, files):
    rng, values = np.random.default_rng(0), {"n": 4, "steps": 2} | request_
    for file in files:
        pixels = {
            "init_image": rng.integers(0, 256, (32, 40, 3)),
            "mask": np.pad(np.full((12, 26), 255), ((8, 12), (4, 10))),
            "semantic_map": rng.integers(0, 5, (32, 32)),
        }
        Image.fromarray(pixels[file].astype(np.uint8)).save(f"{file}.png")
    events = generated(serve(name), **values, **{file: upload(tmp_path / f"{file}.png") for file in files})
    counts = [event["evaluation"] for event in events[:-1]]
    assert counts == list(range(events[0]["of"] + 1))
    for event in events[1:-1]:
        assert [base64.b64decode(image)[:3] for image in event["images"]] == [b"\xff\xd8\xff"] * values["n"]
    if files and name != "sr":  # the page generates at the trained size unless told otherwise
        values = {"size": [32, 32]} | values
    args = [f"--{key}={','.join(map(str, v)) if key == 'size' else v}" for key, v in values.items()]
    args += [f"--{file}={file}.png" for file in files]
    common = ("--device=cpu", "--dtype=float32", f"--ckpt={runs[name].path}")
    status, _, error = command("sample.py", *common, *args)
    assert (status, error) == (0, "")
    folder = f"{runs[name].path}/samples"
    with open(f"{folder}/samples.jsonl") as file:
        records = [json.loads(line) for line in file]
    for record, image in zip(records, events[-1]["done"], strict=True):
        png = base64.b64decode(image.pop("png"))
        assert image == record
        with open(f"{folder}/{record['file']}", "rb") as file:
            assert file.read() == png


@pytest.mark.parametrize("channels, color", [(1, "black"), (3, "black"), (4, "white")])
def test_gray_and_transparent_images_are_streamed(channels, color):
    jpeg = Image.open(io.BytesIO(base64.b64decode(app.to_jpeg(torch.full((channels, 8, 8), -1.0)))))
    assert jpeg.convert("RGB").tobytes() == Image.new("RGB", (8, 8), color).tobytes()


@pytest.mark.parametrize("sampler", sample.samplers)
def test_number_of_evaluations(serve, sampler):
    for steps in (1, 5):
        events = generated(serve("none"), sampler=sampler, n=1, steps=steps)
        less = sampler == "plms" and steps > 1  # it begins with a DDIM step where alpha is 0, as it is here
        assert events[-2]["evaluation"] == events[0]["of"] - less and "images" in events[-2]


def test_a_checkpoint_that_is_missing_and_one_that_changes(runs, tmp_path):
    model = app.Model({"ckpt": str(tmp_path), "device": "cpu"})
    assert "no latest.safetensors in it" in model.about()["missing"]
    for name in ("none", "text"):  # training has saved another one
        shutil.copy(f"{runs[name].path}/latest.safetensors", tmp_path)
        assert model.about()["text"] == (name == "text") and model.load() is model.load()
    (tmp_path / "latest.safetensors").unlink()
    assert "no such checkpoint" in model.about()["missing"]


def test_an_error_while_generating_is_one_line(serve, monkeypatch, capsys):
    def fail(**job):
        raise RuntimeError("out of\nmemory")

    with monkeypatch.context() as patch:
        patch.setattr(sample, "generate", fail)
        events = generated(serve("text"), prompt="a")
    assert events[1] == {"error": "RuntimeError: out of memory; see the terminal of app.py"}
    assert "Traceback" in capsys.readouterr().err
    assert generated(serve("text"), prompt="a", n=1, steps=1)[-1]["done"]


# --- several clients ---


def test_two_clients_take_turns(serve, gate):
    server = serve("text")
    first = start(server)
    assert next_event(first) == {"evaluation": 0, "of": 2}
    second = start(server)
    assert next_event(second) == next_event(second) == {"ahead": 1}
    assert ask(server, "GET", "/runs")[0] == 200, "others are answered meanwhile"
    gate.set()
    done = []
    for response in (first, second):
        events = [json.loads(part.removeprefix("data: ")) for part in response.read().decode().split("\n\n") if part]
        done.append(events[-1]["done"])
    assert done[0] == done[1]
    idle(server)


def test_a_full_queue(serve, gate):
    server = serve("text")
    waiting = [start(server) for _ in range(1 + app.MAX_WAITING)]
    for response in waiting:
        next_event(response)
    refused = start(server)
    assert (refused.status, refused.read()) == (503, b"4 requests are waiting already: try again later\n")
    gate.set()
    assert all(b'"done"' in response.read() for response in waiting)
    idle(server)


@pytest.mark.parametrize("who", ["generating", "waiting"])
def test_a_client_that_goes_away(serve, gate, who):
    """Frees the queue, between two evaluations or while it waits."""
    server = serve("text")
    first, second = start(server, steps=1000), start(server)
    next_event(first), next_event(second)
    gone, other = (first, second) if who == "generating" else (second, first)
    length = len(server.line)
    gone.close()
    if who == "generating":
        gate.set()
        assert b'"done"' in other.read()
    else:
        end = time.time() + 60
        while len(server.line) == length and time.time() < end:
            time.sleep(0.02)
        assert len(server.line) == 1
        other.close()
        gate.set()
    idle(server)


def test_a_client_that_goes_away_before_its_request_is_whole(serve, capsys):
    server = serve("text")
    for data in (b"", b"GET /ru", b"POST /generate HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"):
        for more in (b"", b"Content-Length: 100\r\n\r\n{"):
            with socket.create_connection(("127.0.0.1", server.server_port)) as connection:
                connection.sendall(data + more)
    assert ask(server, "GET", "/runs")[0] == 200 and not server.line
    assert "Traceback" not in capsys.readouterr().err


def test_too_many_connections(serve):
    server = serve("none")
    address = ("127.0.0.1", server.server_port)
    open_ones = [socket.create_connection(address) for _ in range(app.MAX_CONNECTIONS)]
    with socket.create_connection(address) as connection:
        assert connection.recv(100).endswith(b"too many connections: close a tab\n")
    for connection in open_ones:
        connection.close()
    end = time.time() + 60
    while server.slots._value < app.MAX_CONNECTIONS and time.time() < end:
        time.sleep(0.02)
    assert ask(server, "GET", "/runs")[0] == 200


def test_a_slow_client_is_left(serve, monkeypatch):
    monkeypatch.setattr(app.Handler, "timeout", 0.2)
    with socket.create_connection(("127.0.0.1", serve("none").server_port)) as connection:
        connection.settimeout(60)
        connection.sendall(b"GET /runs HTTP/1.1\r\n")
        assert connection.recv(100) == b""


# --- runs ---


def progress(step, **more):
    return {"step": step, "images_seen": 4 * step, "loss": 1 / step, "lr": 1e-3, "images_per_s": 8.0} | more


def write_run(folder, records, **config):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "log.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    about = {"script": "train_ldm.py", "changed": {}, "config": {"max_steps": 10} | config}
    (folder / "settings.json").write_text(json.dumps(about))


def test_runs_are_found_and_named(tmp_path):
    for name in ("a", "b/c", "b/c/d"):
        write_run(tmp_path / name, [progress(1)])
    (tmp_path / "broken/log.jsonl").mkdir(parents=True)  # not a file
    assert sorted(app.Runs(tmp_path).about()) == ["a", "b/c", "broken"]
    assert list(app.Runs(tmp_path / "a").about()) == ["a"], "the folder is a run itself"
    assert app.Runs(tmp_path / "nowhere").about() == {}


def test_a_run_that_is_written_while_it_is_read(tmp_path):
    write_run(tmp_path / "a", [progress(1), {"step": 1, "val_loss": 2.0, "val_loss_by_t": [1.0, None, 3.0]}])
    runs, log = app.Runs(tmp_path), tmp_path / "a/log.jsonl"
    about = runs.about("a")
    assert about["progress"]["loss"] == [1.0] and about["evaluations"]["val_loss_by_t"] == [[1.0, None, 3.0]]
    assert about["max_steps"] == 10 and about["age"] < 60 and about["script"] == "train_ldm.py"
    line = json.dumps(progress(2)).encode() + b"\n"
    for part, steps in ((line[:20], [1.0]), (line[20:-1], [1.0]), (b"\n", [1.0, 2.0]), (line, [1.0, 2.0])):
        with log.open("ab") as file:
            file.write(part)
        assert runs.about("a")["progress"]["step"] == steps
        assert runs.about()["a"]["last"]["step"] == steps[-1]
    read = runs.known["a"].offset
    assert read == log.stat().st_size, "what was read is not read again"
    write_run(tmp_path / "a", [progress(7, loss=0.5)])  # another run in the same folder
    assert runs.about("a")["progress"]["step"] == [7.0]
    log.unlink()
    assert runs.about() == {}


def test_a_resumed_run(tmp_path):
    """Repeats steps: the last values count."""
    write_run(tmp_path / "a", [progress(1), progress(2), progress(3), progress(2, loss=9.0)])
    table = app.Runs(tmp_path).about("a")["progress"]
    assert table["step"] == [1.0, 2.0, 3.0] and table["loss"] == [1.0, 9.0, 0.333333]


DAMAGED = [
    b"",
    b"\n\n",
    b"\x00\xff\xfe\n",
    b'{"step": 5, "images_per_s"\n',
    b'"images_per_s"\n[1]\n5\nnull\n',
    b'{"images_per_s": 1}\n',
    b'{"step": null, "images_per_s": 1}\n',
    b'{"step": 1e999, "images_per_s": 1}\n',
    b'{"step": ' + b"9" * 5000 + b', "images_per_s": 1}\n',
    b"[" * 100000 + b'"images_per_s"\n',
    b"x" * 100000 + b"\n",
]


@pytest.mark.parametrize("damage", DAMAGED)
def test_damaged_logs(tmp_path, damage):
    write_run(tmp_path / "a", [progress(1)])
    with (tmp_path / "a/log.jsonl").open("ab") as file:
        file.write(damage + json.dumps(progress(2)).encode() + b"\n" + damage)
    runs = app.Runs(tmp_path)
    assert runs.about("a")["progress"]["step"] == [1.0, 2.0]
    json.dumps([runs.about(), runs.about("a")], allow_nan=False)


def test_values_that_are_no_numbers(tmp_path):
    values = [1.23456789, float("nan"), float("inf"), None, "x", {"a": 1}, 10**400, [1, None, float("nan"), [2]], True]
    write_run(tmp_path / "a", [progress(i, loss=value) for i, value in enumerate(values, 1)])
    loss = app.Runs(tmp_path).about("a")["progress"]["loss"]
    assert loss == [1.23457, None, None, None, None, None, None, [1.0, None, None, None], 1.0]


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"script": 1}', b"[" * 100000, b'{"config": {"lr": NaN}}'])
def test_damaged_settings(tmp_path, content):
    write_run(tmp_path / "a", [progress(1)])
    (tmp_path / "a/settings.json").write_bytes(content)
    about = app.Runs(tmp_path).about("a")
    assert about["config"] == {} and about["max_steps"] is None and about["last"]["step"] == 1


def test_a_long_run_is_thinned_and_opens_within_two_seconds(tmp_path):
    write_run(tmp_path / "a", [])
    terms = {f"term_{i}": 0.123456789 for i in range(5)}
    lines = (json.dumps(progress(step, **terms)) + "\n" for step in range(1, 400_001))
    (tmp_path / "a/log.jsonl").write_text("".join(lines))
    runs, started = app.Runs(tmp_path), time.process_time()
    steps = runs.about("a")["progress"]["step"]
    assert time.process_time() - started < 2
    assert app.MAX_POINTS / 2 <= len(steps) <= app.MAX_POINTS + 1 and (steps[0], steps[-1]) == (1, 400_000)
    with (tmp_path / "a/log.jsonl").open("a") as file:
        file.write(json.dumps(progress(400_001)) + "\n")
    started = time.process_time()
    assert runs.about("a")["last"]["step"] == 400_001 and time.process_time() - started < 0.2


def test_grids(tmp_path):
    write_run(tmp_path / "a", [progress(1)])
    for name in ("samples_00000003.png", "recon_5.png", "loss.png", "latest.safetensors", "samples_3.png.tmp"):
        (tmp_path / "a" / name).write_bytes(name.encode())
    (tmp_path / "a/samples_1.png").symlink_to("nowhere")
    runs = app.Runs(tmp_path)
    assert list(runs.about("a")["images"]) == ["recon_5.png", "samples_00000003.png"]
    assert runs.image("a", "recon_5.png") == b"recon_5.png"


# --- the command ---


def test_command(runs, tmp_path):
    """Prints its address, without a checkpoint and without runs too; warns where others can reach it."""

    def launch(*args):
        args = (sys.executable, f"{ROOT}/app.py", "--port=0", "--open=false", "--device=cpu", *args)
        pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        # tests in the background inherit an ignored SIGINT
        return subprocess.Popen(args, cwd=tmp_path, **pipes, preexec_fn=lambda: signal.signal(2, signal.SIG_DFL))

    with launch("--host=0.0.0.0") as process:
        port = int(process.stdout.readline().split(" ")[0].rpartition(":")[2])
        assert process.stdout.readline().startswith("warning: everyone who reaches this address")
        connection = http.client.HTTPConnection("localhost", port, timeout=60)
        connection.request("GET", "/model")
        assert b"out/ldm: no such checkpoint" in connection.getresponse().read()
        with launch(f"--port={port}", "--host=127.0.0.1") as second:
            error = second.communicate()[1]
        assert error.startswith(f"app.py: cannot listen on 127.0.0.1:{port} (") and error.count("\n") == 1
        process.send_signal(2)
        assert process.wait(60) == 0 and process.stderr.read() == ""


# --- the page ---


class Page:
    """app.html of a server in headless Chromium."""

    def __init__(self, driver, server):
        self.driver, self.run, self.downloads = driver, driver.execute_script, driver.downloads
        driver.get(f"http://127.0.0.1:{server.server_port}/")
        self.wait(lambda: self.run("return model !== null && !document.getElementById('form').hidden"))

    def find(self, selector):
        return self.driver.find_element("css selector", selector)

    def wait(self, condition):
        end = time.time() + 60
        while not (value := condition()):
            assert time.time() < end, self.find("#status").text
            time.sleep(0.05)
        return value

    def fill(self, **values):
        for name, value in values.items():
            self.run("document.getElementById('form').elements[arguments[0]].value = arguments[1]", name, value)

    def generate(self):
        """Click the button, and download the PNGs: {name: bytes}."""
        self.find("#go").click()
        boxes = self.boxes()
        self.wait(lambda: self.find("#status").text.startswith(("1 image in", "2 images in")))
        assert self.boxes() == boxes
        files = {}
        for link in self.driver.find_elements("css selector", "#stage a"):
            file = self.downloads / link.get_attribute("download")
            link.click()
            self.wait(file.exists)
            files[file.name] = file.read_bytes()
            file.unlink()
        return files

    def boxes(self):
        """Where things are."""
        return self.run(
            "return ['#go', '#status', '#stage', '#strip'].map(s => { const r = document.querySelector(s)"
            ".getBoundingClientRect(); return [r.x, r.y + scrollY, r.width, r.height] })"
        )


@pytest.fixture(scope="module")
def driver(tmp_path_factory):
    webdriver = pytest.importorskip("selenium.webdriver", reason="no selenium: pip install -r tests/requirements.txt")
    chromium, path = shutil.which("chromium"), shutil.which("chromedriver")
    if not (chromium and path):
        pytest.skip("no Chromium: apt-get install chromium chromium-driver")
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for argument in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--window-size=1300,900"):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    downloads = tmp_path_factory.mktemp("downloads")
    options.add_experimental_option("prefs", {"download.default_directory": str(downloads)})
    driver = webdriver.Chrome(options, webdriver.ChromeService(path))
    driver.downloads = downloads
    yield driver
    errors = driver.get_log("browser")
    driver.quit()
    assert errors == []


def test_page_generates(serve, driver, runs, command):
    """The stream, the files of sample.py, the strip that brings settings back, Stop; nothing moves meanwhile."""
    page = Page(driver, serve("text"))
    assert page.find("[name=prompt]").get_attribute("value") == "a red star", "an example"
    page.find("[name=prompt]").clear()
    page.find("[name=prompt]").send_keys("a blue star")
    page.fill(n=2, steps=3, seed=7, guidance=2.5, sampler="ddim")
    pngs = page.generate()
    settings = ("--prompt=a blue star", "--n=2", "--steps=3", "--seed=7", "--guidance=2.5", "--sampler=ddim")
    args = ("--device=cpu", "--dtype=float32", "--out_dir=", *settings)
    assert command("sample.py", f"--ckpt={runs['text'].path}", *args)[0] == 0
    for i, name in enumerate(("a-blue-star-7.png", "a-blue-star-8.png")):
        with open(f"{runs['text'].path}/samples/0000{i}.png", "rb") as file:
            assert file.read() == pngs[name]
    page.fill(prompt="another", steps=9, guidance=1, seed=0)
    page.find("#strip button").click()
    page.wait(lambda: "settings of these images are back" in page.find("#status").text)
    values = [page.find(f"[name={name}]").get_attribute("value") for name in ("prompt", "steps", "guidance", "seed")]
    assert values == ["a blue star", "3", "2.5", "7"]
    page.fill(steps=1000)
    page.find("#go").click()
    page.wait(lambda: page.find("#status").text.startswith("evaluation "))
    frame = page.find("#stage img").get_attribute("src")
    page.wait(lambda: page.find("#stage img").get_attribute("src") != frame)
    page.find("#go").click()
    page.wait(lambda: page.find("#status").text == "stopped")
    idle(serve("text"))
    page.fill(steps=3, size="30")
    page.find("#go").click()
    page.wait(lambda: "size=30 must be one or two multiples of 8" in page.find("#status").text)
    assert len(driver.get_log("browser")) == 1, "that answer is a 400"


def test_page_paints_a_mask(serve, driver, tmp_path):
    from selenium.webdriver import ActionChains, Keys

    pixels = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "photo.png")
    page = Page(driver, serve("text"))
    page.fill(n=1, steps=2)
    page.find("#file").send_keys(str(tmp_path / "photo.png"))
    mask = page.wait(lambda: page.find("#mask").is_displayed() and page.find("#mask"))
    ActionChains(driver).move_to_element_with_offset(mask, -60, -60).click_and_hold().move_by_offset(
        40, 0
    ).release().perform()
    assert page.find("[name=strength]").get_attribute("value") == "1"
    (png,) = page.generate().values()
    (tmp_path / "a.png").write_bytes(png)
    with Image.open(tmp_path / "a.png") as image:
        same, record = (np.array(image) == pixels).all(2), json.loads(image.text["settings"])
    assert (record["from"], record["config"]["mask"], record["strength"]) == ("photo.png", "mask.png", 1.0)
    assert same[16:].all() and same[:, 28:].all() and 10 < (~same).sum() < 300
    page.find("#clear").click()
    mask.send_keys(Keys.ARROW_RIGHT, Keys.ARROW_DOWN, Keys.SPACE)  # in the middle
    (png,) = page.generate().values()
    (tmp_path / "a.png").write_bytes(png)
    changed = (np.array(Image.open(tmp_path / "a.png")) != pixels).any(2)
    assert changed[14:20, 14:20].any() and not changed[:8].any() and not changed[:, :8].any()
    page.find("#remove").click()
    assert not page.find("#mask").is_displayed()


def test_page_of_each_checkpoint(serve, driver):
    """Shows what the checkpoint takes."""
    for name, expected in (
        ("text", "prompt guidance size"),
        ("class", "cls guidance size"),
        ("none", "size"),
        ("sr", "noise_level"),
    ):
        page = Page(driver, serve(name))
        fields = ("prompt", "cls", "guidance", "size", "noise_level", "strength")
        shown = "return document.querySelector(`[name=${arguments[0]}]`)?.offsetParent != null"
        assert [field for field in fields if page.run(shown, field)] == expected.split(), name


def test_page_shows_runs(serve, driver):
    from selenium.webdriver import Keys

    page = Page(driver, serve("text"))
    page.find("header [href='#runs']").click()
    page.wait(lambda: page.find("#run").is_displayed())
    assert page.find("#run-progress").text.startswith("train_ldm.py: step 3 of 10")
    titles = [title.text for title in driver.find_elements("css selector", "#charts h3")]
    assert titles[0] == "loss (log scale)" and "learning rate" in titles
    assert page.find("#grids img").get_attribute("alt") == "samples at step 3"
    page.find("#step").send_keys(Keys.ARROW_LEFT)
    assert (
        page.find("#grids img").get_attribute("alt") == "samples at step 1"
        and page.find("#step-value").text == "step 1"
    )
    page.wait(lambda: page.run("return document.querySelector('#grids img').naturalWidth") == 8)


@pytest.mark.parametrize("width", [320, 390, 1300, 2560])
def test_page_fits_every_width(serve, driver, width):
    driver.execute_cdp_cmd(
        "Emulation.setDeviceMetricsOverride", dict(width=width, height=800, deviceScaleFactor=1, mobile=False)
    )
    page = Page(driver, serve("text"))
    for name in ("generate", "runs"):
        page.find(f"header [href='#{name}']").click()
        page.wait(page.find(f"main#{name}").is_displayed)
        assert page.run("return document.documentElement.scrollWidth") <= width
    driver.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
