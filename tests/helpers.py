"""Running the training scripts as a user does, in processes of their own, and reading what they leave.

A forkserver that has torch loaded starts them, so that a run costs its own second and not torch's three. All else is
as on the command line: argv, folder, environment, output, signals, exit status.
"""

import multiprocessing
import os
import resource
import runpy
import shutil
import signal
import socket
import sys
import time
from pathlib import Path

import torch

from checkpoint import read, write
from common import Machine, read_log

ROOT = Path(__file__).resolve().parent.parent
VAE_ARGS = "--image_size=16 --ch=8 --ch_mult=1,2 --num_res_blocks=1 --norm_groups=4 --mid_attention=false --beta2=0.99"
VAE_ARGS += " --perceptual_weight=0 --disc_weight=0"
UNET_ARGS = "--image_size=16 --channels=8 --channel_mult=1,2 --num_res_blocks=1 --attention_ds=2 --head_dim=8"
UNET_ARGS += " --norm_groups=4 --text_width=16 --text_layers=1 --text_heads=2 --text_length=12"
UNET_ARGS += " --n_samples=3 --sample_steps=2"
RUN_ARGS = "--device=cpu --workers=0 --batch_size=4 --grad_accum=1 --lr=1e-3 --warmup_steps=2 --log_every=1"
RUN_ARGS += " --max_steps=6"
ARGS = {"vae": f"{VAE_ARGS} {RUN_ARGS} --out_dir=out", "ldm": f"{UNET_ARGS} {RUN_ARGS} --out_dir=out"}
ARGS["lpips"] = "--net=squeeze --device=cpu --workers=0 --batch_size=4 --lr=1e-2 --max_steps=6 --eval_every=3"
ARGS["lpips"] += " --save_every=3 --log_every=1 --out_dir=out"
SCRIPTS = {"vae": "train_vae.py", "ldm": "train_ldm.py", "lpips": "lpips_train.py"}

context = multiprocessing.get_context("forkserver")
preload = ["torch._dynamo", "torch.utils.flop_counter", "matplotlib.pyplot", "sample", "train_ldm", "train_vae"]
context.set_forkserver_preload([*preload, "helpers"])


class Trap:
    """stdout that sends a signal to its own process as soon as a text is printed: an exact moment to be killed at."""

    def __init__(self, stream, text, number):
        self.stream, self.text, self.number = stream, text, number

    def write(self, text):
        self.stream.write(text)
        if self.text in text:
            self.stream.flush()
            os.kill(os.getpid(), self.number)

    def flush(self):
        self.stream.flush()


def _main(script, args, folder, environment, trap, limit, keep, plots, first=""):
    """In the new process: the script as __main__; the weights it ends with, on success or error, go to `keep`."""
    for fd, name in ((1, "stdout"), (2, "stderr")):
        os.dup2(os.open(f"{folder}/{name}{environment['RANK']}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), fd)
    os.chdir(folder)
    os.environ.update(environment)
    sys.argv, sys.path[0] = [script, *args], str(ROOT)
    if trap:
        sys.stdout = Trap(sys.stdout, *trap)
    if limit:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    if not plots:
        sys.modules["matplotlib"] = None  # as if it were not installed: drawing takes longer than training
    torch.set_num_threads(1)
    multiprocessing.set_start_method("fork", force=True)  # of data workers, as on the command line
    exec(first, {})
    scope, status = {}, 0
    try:
        scope = runpy.run_path(script, run_name="__main__")
    except BaseException:
        kind, error, trace = sys.exc_info()
        status = error.code if kind is SystemExit else 1
        if kind is not SystemExit:
            sys.excepthook(kind, error, trace)
        while trace.tb_next and "model" not in trace.tb_frame.f_globals:
            trace = trace.tb_next
        scope = trace.tb_frame.f_globals
    if keep and "model" in scope:
        write(keep, scope["model"].state_dict(), {})
    sys.exit(status)


class Run:
    """Processes of a training run, started with --name=value arguments on top of ARGS[stage]."""

    def __init__(self, stage, folder, *args, ranks=1, trap=None, limit=None, keep=False, plots=False, first="",
                 bare=False, script=""):  # fmt: skip
        """trap: (text, signal), see Trap, for rank 0.  limit: of the size of files.  keep: each rank's last weights.

        plots: False hides matplotlib.  first: Python that each process runs before the script, to break something.
        bare: without ARGS.  script: an edited copy to run instead.
        """
        self.stage, self.folder, self.out = stage, Path(folder), Path(folder) / "out"
        self.folder.mkdir(parents=True, exist_ok=True)
        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            shared = {"WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(s.getsockname()[1])}
        self.processes = []
        for rank in range(ranks):
            environment = shared | {"RANK": str(rank), "LOCAL_RANK": str(rank), "OMP_NUM_THREADS": "1"}
            kept = f"{self.folder}/rank{rank}.safetensors" if keep else None
            arguments = [*([] if bare else ARGS[stage].split()), *args]
            everything = (script or f"{ROOT}/{SCRIPTS[stage]}", arguments, str(folder), environment)
            everything += (trap if rank == 0 else None, limit, kept, plots, first)
            self.processes.append(context.Process(target=_main, args=everything))
            self.processes[-1].start()

    def wait(self, timeout=60):
        """Exit statuses by rank; where rank 0 was killed the others are killed too."""
        end = time.time() + timeout
        for process in self.processes:
            process.join(max(0, end - time.time()))
            if process.exitcode in (None, -signal.SIGKILL):
                for other in self.processes:
                    other.kill()
                    other.join()
        self.codes = [process.exitcode for process in self.processes]
        self.stdout, self.stderr = ((self.folder / name).read_text() for name in ("stdout0", "stderr0"))
        return self.codes

    def finish(self):
        """Waits for the run and insists on its success."""
        assert self.wait() == [0] * len(self.processes), self.stderr
        return self

    def fail(self):
        """Waits for the run and insists on its failure with one line on stderr, which it returns."""
        codes = self.wait()
        lines = [line for line in self.stderr.splitlines() if line.strip()]
        assert codes[0] not in (0, None) and codes[0] > 0 and len(lines) == 1, (codes, self.stderr)
        line = lines[0].removeprefix("[rank0]: ")  # as torch.distributed says of many
        name = f"{SCRIPTS[self.stage]}: "
        assert line.startswith(name), lines
        return line.removeprefix(name)

    @property
    def checkpoint(self):
        return read(self.out / "latest.safetensors")

    @property
    def log(self):
        """One record for each step."""
        return read_log(self.out)


def machine(rank=0, world=1):
    """A process of a run on the CPU in float32, for functions of the training scripts."""
    return Machine(rank, world, torch.device("cpu"), "float32", torch.float32, False)


def resume_folder(run, folder):
    """A copy of what a run left, to resume from."""
    shutil.copytree(run.out, folder / "out")
    return folder


def numbers(log):
    """A log without what depends on the clock."""
    return [{k: v for k, v in record.items() if k != "images_per_s"} for record in log]


def assert_same(a, b, atol=0.0):
    """Two dicts of tensors, equal bit for bit or to atol; NaN equals NaN."""
    assert a.keys() == b.keys()
    for name in a:
        assert a[name].shape == b[name].shape and a[name].dtype == b[name].dtype, name
        assert torch.equal(a[name].isnan(), b[name].isnan()), name
        far = (a[name].double() - b[name].double()).abs().nan_to_num() > atol
        assert not far.any(), (name, a[name][far], b[name][far])
