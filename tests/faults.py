"""Nothing is lost: crashes at every write, kill -9 at any moment, full and read-only disks, no memory, no file handles.

    python tests/faults.py                                 # all of it: about an hour of one core
    python tests/faults.py --kills=100                     # more moments
    python tests/faults.py --targets=vae,ldm --every=7     # some jobs, every seventh write

Every job below is run in a process that dies at its k-th write (before it, after it, in the middle of it), for every k,
or finds the disk full from there on; then the same command is run again and has to leave what an undisturbed run does,
byte for byte. Processes are forked from one that has torch loaded and has computed nothing, so that a try takes a
second; the first job is run by a fresh interpreter too, which has to leave the same bytes.
"""

import builtins
import errno
import hashlib
import io
import itertools
import json
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"
ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import numpy as np  # noqa: E402
import safetensors.torch  # noqa: E402
import torch  # noqa: E402
import torch._dynamo  # noqa: E402
import torch.utils.flop_counter  # noqa: E402
from helpers import RUN_ARGS, UNET_ARGS, VAE_ARGS, read  # noqa: E402
from PIL import Image  # noqa: E402

import data.cache  # noqa: E402
import data.prepare  # noqa: E402, F401  these are here to be loaded before any fork
import lpips_train  # noqa: E402
import sample  # noqa: E402, F401
import train_ldm  # noqa: E402, F401
import train_vae  # noqa: E402, F401
from configurator import configure  # noqa: E402
from vae import VAE  # noqa: E402

targets = "prepare,shapes,bapps,vae,ldm,lpips,bulk,draw,compvis,diffusers"  # jobs, of those
modes = "before,after,torn,full"  # dies before a write, after it, in its middle; or finds the disk full from there on
every = 1  # tries every so-manieth write
kills = 20  # random moments of kill -9 for each of vae, ldm, lpips, and for the caching of latents
kinds = "points,resumed,order,kills,disk,handles,memory"  # what is tried
seed = 0  # of the random moments
keep = ""  # folder to work in, kept; "" is a temporary one

# -- what a process does to the disk -----------------------------------------------------------------------------------


class Strikes:
    """Counts and lists what is done to files below the folder, and strikes at number `at`."""

    def __init__(self, folder, at=0, how=""):
        self.folder, self.at, self.how, self.events = os.path.realpath(folder), at, how, []

    def inside(self, path):
        path = os.path.realpath(os.fsdecode(path)) if isinstance(path, str | bytes | os.PathLike) else ""
        return path.startswith(self.folder + os.sep) and os.path.relpath(path, self.folder)

    def do(self, what, path, act, torn=None, to=None):
        """act(), as one numbered event."""
        self.events.append((what, path, to))
        here = len(self.events) == self.at  # act() may bring events of its own
        if here and self.how == "before":
            self.die()
        if here and self.how == "torn":
            (torn or act)()
            self.die()
        frees = what in ("remove", "rmdir", "fsync", "rename")  # what a full disk lets pass
        if self.how == "full" and len(self.events) >= self.at and not frees:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        try:
            return act()
        finally:
            if here and self.how == "after":
                self.die()

    def die(self):
        os.kill(os.getpid(), signal.SIGKILL)

    def install(self):
        """Puts a counting function in the place of each that changes files."""
        strikes, opened, fsync = self, io.open, os.fsync

        def wrap(module, name, what):
            plain = getattr(module, name)

            def counted(path, *args, **options):
                inside = "dir_fd" not in options and strikes.inside(path)  # rmtree works by dir_fd: see below
                if not inside:
                    return plain(path, *args, **options)
                to = strikes.inside(args[0]) if what == "rename" else None
                return strikes.do(what, inside, lambda: plain(path, *args, **options), to=to)

            setattr(module, name, counted)

        for name, what in dict(
            replace="rename", rename="rename", remove="remove", unlink="remove", rmdir="rmdir", mkdir="mkdir"
        ).items():
            wrap(os, name, what)
        shutil._use_fd_functions = False  # rmtree by paths, which are counted

        def counted_fsync(fd):
            number = fd if isinstance(fd, int) else fd.fileno()
            path = os.readlink(f"/proc/self/fd/{number}")
            inside = "." if os.path.realpath(path) == strikes.folder else strikes.inside(path)
            return strikes.do("fsync", inside, lambda: fsync(fd)) if inside else fsync(fd)

        os.fsync = counted_fsync

        class File(io.FileIO):
            """Every write(2) is an event."""

            def write(self, data):
                data = bytes(data)
                half = data[: len(data) // 2]
                plain = super().write
                return strikes.do("write", strikes.inside(self.name), lambda: plain(data), lambda: plain(half))

        def counted_open(
            file, mode="r", buffering=-1, encoding=None, errors=None, newline=None, closefd=True, opener=None
        ):
            if not strikes.inside(file) or not set(mode) & set("wax+"):
                return opened(file, mode, buffering, encoding, errors, newline, closefd, opener)
            raw_mode = mode.replace("t", "").replace("b", "")
            make = lambda: File(file, raw_mode, closefd, opener)  # noqa: E731
            raw = strikes.do("open", strikes.inside(file), make)
            raw_name = raw.name
            if buffering == 0:
                return raw
            binary = io.BufferedRandom(raw) if "+" in mode else io.BufferedWriter(raw)
            assert binary.name == raw_name
            return binary if "b" in mode else io.TextIOWrapper(binary, encoding or "utf-8", errors, newline)

        builtins.open = io.open = counted_open

        def wrap_saver(module, name, path_of):
            plain = getattr(module, name)

            def counted(*args, **options):
                path = path_of(args)
                inside = strikes.inside(path)
                if not inside or options.get("mode") == "r":
                    return plain(*args, **options)

                def torn():
                    plain(*args, **options)
                    if hasattr(args[0], "flush"):
                        args[0].flush()
                    os.truncate(path, os.path.getsize(path) // 2)

                try:
                    return strikes.do("write", inside, lambda: plain(*args, **options), torn)
                except OSError as e:
                    raise safetensors.SafetensorError(f"I/O error: {e}") if name == "save_file" else e from None

            setattr(module, name, counted)

        wrap_saver(safetensors.torch, "save_file", lambda args: args[1])
        wrap_saver(np, "save", lambda args: getattr(args[0], "name", args[0]))  # C code writes past File.write
        wrap_saver(np.lib.format, "open_memmap", lambda args: args[0])  # np.load uses it to read
        flush = np.memmap.flush

        def counted_flush(array):
            inside = strikes.inside(array.filename) if array.filename else ""
            return strikes.do("msync", inside, lambda: flush(array)) if inside else flush(array)

        np.memmap.flush = counted_flush


# -- jobs --------------------------------------------------------------------------------------------------------------

SIX = "--eval_every=2 --save_every=2 --log_every=1 --max_steps=4"
PLAIN = RUN_ARGS.replace("--max_steps=6", "")


def make_jobs(work):
    """{name: (script, arguments, {text in the script: what stands there for it})}, with their inputs below `work`."""
    photos, trunk = work / "photos", work / "trunk.pth"
    photos.mkdir()
    rng = np.random.default_rng(0)
    lines = []
    for i in range(26):
        Image.fromarray(rng.integers(0, 255, (16, 16 + i % 3, 3), dtype=np.uint8)).save(photos / f"{i:02d}.png")
        lines.append(json.dumps({"file_name": f"{i:02d}.png", "text": [f"picture number {i}", "noise"]}))
    (photos / "broken.png").write_bytes(b"no image")
    (photos / "metadata.jsonl").write_text("\n".join(lines))
    state = lpips_train.make_trunk("squeeze").state_dict()
    generator = torch.Generator().manual_seed(0)
    torch.save({name: torch.randn(t.shape, generator=generator) * 0.05 for name, t in state.items()}, trunk)
    judged = work / "judgements"
    for task, split, count in (("2afc", "train", 12), ("2afc", "val", 4), ("jnd", "val", 4)):
        folder = judged / task / split / "noise"
        folder.mkdir(parents=True)
        shape = (count, 3 if task == "2afc" else 2, 18, 18, 3)
        np.save(folder / "images.npy", rng.integers(0, 255, shape, dtype=np.uint8))
        np.save(folder / "judge.npy", rng.integers(0, 2, count).astype(np.float32))
    (judged / "meta.json").write_text('{"what": "noise"}')
    torch.manual_seed(0)
    vae = VAE(ch=32, ch_mult=(1,), num_res_blocks=1, latent_proj=True)
    vae.latent_mean.fill_(0.0)
    vae.latent_std.fill_(1.0)
    ours, meta = work / "vae.safetensors", {"format": 1, "stage": "vae", "model": vae.settings, "config": {}}
    train_vae.save_checkpoint(str(ours), train_vae.with_prefix("ema", vae.state_dict()), meta)
    shards, stage_1, stage_2 = (work / f"undisturbed/{name}/out" for name in ("prepare", "vae", "ldm"))
    sampling = f"--ckpt={stage_2} --steps=2 --device=cpu"
    jobs = {
        "prepare": (
            "data/folder/prepare.py",
            f"--source={photos} --size=16 --min_side=8 --shard_mb=0.012 --vocab_size=280 --workers=0 --out_dir=out",
        ),
        "shapes": ("data/shapes/prepare.py", "--out_dir=out --n_train=6 --n_val=40 --size=32 --vocab_size=280"),
        "bapps": (
            "data/bapps/prepare.py",
            f"--standin={photos} --out_dir=out --size=8 --standin_train=1 --standin_val=1",
        ),
        "vae": (
            "train_vae.py",
            f"{VAE_ARGS} {PLAIN} {SIX} --dataset={shards} --out_dir=out --snapshot_every=2 "
            "--disc_weight=0.5 --disc_start=3 --disc_layers=1 --disc_channels=16 --disc_norm=none",
        ),
        "ldm": (
            "train_ldm.py",
            f"{UNET_ARGS} {PLAIN} {SIX} --dataset={shards} --first_stage={stage_1} --out_dir=out "
            "--cache_dir=cache --snapshot_every=2 --ema_stds=0.05,0.1",
        ),
        "lpips": (
            "lpips_train.py",
            f"--net=squeeze --device=cpu --workers=0 --batch_size=4 {SIX} --out_dir=out "
            f"--dataset={judged} --trunk_weights={trunk}",
        ),
        "bulk": ("sample.py", f"{sampling} --num_samples=5 --batch_size=2 --out=pictures.npz"),
        "draw": ("sample.py", f"{sampling} --out_dir=out --n=1 --trajectory"),
        "compvis": ("convert.py", f"--ckpt={ours} --to=compvis --out=new/model.safetensors"),
        "diffusers": ("convert.py", f"--ckpt={ours} --to=diffusers --out=new/model"),
    }
    return jobs


NEEDS = {"vae": ["prepare"], "ldm": ["prepare", "vae"], "bulk": ["prepare", "vae", "ldm"]}
NEEDS |= {"draw": NEEDS["bulk"]}


def child(job, folder, strikes=None, before=None):
    """In a new process: the script as __main__, in the folder, as on the command line."""
    script, arguments = job
    for fd, name in ((1, "stdout"), (2, "stderr")):
        os.dup2(os.open(f"{folder}.{name}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), fd)
    sys.stdout, sys.stderr = (open(fd, "w", closefd=False) for fd in (1, 2))
    os.chdir(folder)
    sys.argv, sys.path[0] = [script, *arguments.split()], str(ROOT)
    sys.modules["matplotlib"] = None  # as if it were not installed: drawing takes longer than training
    torch.set_num_threads(1)
    data.cache.SHARD = 8  # so that there are several files
    time.time, time.time_ns = map(float, itertools.count()).__next__, lambda: 1  # the same bytes each time
    source = (ROOT / script).read_text()
    if before:
        before()
    if strikes:
        strikes.install()
    status = 0
    try:
        scope = {"__name__": "__main__", "__file__": str(ROOT / script), "__builtins__": builtins, "__doc__": None}
        exec(compile(source, str(ROOT / script), "exec"), scope)
    except SystemExit as stop:
        status = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
        if isinstance(stop.code, str):
            print(stop.code, file=sys.stderr)
    except BaseException:
        sys.excepthook(*sys.exc_info())
        status = 1
    if strikes and not strikes.at:
        with io.FileIO(f"{folder}.events", "w") as f:
            f.write(json.dumps(strikes.events).encode())
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def run(job, folder, strikes=None, before=None, kill_after=None, timeout=300):
    """(exit status, seconds) of the job in a forked process; a negative status is a signal's number."""
    os.makedirs(folder, exist_ok=True)
    sys.stdout.flush()
    began, pid = time.monotonic(), os.fork()
    if not pid:
        try:
            os.setpgid(0, 0)
            child(job, str(folder), strikes, before)
        except BaseException as e:
            os.write(2, f"{type(e).__name__}: {e}\n".encode())
        finally:
            os._exit(99)
    while True:
        done, status = os.waitpid(pid, os.WNOHANG)
        spent = time.monotonic() - began
        if done:
            return os.waitstatus_to_exitcode(status), spent
        if spent > (timeout if kill_after is None else kill_after):
            os.kill(pid, signal.SIGKILL)
        time.sleep(0.005)


def said(folder):
    """The lines of the last process's stderr in that folder."""
    lines = Path(f"{folder}.stderr").read_text().replace("\r", "\n").splitlines()
    return [line for line in lines if line.strip() and "%|" not in line]  # a progress bar


def one_line(job, folder):
    """The line by which a job ended, without the script's name; AssertionError if it said more or less than that."""
    lines, name = said(folder), os.path.basename(job[0])
    assert len(lines) == 1 and lines[0].startswith(f"{name}: "), "\n".join(lines[-8:]) or "it said nothing"
    return lines[0].removeprefix(f"{name}: ")


# -- comparison --------------------------------------------------------------------------------------------------------


def files(folder):
    found = sorted(str(p.relative_to(folder)) for p in Path(folder).rglob("*") if p.is_file())
    return [name for name in found if not is_litter(name)]


def is_litter(name):
    """Temporary files that no later run takes for anything."""
    return name.endswith(".tmp") or os.path.basename(name).startswith(".tmp")  # the latter is of safetensors


def state_of(folder):
    """What is on the disk, in a word; names of temporary files hold a process's number or chance."""
    h = hashlib.sha256()
    for path in sorted(Path(folder).rglob("*")):
        name = re.sub(r"\.\d+\.tmp$|/tmp\w+\.tmp$", ".N.tmp", str(path.relative_to(folder)))
        h.update(f"{name}\0".encode() + (path.read_bytes() if path.is_file() else b"folder"))
    return h.digest()


def content(path):
    """A file's content, but for the git revision and speeds."""
    path = str(path)
    if path.endswith(".safetensors"):
        tensors, meta = read(path)
        if meta:
            meta["config"]["workers"] = meta["git"] = 0
        return {name: (t.dtype, t.numpy().tobytes()) for name, t in tensors.items()}, meta
    if path.endswith("log.jsonl"):
        return [json.loads(line) | {"images_per_s": 0} for line in Path(path).read_text().splitlines()]
    return Path(path).read_bytes()


def differences(folder, wanted):
    """What is not as in the undisturbed run, in words."""
    have, want = files(folder), files(wanted)
    if have != want:
        return f"missing {sorted(set(want) - set(have))}, too much {sorted(set(have) - set(want))}"
    bad = [name for name in want if content(f"{folder}/{name}") != content(f"{wanted}/{name}")]
    return f"differ: {bad}" if bad else ""


def go_on(name, job, folder, wanted):
    """Runs the command again, without faults; AssertionError if it does not end where the undisturbed run does."""
    status, _ = run(job, folder)
    complete = name in ("bulk", "compvis", "diffusers") and "is there already" in "".join(said(folder))
    assert status == 0 or complete, f"the same command again: status {status}, {said(folder)[-3:]}"
    wrong = differences(folder, wanted)
    assert not wrong, wrong


# -- the tries ---------------------------------------------------------------------------------------------------------

results = {"tried": {}, "failures": []}


def count(what, n=1):
    results["tried"][what] = results["tried"].get(what, 0) + n


def failed(what, why):
    results["failures"].append(f"{what}: {why}")
    print(f"  FAILED {what}: {why}", flush=True)


def try_points(name, job, work, wanted, chosen_modes, step, base=None):
    """Dies, or has no more room, at every step-th write; then goes on. base: what lies there at first."""
    events = json.loads(Path(f"{wanted}.events").read_text())
    known, began = {}, time.monotonic()
    for how in chosen_modes:
        points = range(1, len(events) + 1, step)
        if how == "torn":
            points = [k for k in points if events[k - 1][0] == "write"]
        for k in points:
            folder = f"{work}/tries/{name}-{how}-{k:04d}"
            what = f"{name} {how} {k} {events[k - 1][:2]}"
            if base:
                shutil.copytree(base, folder)
            status, _ = run(job, folder, Strikes(folder, k, how))
            count(f"{name}, {how}")
            if how == "full":
                try:
                    if status:
                        one_line(job, folder)
                    else:  # what may fail without harm: the index's cache
                        assert k == len(events) or not differences(folder, wanted), "it went on as if nothing had been"
                except AssertionError as e:
                    failed(what, e)
            elif status != -signal.SIGKILL:
                failed(what, f"it was not reached: status {status} {said(folder)[-1:]}")
            state = state_of(folder)
            if state not in known:  # going on is a function of what is there
                try:
                    go_on(name, job, folder, wanted)
                    known[state] = True
                except AssertionError as e:
                    known[state] = False
                    failed(what, e)
            elif not known[state]:
                failed(what, "as a try before")
            shutil.rmtree(folder)
    print(
        f"{name}: {len(events)} writes, {len(known)} states of the disk, {time.monotonic() - began:.0f} s", flush=True
    )
    count("states of the disk from which a job went on", len(known))


def try_resumed(name, job, work, wanted, chosen_modes, step):
    """The same of a run that goes on after kill -9."""
    base, whole = f"{work}/resumed/{name}", f"{work}/resumed/{name}-whole"
    assert stopped_after(job, base, "step 3, 12") == -signal.SIGKILL, said(base)
    with open(f"{base}/out/log.jsonl", "a") as f:
        f.write('{"step": 4, "lo')  # killed while it wrote
    shutil.copytree(base, whole)
    assert run(job, whole, Strikes(whole))[0] == 0, said(whole)
    assert not differences(whole, wanted), differences(whole, wanted)
    try_points(f"{name} resumed", job, work, whole, chosen_modes, step, base)


def try_order(name, wanted):
    """Whether every renamed file was on the disk before its name was, and the name before anything that followed."""
    events = json.loads(Path(f"{wanted}.events").read_text())
    for i, (what, source, target) in enumerate(events):
        if what != "rename":
            continue
        count("renames checked for their order")
        written = [j for j, (w, path, _) in enumerate(events[:i]) if w == "write" and path == source]
        synced = [j for j, (w, path, _) in enumerate(events[:i]) if w in ("fsync", "msync") and path == source]
        inside = [j for j, (w, path, _) in enumerate(events[:i]) if w == "write" and path.startswith(source + "/")]
        if written and (not synced or synced[-1] < written[-1]):
            failed(f"{name} {target}", "its content was not on the disk before it got its name")
        if inside and not all(any(w == "fsync" and p == events[j][1] for w, p, _ in events[j:i]) for j in inside):
            failed(f"{name} {target}", "what is in the folder was not on the disk before it got its name")
        following = events[i + 1 : i + 2]
        if "cache/index-" in target:  # a damaged one is noticed, and made again
            continue
        if not following or following[0][:2] != ["fsync", os.path.dirname(target) or "."]:
            failed(f"{name} {target}", "its name was not on the disk before what followed")
    renamed = {target for what, _, target in events if what == "rename"}
    folders = tuple(f"{target}/" for target in renamed)
    ends = (".safetensors", ".npy", ".npz", ".tar", "meta.json", "index.npz")
    for name_ in files(wanted):
        if name_.endswith(ends) and name_ not in renamed and not name_.startswith(folders):
            if "standin/" not in name_:
                failed(f"{name} {name_}", "it was written in place")


def try_kills(name, job, work, wanted, times, rng, seconds, span=(0, 1)):
    """kill -9 of `times` runs at random moments in that span of the `seconds` a run takes; now and then three times."""
    k = killed = 0
    while killed < times:
        folder, struck = f"{work}/kills/{name}-{k:03d}", 0
        moments = [seconds * rng.uniform(*span) for _ in range(3 if k % 4 == 3 else 1)]
        for i, moment in enumerate(moments):
            status, spent = run(job, folder, kill_after=moment)
            count(f"{name}, kill -9" if status else f"{name}, ended before the kill")
            if not status and not i:  # the machine was slower when it was measured
                seconds = min(seconds, spent)
            struck += bool(status)
        k, killed = k + 1, killed + bool(struck)
        try:
            go_on(name.split()[0], job, folder, wanted)
        except AssertionError as e:
            failed(f"{name} killed after {moments}", e)
        shutil.rmtree(folder)


def mounted(folder, size):
    os.makedirs(folder)
    command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", folder]
    return subprocess.run(command, capture_output=True).returncode == 0


def stopped_after(job, folder, text):
    """Runs the job in the folder until it has printed a text, and kills it there."""

    def watch():
        plain = sys.stdout.write

        def write(line):
            plain(line)
            if text in line:
                sys.stdout.flush()
                os.kill(os.getpid(), signal.SIGKILL)

        sys.stdout.write = write

    return run(job, folder, before=watch)[0]


def try_disk(name, job, work, wanted):
    """A disk that is really full, and one that can only be read: a tmpfs where it may be mounted, else another user."""
    for fault in ("full", "read-only"):
        folder = f"{work}/disk/{name}-{fault}"
        with_mount = mounted(folder, "16m")
        try:
            assert stopped_after(job, folder, "step 3, 12") == -signal.SIGKILL, said(folder)
            good = Path(f"{folder}/out/latest.safetensors").read_bytes()
            if fault == "full" and with_mount:
                left = os.statvfs(folder)
                with open(f"{folder}/ballast", "wb") as f:
                    f.write(b"x" * max(0, left.f_bavail * left.f_frsize - len(good) // 2))
                status, _ = run(job, folder)
            elif fault == "full":
                limit = len(good) // 2
                status, _ = run(job, folder, before=lambda n=limit: resource.setrlimit(resource.RLIMIT_FSIZE, (n, n)))
            elif with_mount:
                subprocess.run(["mount", "-o", "remount,ro", folder], check=True)
                status, _ = run(job, folder)
                subprocess.run(["mount", "-o", "remount,rw", folder], check=True)
            else:
                for path in (folder, f"{folder}/out", *map(str, Path(f"{folder}/out").iterdir())):
                    os.chmod(path, 0o555)
                status, _ = run(job, folder, before=(lambda: os.setuid(65534)) if os.getuid() == 0 else None)
                for path in (folder, f"{folder}/out", *map(str, Path(f"{folder}/out").iterdir())):
                    os.chmod(path, 0o755)
            count(f"{name}, disk {fault}{' (tmpfs)' if with_mount else ''}")
            assert status == 1, f"status {status}"
            print(f"  {name}, disk {fault}: {one_line(job, folder)}", flush=True)
            assert Path(f"{folder}/out/latest.safetensors").read_bytes() == good, "the checkpoint has changed"
            if os.path.exists(f"{folder}/ballast"):
                os.remove(f"{folder}/ballast")
            go_on(name, job, folder, wanted)
        except AssertionError as e:
            failed(f"{name} disk {fault}", e)
        finally:
            if with_mount:
                subprocess.run(["umount", folder], check=True)


def try_handles(name, job, work, wanted):
    """Few file handles: it works, or says so in a line and leaves what was there as it was."""
    for more in range(1, 7):
        folder = f"{work}/handles/{name}-{more}"
        try:
            if name in ("vae", "ldm"):
                assert stopped_after(job, folder, "step 3, 12") == -signal.SIGKILL, said(folder)

            def limit(more=more):
                now = next(n for n in itertools.count() if not os.path.exists(f"/proc/self/fd/{n}"))  # the first free
                resource.setrlimit(resource.RLIMIT_NOFILE, (now + more, now + more))

            status, _ = run(job, folder, before=limit)
            count(f"{name}, file handles")
            if status:
                line = one_line(job, folder)
                print(f"  {name}, {more} handles: {line[:200]}", flush=True)
            go_on(name, job, folder, wanted)
        except AssertionError as e:
            failed(f"{name} {more} handles", e)


def try_memory(name, job, work, wanted):
    """No memory, in the run itself and in a data worker, and a data worker that is killed."""
    script, arguments = job
    for fault in ("main", "worker", "killed"):
        folder = f"{work}/memory/{name}-{fault}"
        workers = 0 if fault == "main" else 1
        with_workers = (script, arguments.replace("--workers=0", f"--workers={workers}"))

        def spoil(fault=fault, folder=folder):
            if fault == "main":  # as an allocation in a step would
                import torch.nn.utils

                plain, calls = torch.nn.utils.clip_grad_norm_, itertools.count()

                def clip(*args, **options):
                    if next(calls) >= 2:
                        raise MemoryError
                    return plain(*args, **options)

                torch.nn.utils.clip_grad_norm_ = clip
                return
            from data import dataset

            plain, parent = dataset.collate, os.getpid()

            def collate(samples):
                if os.getpid() != parent and not os.path.exists(f"{folder}.struck") and taken() > 2:
                    if fault == "killed":
                        open(f"{folder}.struck", "w").close()
                        os.kill(os.getpid(), signal.SIGKILL)
                    raise MemoryError
                return plain(samples)

            counter = itertools.count(1)
            taken = counter.__next__
            dataset.collate = collate
            given = dataset.loader.__defaults__
            dataset.loader.__defaults__ = tuple(collate if value is plain else value for value in given)
            import torch.multiprocessing

            torch.multiprocessing.set_start_method("fork", force=True)

        try:
            status, _ = run(with_workers, folder, before=spoil)
            count(f"{name}, memory")
            if status:
                print(f"  {name}, {fault}: {one_line(job, folder)[:250]}", flush=True)
            else:
                print(f"  {name}, {fault}: it went on", flush=True)
            go_on(name, job, folder, wanted)
        except AssertionError as e:
            failed(f"{name} {fault}", e)


def main():
    work = Path(keep or tempfile.mkdtemp(prefix="faults-"))
    work.mkdir(exist_ok=True)
    began, chosen, tried = time.monotonic(), targets.split(","), kinds.split(",")
    jobs = make_jobs(work)
    for name in dict.fromkeys(need for target in chosen for need in [*NEEDS.get(target, []), target]):
        folder = f"{work}/undisturbed/{name}"
        status, seconds = run(jobs[name], folder, Strikes(folder))
        assert status == 0, (name, said(folder))
        print(f"{name}: undisturbed in {seconds:.1f} s", flush=True)
    rng = random.Random(seed)
    for name in chosen:
        job, wanted = jobs[name], f"{work}/undisturbed/{name}"
        again, seconds = run(job, f"{work}/again/{name}")
        assert again == 0 and not differences(f"{work}/again/{name}", wanted), (
            f"{name} is not deterministic: {differences(f'{work}/again/{name}', wanted)}"
        )
        if name == "vae":  # a fork of this process does what a new interpreter does
            fresh = f"{work}/fresh/{name}"
            os.makedirs(fresh)
            command = [sys.executable, str(ROOT / job[0]), *job[1].split()]
            subprocess.run(command, cwd=fresh, check=True, capture_output=True)
            for path in Path(f"{wanted}/out").glob("*.safetensors"):
                assert content(path)[0] == content(f"{fresh}/out/{path.name}")[0], f"{path.name} of a fork differs"
            print("vae: a fresh interpreter leaves the same weights", flush=True)
        if "order" in tried:
            try_order(name, wanted)
        if "points" in tried:
            try_points(name, job, work, wanted, modes.split(","), every)
        if "resumed" in tried and name in ("vae", "ldm", "lpips"):
            try_resumed(name, job, work, wanted, modes.split(","), every)
        if "kills" in tried and name in ("vae", "ldm", "lpips"):
            try_kills(name, job, work, wanted, kills, rng, seconds)
            if name == "ldm":
                lines = Path(f"{work}/again/{name}.stdout").read_text()
                assert "caching the latents" in lines
                try_kills("ldm caching", job, work, wanted, kills, rng, seconds, (0.25, 0.6))
        if "disk" in tried and name in ("vae", "ldm"):
            try_disk(name, job, work, wanted)
        if "handles" in tried and name in ("vae", "ldm", "prepare", "bulk"):
            try_handles(name, job, work, wanted)
        if "memory" in tried and name in ("vae", "ldm"):
            try_memory(name, job, work, wanted)
    print(json.dumps(results["tried"], indent=1))
    total = sum(results["tried"].values())
    print(f"{total} counts, {len(results['failures'])} failures, {time.monotonic() - began:.0f} s")
    for line in results["failures"]:
        print(f"  {line}")
    if not keep:
        shutil.rmtree(work)
    return len(results["failures"])


if __name__ == "__main__":
    configure(globals())
    sys.exit(bool(main()))
