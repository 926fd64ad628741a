"""A page to watch runs train and to generate images from a checkpoint.

    python app.py --ckpt=out/shapes_ldm                          # the quick start's model, and all runs in out/
    python app.py --ckpt=FILE_OR_FOLDER_OR_ID --runs=DIR --port=8000
    python app.py --ckpt=out/ldm --host=0.0.0.0                  # for other machines too; there is no password

The page is app.html. GET /model, /runs and /runs/RUN are JSON, /runs/RUN/FILE is an image grid of a run. POST /generate
takes settings of sample.py as JSON and streams server-sent events: x0_hat at every evaluation, then the PNGs that
sample.py writes. Each answer closes its connection (HTTP/1.0).
"""

import base64
import contextlib
import io
import itertools
import json
import math
import os
import re
import select
import socket
import sys
import tempfile
import threading
import time
import traceback
import urllib.parse
import webbrowser
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import torch

import checkpoint
import sample
from checkpoint import UserError
from common import install_excepthook, read_records, setup
from configurator import SettingError, checked, configure, find, find_settings, make_config
from grid import as_rgb, to_pil

# what to show
ckpt = "out/ldm"  # stage-2 checkpoint or its out_dir; or another project's file, folder or Hugging Face id
runs = "out"  # folder of runs: each out_dir in it is shown
# the server
host = "127.0.0.1"  # address to listen on; 0.0.0.0 is every network of this machine
port = 8000  # in [0, 65535]: 0 is any free one
open = True  # open the page in a browser, if there is one
# the model, as in sample.py
denoiser = ""  # MODULE:CLASS of your own denoiser, such as mine:DiT, if the checkpoint was trained with one
tower_weights = ""  # file or folder of the frozen text encoder, if moved since training
clip_vocab = ""  # file or folder of its tokenizer, if moved since training
device = "auto"  # auto | cpu | cuda | mps
dtype = "auto"  # auto | float32 | bfloat16: auto is bfloat16 on CUDA, else float32

SETTINGS = find_settings(vars(sample))
MODEL = ("ckpt", "denoiser", "tower_weights", "clip_vocab", "device", "dtype")  # of these and of sample.py
FORM = "prompt negative cls n size seed sampler steps guidance strength noise_level".split()  # of a request
UPLOADS = ("init_image", "mask", "semantic_map")  # of a request, as {"name": of the file, "data": in base64}
MAX_UPLOAD = 20 * 2**20  # bytes of a file
MAX_BODY = 28 * 2**20  # bytes of a request: a file in base64, a mask and settings
MAX_TEXT = 2000  # characters of a setting
MAX_IMAGES, MAX_PIXELS = 16, 2**24  # of a request
MAX_WAITING = 4  # requests that wait for the one that is generating
MAX_CONNECTIONS = 32
MAX_POINTS = 1000  # of a curve
SAFE_HEADERS = {
    "Cache-Control": "no-store",
    "Content-Security-Policy": "default-src 'self' 'unsafe-inline'; img-src 'self' blob: data:; frame-ancestors 'none'",
    "Cross-Origin-Resource-Policy": "same-origin",
    "X-Content-Type-Options": "nosniff",
}


class Refused(Exception):
    """A request that is answered with an HTTP status and one line."""

    def __init__(self, status, message):
        super().__init__(message)
        self.status = status


# --- generating ---


class Model:
    """The pipeline of a checkpoint, loaded when it is first used and again when the file has changed."""

    def __init__(self, values):
        """values: settings of sample.py."""
        self.values, self.path, self.stamp = values, None, None
        self.lock, self.reading = threading.Lock(), threading.Lock()  # reading: one upload is decoded at a time
        self.machine = setup(self.config())

    def config(self, **values):
        """The settings of sample.py with these."""
        return make_config(SETTINGS, self.values | values)

    def load(self):
        """The pipeline; UserError where there is no checkpoint."""
        with self.lock:
            self.path = checkpoint.find(self.path or self.values["ckpt"])  # a Hugging Face id is fetched once
            stamp = os.stat(self.path).st_mtime_ns
            if stamp != self.stamp:
                _, self.pipeline, _ = sample.load_from_settings(self.config(), self.machine)
                self.stamp = stamp
            return self.pipeline

    def about(self):
        """What the page has to know: what the checkpoint takes and its own settings, or why there is none."""
        try:
            pipeline = self.load()
        except UserError as error:
            return {"missing": str(error)}
        cfg = sample.with_sampling(self.config(), pipeline)
        return {
            "ckpt": cfg.ckpt,
            "text": pipeline.text is not None,
            "classes": [pipeline.caption(i) if pipeline.classes else str(i) for i in range(pipeline.num_classes)],
            "task": pipeline.task["task"],
            "sr_noise": pipeline.task.get("sr_noise") or 0,
            "examples": [example for example in pipeline.examples if isinstance(example, str)],
            "size": trained_size(pipeline),
            "samplers": list(sample.samplers),
            "defaults": {name: cfg[name] for name in FORM},
            "max_images": MAX_IMAGES,
            "max_upload": MAX_UPLOAD,
        }

    def plan(self, body, folder):
        """(keyword arguments of `generate`, records, settings) of a request; its uploads are written to `folder`."""
        try:
            request = json.loads(body)
        except (ValueError, RecursionError) as error:
            raise UserError(f"a request is JSON ({error})") from None
        if not isinstance(request, dict):
            raise UserError("a request is a JSON object of settings")
        names = {name: save_upload(name, request.pop(name), folder) for name in UPLOADS if name in request}
        form = {name: SETTINGS[name] for name in FORM}
        values = {name: checked(name, value, find(name, form)) for name, value in request.items()}
        for name, value in values.items():
            if len(str(value)) > MAX_TEXT:
                raise UserError(f"--{name} is longer than {MAX_TEXT} characters")
            if any("\ud800" <= character <= "\udfff" for character in str(value)):
                raise UserError(f"--{name} has half a character: send whole ones")
        pipeline = self.load()
        if pipeline.text is not None and not names and not values.get("prompt"):
            raise UserError("--prompt is empty: write what to generate")
        if pipeline.num_classes and not values.get("cls"):
            raise UserError("--cls is empty: choose a class")
        values["n"] = values.get("n") or 4
        if names and pipeline.task["task"] != "sr":
            values.setdefault("size", trained_size(pipeline))  # and not that of the upload, which may be large
        files = {name: os.path.join(folder, name) for name in names}
        cfg = sample.with_sampling(self.config(**values, **files), pipeline)
        try:
            sample.check_settings(cfg, pipeline)
            with self.reading:
                check_amount(cfg, pipeline)
                what, records = sample.plan(pipeline, cfg)
        except UserError as error:
            raise UserError(str(error).replace(f"{folder}{os.sep}", "--")) from None
        for record in records:
            record |= {"from": names[record["from"]]} if names else {}
        return sample.generate_options(cfg) | what | {"pipeline": pipeline}, records, cfg | names

    def generate(self, job, records, settings, folder, callback):
        """The PNGs that sample.py writes, in base64.  callback: of sample.generate."""
        with torch.autocast(self.machine.device.type, torch.bfloat16, enabled=self.machine.precision == "bfloat16"):
            images = sample.generate(callback=callback, **job)
        sample.save_samples(folder, images, records, settings)
        return [in_base64(Path(folder, record["file"]).read_bytes()) for record in records]


def trained_size(pipeline):
    """(height, width) in pixels."""
    return tuple(side * pipeline.factor for side in pipeline.latent_shape[1:])


def check_amount(cfg, pipeline):
    """UserError where a request asks for too many or too large images."""
    count = cfg.n * (len(sample.choose_conditions(pipeline, cfg)) if pipeline.num_classes else 1)
    height, width = (side * pipeline.factor for side in sample.latent_sides(pipeline, cfg.size))
    if pipeline.task["task"] == "sr" and cfg.init_image:
        (low,) = sample.open_images(cfg.init_image).values()
        width, height = (side * pipeline.task["sr_scale"] for side in low.size)
    if count > MAX_IMAGES or count * height * width > MAX_PIXELS:
        limit = f"{MAX_IMAGES} images and {MAX_PIXELS:,} pixels in all"
        raise UserError(f"{count} x {width}x{height}: the page generates at most {limit}; lower n or the size")


def evaluations(job):
    """How often `generate` calls back, at most."""
    steps = max(1, round(job["steps"] * job["strength"]))
    return {"heun": 2 * steps - 1, "plms": steps + (steps > 1)}.get(job["sampler"], steps)


def save_upload(name, upload, folder):
    """Write an upload to folder/name; returns the name of the user's file, for the metadata of the PNGs."""
    try:
        file, data = upload["name"][:MAX_TEXT], base64.b64decode(upload["data"], validate=True)
    except (ValueError, TypeError, KeyError) as error:
        raise UserError(f"{name} is no upload ({error}): send its name, and its data in base64") from None
    if len(data) > MAX_UPLOAD:
        raise Refused(413, f"{name} has {len(data):,} bytes: send at most {MAX_UPLOAD:,}")
    Path(folder, name).write_bytes(data)
    return file


def in_base64(data):
    return base64.b64encode(data).decode()


def to_jpeg(image):
    """(C,H,W) in [-1,1] -> JPEG in base64."""
    file = io.BytesIO()
    to_pil(as_rgb(image)).save(file, "JPEG", quality=90, subsampling=0)
    return in_base64(file.getvalue())


# --- runs ---


class Thinned:
    """Every k-th of the lines that were added, MAX_POINTS at most, and the last one."""

    def __init__(self):
        self.count, self.every, self.kept, self.last = 0, 1, [], []

    def add(self, line):
        if self.count % self.every == 0:
            self.kept.append(line)
        self.count, self.last = self.count + 1, [line]
        if len(self.kept) > MAX_POINTS:
            self.kept, self.every = self.kept[::2], 2 * self.every

    def lines(self):
        return self.kept + self.last


def table(lines):
    """{name: [its value at each step]} in the order of the steps; of a repeated step the last values count."""
    records = read_records(lines)
    names = {name for record in records for name in record}
    return {name: [plain(record.get(name)) for record in records] for name in sorted(names)}


def plain(value):
    """A number in 6 digits, a list of them, or None: JSON in a browser has neither NaN nor infinity."""
    if isinstance(value, list):
        return [None if isinstance(element, list) else plain(element) for element in value]
    try:
        value = float(f"{value:.6g}")
    except (ValueError, TypeError, OverflowError):
        return None
    return value if math.isfinite(value) else None


class Run:
    """A folder with a log.jsonl, which is read on from where the last call stopped."""

    def __init__(self, folder):
        self.folder, self.head, self.offset, self.changed = folder, b"", 0, 0.0
        self.progress, self.evaluations = Thinned(), Thinned()

    def read_on(self):
        """Read the lines that were added."""
        with (self.folder / "log.jsonl").open("rb") as file:
            head, stat = file.read(200), os.fstat(file.fileno())
            if not head.startswith(self.head) or stat.st_size < self.offset:
                self.__init__(self.folder)  # another run in the same folder
            self.head, self.changed = head, stat.st_mtime
            file.seek(self.offset)
            for line in file:
                if not line.endswith(b"\n"):  # half a line: the rest comes later
                    break
                (self.progress if b'"images_per_s"' in line else self.evaluations).add(line)
                self.offset += len(line)

    def about(self, details=False):
        """How far the run is; with `details` also its settings, curves and images."""
        with contextlib.suppress(OSError):  # just removed, or unreadable
            self.read_on()
        settings, last = self.settings(), table(self.progress.lines()[-2:])
        about = {"age": time.time() - self.changed, "last": {name: values[-1] for name, values in last.items()}}
        about |= {"script": settings["script"], "max_steps": plain(settings["config"].get("max_steps"))}
        if details:
            about |= settings | {"images": {name: path.stat().st_mtime for name, path in self.images().items()}}
            about |= {"progress": table(self.progress.lines()), "evaluations": table(self.evaluations.lines())}
        return about

    def settings(self):
        """settings.json as common.Log writes it."""
        try:
            about = json.loads((self.folder / "settings.json").read_bytes(), parse_constant=str)
            return {"script": str(about["script"]), "changed": dict(about["changed"]), "config": dict(about["config"])}
        except (OSError, ValueError, TypeError, KeyError, RecursionError):  # missing or damaged
            return {"script": "", "changed": {}, "config": {}}

    def images(self):
        """{name: path} of the grids NAME_STEP.png."""
        names = sorted(name for name in os.listdir(self.folder) if re.fullmatch(r"[a-z]+_\d+\.png", name))
        return {name: self.folder / name for name in names if (self.folder / name).is_file()}


class Runs:
    """The runs in a folder, up to two levels deep."""

    def __init__(self, folder):
        self.folder, self.known, self.lock = Path(folder), {}, threading.Lock()

    def about(self, name=None):
        """Of one run with details, or of all: {name: how far it is}."""
        with self.lock:
            if name is None:
                return {name: run.about() for name, run in self.find().items()}
            return self.find(name).about(details=True)

    def image(self, name, file):
        """The bytes of an image of a run."""
        with self.lock:
            images = self.find(name).images()
            if file not in images:
                raise Refused(404, "no such image")
            return images[file].read_bytes()

    def find(self, name=None):
        """{name: Run}, names relative to the folder, or one Run."""
        logs = [path for levels in ("", "*/", "*/*/") for path in sorted(self.folder.glob(f"{levels}log.jsonl"))]
        folders = {os.path.relpath(path.parent, self.folder): path.parent for path in logs}
        if "." in folders:  # in an address it would be the folder above
            folders[self.folder.resolve().name] = folders.pop(".")
        self.known = {key: self.known.get(key) or Run(folder) for key, folder in folders.items()}
        if name is None:
            return self.known
        if name not in self.known:
            raise Refused(404, "no such run")
        return self.known[name]


# --- the server ---


class Server(ThreadingHTTPServer):
    def __init__(self, host, port, model, runs):
        self.host, self.model, self.runs = host, model, runs
        self.line, self.slots = [], threading.BoundedSemaphore(MAX_CONNECTIONS)  # line: of requests to generate
        super().__init__((host, port), Handler)

    def process_request(self, request, client_address):
        if self.slots.acquire(blocking=False):
            return super().process_request(request, client_address)
        with contextlib.suppress(OSError):
            request.sendall(b"HTTP/1.0 503 Busy\r\n\r\ntoo many connections: close a tab\n")
        self.shutdown_request(request)

    def process_request_thread(self, request, client_address):
        try:
            super().process_request_thread(request, client_address)
        finally:
            self.slots.release()

    def handle_error(self, request, client_address):  # a client that is gone before it has asked
        pass


class Handler(BaseHTTPRequestHandler):
    timeout = 30  # seconds without a byte
    error_message_format, error_content_type = "%(message)s\n", "text/plain; charset=utf-8"
    streaming = False

    def log_message(self, *args):  # a page asks every few seconds
        pass

    def do_GET(self):
        self.answer(self.get)

    def do_POST(self):
        self.answer(self.post)

    def answer(self, respond):
        """Call respond(*parts of the path); what it raises becomes one line."""
        try:
            self.check_origin()
            respond(*(urllib.parse.unquote(part) for part in self.path.partition("?")[0].split("/")[1:]))
        except (ConnectionError, TimeoutError):  # the client has gone
            pass
        except Refused as error:
            self.fail(error.status, error)
        except (UserError, SettingError) as error:
            self.fail(400, error)
        except Exception as error:
            traceback.print_exc()
            self.fail(500, f"{type(error).__name__}: {error}; see the terminal of app.py")

    def check_origin(self):
        """Refuse a Host that is not this server (DNS rebinding), and a POST from the page of another site."""
        host = self.headers.get("Host", "")
        own = ("localhost", self.server.host, self.connection.getsockname()[0])
        if host.partition(":")[0].lower() not in own:  # with any port: ssh -L forwards another one
            raise Refused(403, f"Host: {host[:200]} is not this server: open it by its address")
        origin, site = self.headers.get("Origin"), self.headers.get("Sec-Fetch-Site")
        if self.command == "POST" and (origin not in (None, f"http://{host}") or site not in (None, "same-origin")):
            raise Refused(403, "a page of another site may not generate images")

    def get(self, *parts):
        match parts:
            case ("",):
                self.send(Path(__file__).with_name("app.html").read_bytes(), "text/html; charset=utf-8")
            case ("model",):
                self.send_json(self.server.model.about())
            case ("runs",):
                self.send_json(self.server.runs.about())
            case ("runs", name):
                self.send_json(self.server.runs.about(name))
            case ("runs", name, file):
                self.send(self.server.runs.image(name, file), "image/png")
            case _:
                raise Refused(404, "no such page")

    def post(self, *parts):
        if parts != ("generate",):
            raise Refused(404, "no such page")
        model, line, place = self.server.model, self.server.line, object()
        with tempfile.TemporaryDirectory() as folder:
            job, records, settings = model.plan(self.body(), folder)
            if len(line) > MAX_WAITING:
                raise Refused(503, f"{MAX_WAITING} requests are waiting already: try again later")
            line.append(place)
            try:
                while ahead := line.index(place):
                    self.event(ahead=ahead)
                    time.sleep(0.1)
                total, number, started = evaluations(job), itertools.count(1), time.time()
                self.event(evaluation=0, of=total)

                def observe(images):
                    self.event(evaluation=next(number), of=total, images=[to_jpeg(image) for image in images])

                pngs = model.generate(job, records, settings, folder, observe)
                done = [record | {"png": png} for record, png in zip(records, pngs)]
                self.event(done=done, seconds=time.time() - started)
            finally:
                line.remove(place)

    def body(self):
        length = self.headers.get("Content-Length", "")
        if self.headers.get_content_type() != "application/json" or not re.fullmatch("[0-9]{1,12}", length):
            raise Refused(415, "send settings as application/json, with a Content-Length")
        if int(length) > MAX_BODY:
            raise Refused(413, f"a request of {length} bytes is too large: send at most {MAX_BODY:,}")
        data = self.rfile.read(int(length))
        if len(data) < int(length):
            raise ConnectionAbortedError
        return data

    def event(self, **data):
        """Send a server-sent event; ConnectionError if the client has gone."""
        if select.select([self.connection], [], [], 0)[0] and not self.connection.recv(1, socket.MSG_PEEK):
            raise ConnectionAbortedError
        if not self.streaming:
            self.streaming = True
            self.send_head(200, "text/event-stream")
        self.wfile.write(f"data: {json.dumps(data)}\n\n".encode())

    def fail(self, status, error):
        line = " ".join(str(error).split())
        with contextlib.suppress(ConnectionError, TimeoutError):
            if self.streaming:
                self.event(error=line)
            else:
                self.send(f"{line}\n".encode(errors="replace"), "text/plain; charset=utf-8", status)

    def send_json(self, data):
        self.send(json.dumps(data, allow_nan=False).encode(), "application/json")

    def send(self, data, kind, status=200):
        self.send_head(status, kind)
        self.wfile.write(data)

    def send_head(self, status, kind):
        self.send_response(status)
        for name, value in SAFE_HEADERS.items():
            self.send_header(name, value)
        self.send_header("Content-Type", kind)
        self.end_headers()


if __name__ == "__main__":
    install_excepthook()
    cfg = configure(globals())
    model = Model({name: cfg[name] for name in MODEL})
    try:
        server = Server(cfg.host, cfg.port, model, Runs(cfg.runs))
    except OSError as error:
        remedy = "set another --port, or the --host of this machine"
        raise UserError(f"cannot listen on {cfg.host}:{cfg.port} ({error.strerror}); {remedy}") from None
    threading.Thread(target=model.about, daemon=True).start()  # loads it
    address = f"http://{'localhost' if cfg.host in ('0.0.0.0', '127.0.0.1') else cfg.host}:{server.server_port}"
    print(f"{address} (Ctrl-C ends it)", flush=True)
    if not cfg.host.startswith("127.") and cfg.host != "localhost":
        print("warning: everyone who reaches this address can generate images and see the runs; there is no password")
    has_browser = sys.platform in ("darwin", "win32") or {"DISPLAY", "WAYLAND_DISPLAY"} & os.environ.keys()
    if cfg.open and has_browser:
        webbrowser.open(address)
    with contextlib.suppress(KeyboardInterrupt):
        server.serve_forever()
