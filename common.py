"""What a training run does besides learning: processes, progress log, curves, learning rate, optimizer state, stopping.

The training scripts own their loops; each function here is one thing that all three of them need.
"""

import contextlib
import datetime
import itertools
import json
import math
import os
import platform
import re
import signal
import subprocess
import sys
import time
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

from checkpoint import UserError, reject, write_whole

# dense bf16 (V100: fp16)
PEAK_TFLOPS = {"H200": 989, "H100": 989, "A100": 312, "L40S": 362, "RTX 4090": 165, "V100": 125}

# --- errors ---


def install_excepthook():
    """Print a UserError as one line on stderr; every other exception keeps its traceback."""

    def hook(kind, error, trace):
        if not issubclass(kind, UserError):
            return sys.__excepthook__(kind, error, trace)
        line = str(error).strip().rsplit("\n", 1)[-1]  # a data worker's error holds its traceback
        line = line.removeprefix(f"{kind.__module__}.{kind.__qualname__}: ")
        print(f"{os.path.basename(sys.argv[0])}: {line}", file=sys.stderr)

    sys.excepthook = hook


# --- processes ---


class Machine(NamedTuple):
    """Where a run takes place: this process, its device, its precision."""

    rank: int
    world: int  # number of processes
    device: torch.device
    precision: str  # float32 | bfloat16 (by autocast) | float64
    param_dtype: torch.dtype  # of parameters and losses
    compile: bool


def setup(cfg):
    """Choose the device and join the process group that torchrun started (RANK, WORLD_SIZE, LOCAL_RANK).

    cfg: device and dtype; deterministic, compile and dist_timeout where the script has them.
    """
    deterministic, compiling = cfg.get("deterministic", False), cfg.get("compile", "false")
    present = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    kind = cfg.device if cfg.device != "auto" else next(kind for kind in present if present[kind])
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if not present[kind]:
        raise UserError(f"--device={kind}, but PyTorch finds no GPU: check its installation, or set --device=cpu")
    if kind == "mps" and (world > 1 or cfg.dtype == "float64"):
        raise UserError("an Apple GPU takes one process, and no float64: set --device=cpu")
    if kind == "mps" and cfg.dtype == "bfloat16" and not torch.backends.mps.is_macos_or_newer(14, 0):
        raise UserError("bfloat16 on an Apple GPU needs macOS 14: set --dtype=float32")
    if kind == "cuda":
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
    device = torch.device(kind, torch.cuda.current_device() if kind == "cuda" else None)
    if world > 1:
        timeout = datetime.timedelta(minutes=cfg.dist_timeout)
        options = dict(backend="nccl", device_id=device) if kind == "cuda" else dict(backend="gloo")
        dist.init_process_group(store=fresh_store(timeout), rank=rank, world_size=world, timeout=timeout, **options)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = not deterministic
    torch.backends.cudnn.benchmark = not deterministic
    if deterministic:
        os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"
        torch.use_deterministic_algorithms(True)
    precision = cfg.dtype if cfg.dtype != "auto" else "bfloat16" if kind == "cuda" else "float32"
    param_dtype = torch.float64 if precision == "float64" else torch.float32
    compiled = compiling == "true" or (compiling == "auto" and kind == "cuda")
    return Machine(rank, world, device, precision, param_dtype, compiled)


def fresh_store(timeout):
    """The store in which the processes meet, without what the processes before a restart left in it.

    torchrun hands the same store to all restarts of a node, where they would find the addresses of dead processes.
    """
    store, _, _ = next(dist.rendezvous("env://", timeout=timeout))
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":  # rank 0 has just made it
        return store
    if os.environ["GROUP_WORLD_SIZE"] != "1" and os.environ["TORCHELASTIC_MAX_RESTARTS"] != "0":
        remedy = "set TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 on all nodes, with --rdzv_backend=c10d"
        raise UserError(f"torchrun --max_restarts on several nodes needs a new store at each restart: {remedy}")
    return dist.PrefixStore(f"restart {os.environ['TORCHELASTIC_RESTART_COUNT']}", store)


def assert_same_on_all_ranks(**values):
    """Fail on all ranks where one has other values than rank 0: nodes that do not share out_dir or the dataset."""
    ranks = gathered([values])
    assert all(other == ranks[0] for other in ranks), f"ranks differ: {ranks}; out_dir and dataset must be shared"


def leave(status=0):
    """Leave the process group and end this process."""
    if dist.is_initialized():
        dist.destroy_process_group()
    sys.exit(status)


class Stop:
    """SIGTERM or SIGINT asks a run to save and end; all ranks end at the same step. A second one ends it at once.

    `agreed` is called once a step and works in host memory, so that nothing waits for a GPU.
    """

    def __init__(self):
        self.signal = 0
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._ask)
        self.group = dist.new_group(backend="gloo") if dist.is_initialized() else None

    def _ask(self, number, frame):
        self.signal = number
        signal.signal(number, signal.SIG_DFL)

    def agreed(self):
        if self.group is not None:
            number = torch.tensor(self.signal)
            dist.all_reduce(number, dist.ReduceOp.MAX, self.group)
            self.signal = number.item()
        return self.signal > 0


def all_finite(*values):
    """() bool on the device, the same on all ranks: whether every value of these tensors is finite."""
    finite = torch.stack([v.detach().isfinite().all() for v in values]).all()
    if dist.is_initialized():
        finite = finite.to(torch.int32)
        dist.all_reduce(finite, dist.ReduceOp.MIN)
    return finite.bool()


def gathered(items):
    """The lists of all ranks as one."""
    ranks = [items]
    if dist.is_initialized():
        ranks = [None] * dist.get_world_size()
        dist.all_gather_object(ranks, items)
    return sum(ranks, [])


def sum_over_ranks(*tensors):
    """In place, in one message."""
    if dist.is_initialized():
        flat = torch.cat([t.flatten() for t in tensors])
        dist.all_reduce(flat)
        for t, total in zip(tensors, flat.split([t.numel() for t in tensors])):
            t.copy_(total.view_as(t))


def average_over_ranks(*tensors):
    """In place, in one message."""
    sum_over_ranks(*tensors)
    if dist.is_initialized():
        torch._foreach_div_(tensors, dist.get_world_size())


# --- models and data ---


def build(model_class, *args, **settings):
    """model_class(...); settings that do not fit together are the user's mistake, not the caller's."""
    try:
        return model_class(*args, **settings)
    except AssertionError as error:
        raise UserError(str(error)) from None


def spread(size, count):
    """`count` of range(size), or all if it has fewer, evenly spread: items may be sorted by class."""
    count = min(size, count)
    return [i * size // count for i in range(count)]


def count_tflop(function, *inputs, **more):
    """TFLOP of one call, counted operator by operator on the device "meta"; 0 for code that does not run there."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        try:
            function(*inputs, **more)
        except (NotImplementedError, RuntimeError):  # .item() in a denoiser of one's own, for example
            return 0.0
    return counter.get_total_flops() / 1e12


# --- optimizer ---


def learning_rate(step, cfg):
    """The learning rate of optimizer step `step`, counted from 0."""
    if step < cfg.warmup_steps and cfg.lr_schedule != "onecycle":
        return cfg.lr * (step + 1) / (cfg.warmup_steps + 1)
    if cfg.lr_schedule == "constant":
        return cfg.lr
    if cfg.lr_schedule == "multistep":
        return cfg.lr * cfg.lr_decay ** sum(step >= m * cfg.max_steps for m in cfg.lr_milestones)
    if cfg.lr_schedule == "linear":  # constant for the first half
        return cfg.lr * (cfg.lr_end + (1 - cfg.lr_end) * min(1.0, 2.0 * (1 - step / cfg.max_steps)))
    if cfg.lr_schedule == "onecycle" and step < cfg.warmup_steps:  # up from lr / 25 (Smith & Topin 2017)
        return cfg.lr * (1 / 25 + (1 - 1 / 25) * 0.5 * (1 - math.cos(math.pi * step / cfg.warmup_steps)))
    done = min(1.0, (step - cfg.warmup_steps) / max(1, cfg.max_steps - cfg.warmup_steps))
    return cfg.lr * (cfg.lr_end + (1 - cfg.lr_end) * 0.5 * (1 + math.cos(math.pi * done)))


# embeddings, and the first and last layer of a denoiser: Muon leaves them to AdamW
OUTER = re.compile(r"unet\.(conv_out|patchify|out\.)|input_blocks\.0\.|embedding|class_|rescaler|log_variance")


class AdamW(torch.optim.AdamW):
    """Leaves out a step where `found_inf` is 1: fused without waiting for the device, else after reading it."""

    def step(self):
        if self.defaults["fused"]:
            super().step()
        elif not self.found_inf:
            bad, self.found_inf = self.found_inf, None  # only a fused step reads it
            super().step()
            self.found_inf = bad


class Muon(AdamW):
    """AdamW, but a group with "share" gets orthogonalized momentum (Jordan et al. 2024, github.com/KellerJordan/Muon).

    share: (rank, world); processes that have the same gradients each orthogonalize a part of the matrices.
    """

    @torch.no_grad()
    def step(self):
        ok = self.found_inf == 0
        for group in self.param_groups:
            if "share" not in group:
                continue
            parameters = group["params"]
            for p in parameters:
                if not self.state[p]:
                    self.state[p]["momentum"] = torch.zeros_like(p)
            momenta = [self.state[p]["momentum"] for p in parameters]
            # where ok is false the momentum stands in for the gradient, and so does not change
            gradients = [torch.where(ok, p.grad, m) for p, m in zip(parameters, momenta)]
            torch._foreach_lerp_(momenta, gradients, 0.05)
            updates = orthogonalized(torch._foreach_lerp(gradients, momenta, 0.95), *group["share"])  # Nesterov
            torch._foreach_mul_(parameters, 1 - group["lr"] * group["weight_decay"] * ok)
            torch._foreach_sub_(parameters, torch._foreach_mul(updates, group["lr"] * ok))
            for p in parameters:
                p.grad = None  # AdamW leaves it alone
        super().step()


def orthogonalized(matrices, rank, world):
    """[(out,in,...), ...] with all singular values made about sqrt(max(1, out / (in ...)))."""
    rows = [m.movedim(1, -1).flatten(1) for m in matrices]  # a view of channels_last kernels
    wide = [r.mT if r.shape[0] > r.shape[1] else r for r in rows]
    done = [torch.zeros_like(r) for r in rows]
    together = (lambda i: wide[i].shape) if rows[0].is_cuda else (lambda i: wide[i].shape[0])
    for _, same in itertools.groupby(sorted(range(rank, len(rows), world), key=together), together):
        same = list(same)
        for i, result in zip(same, newton_schulz([wide[i] for i in same])):
            m, n = rows[i].shape
            done[i].copy_((result.mT if m > n else result) * max(1.0, m / n) ** 0.5)
    if world > 1:
        sum_over_ranks(*done)
    return [d.view_as(m.movedim(1, -1)).movedim(-1, 1) for d, m in zip(done, matrices)]


def newton_schulz(matrices):
    """Five steps x <- a x + b (x x^T) x + c (x x^T)^2 x on wide matrices (m,n), divided by their norms first.

    All have one m, on CUDA also one n.
    """
    a, b, c = 3.4445, -4.7750, 2.0315
    if matrices[0].is_cuda:
        x = torch.stack(matrices)
        x = (x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)).bfloat16()
        for _ in range(5):
            gram = x @ x.mT
            x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
        return x
    # the same on x x^T alone: m^3 operations a step instead of m^2 n, but too coarse in bfloat16
    gram = torch.stack([x @ x.mT for x in matrices])
    square = gram.diagonal(dim1=1, dim2=2).sum(dim=1)[:, None, None] + 1e-14  # of the norm
    gram, product = gram / square, square.rsqrt() * torch.eye(gram.shape[1], dtype=gram.dtype, device=gram.device)
    for _ in range(5):
        p = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        p.diagonal(dim1=1, dim2=2).add_(a)
        gram, product = p @ gram @ p, p @ product
    return [p @ x for p, x in zip(product, matrices)]


def make_optimizer(model, cfg, machine):
    """cfg.optimizer for what trains of a model; no weight decay on biases and norms."""
    muon, sharded = cfg.optimizer == "muon", cfg.shard_optimizer and machine.world > 1
    decayed, plain, hidden = [], [], []
    for name, p in model.named_parameters():
        if not p.requires_grad:
            continue
        if p.ndim < 2:
            plain.append(p)
        elif muon and not OUTER.search(name):
            hidden.append(p)
        else:
            decayed.append(p)
    groups = [{"params": decayed, "weight_decay": cfg.weight_decay}, {"params": plain}]
    if muon:
        share = (0, 1) if sharded else (machine.rank, machine.world)  # if sharded, each has other parameters
        options = {"lr_ratio": cfg.muon_lr / cfg.lr, "weight_decay": cfg.weight_decay, "share": share}
        groups.append({"params": hidden} | options)
    return adamw(groups, cfg, machine, Muon if muon else AdamW)


def adamw(groups, cfg, machine, kind=AdamW):
    """AdamW of the settings; with shard_optimizer each rank has the state of a part of the parameters."""
    options = dict(lr=cfg.lr, betas=(cfg.beta1, cfg.beta2), weight_decay=0.0, fused=machine.device.type != "mps")
    if cfg.shard_optimizer and machine.world > 1:
        from torch.distributed.optim import ZeroRedundancyOptimizer  # takes a second or two

        return ZeroRedundancyOptimizer(groups, kind, **options)
    return kind(groups, **options)


def set_lr(optimizer, lr):
    for group in optimizer.param_groups:
        group["lr"] = lr * group.get("lr_ratio", 1.0)


def inner(optimizer):
    """The optimizer that holds state and heeds `found_inf`: of a ZeroRedundancyOptimizer, this rank's part."""
    return getattr(optimizer, "optim", optimizer)


def optimizer_state(optimizer, model, prefix):
    """{PREFIX.PARAMETER.exp_avg: tensor, ...} on rank 0; every rank must call it where the state is sharded."""
    if hasattr(optimizer, "consolidate_state_dict"):
        optimizer.consolidate_state_dict(to=0)
        if dist.get_rank() > 0:
            return {}
    names = {p: name for name, p in model.named_parameters()}
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    state = optimizer.state_dict()["state"]
    return {f"{prefix}.{names[parameters[i]]}.{key}": t for i, s in state.items() for key, t in s.items()}


def load_optimizer_state(optimizer, model, prefix, tensors):
    """The inverse, on every rank; parameters without saved state start anew."""
    optimizer = inner(optimizer)
    with_momentum = {p: "share" in group for group in optimizer.param_groups for p in group["params"]}
    for name, p in model.named_parameters():
        keys = ("momentum",) if with_momentum.get(p) else ("step", "exp_avg", "exp_avg_sq")
        if p in with_momentum and f"{prefix}.{name}.{keys[0]}" in tensors:
            state = {key: tensors[f"{prefix}.{name}.{key}"] for key in keys}
            count = p.device if optimizer.defaults["fused"] else "cpu"
            state = {key: torch.empty_like(p).copy_(t) if t.ndim else t.to(count) for key, t in state.items()}
            optimizer.state[p] = state


# --- resuming ---


def check_same_settings(path, saved, now, free=(), then="in the checkpoint", remedy="use those, or another out_dir"):
    """Raise UserError with both values where settings differ from those that were saved, but for the names in `free`.

    saved, now: dicts, and dicts in them are searched too.  then, remedy: words of the message.
    """

    def flat(settings):
        parts = (flat(value) if isinstance(value, dict) else {name: value} for name, value in settings.items())
        return {name: value for part in parts for name, value in part.items()}

    saved, now = (flat(json.loads(json.dumps(settings))) for settings in (saved, now))  # tuples as lists
    rows = [f"{k}={saved.get(k)} {then}, {now[k]} now" for k in now if k not in free and saved.get(k) != now[k]]
    if rows:
        reject(path, f"has other settings: {', '.join(rows)}", remedy)


def start(cfg, world, meta, path):
    """(step, images per step, micro-steps) at which a run begins: those of the checkpoint at `path`, or if meta is {}
    of a new run. Images per step stay the same with another batch_size or number of processes."""
    images_per_step = meta.get("images_per_step", cfg.batch_size * cfg.grad_accum * world)
    micro_steps, rest = divmod(images_per_step, cfg.batch_size * world)
    if rest:
        have = f"{images_per_step} images per step, not a multiple of batch_size={cfg.batch_size} x {world} processes"
        reject(path, have, "change batch_size")
    return meta.get("step", 0), images_per_step, micro_steps


# --- log ---


def git_revision():
    """What `git describe` says of this repository, or "unknown"."""
    here, command = os.path.dirname(os.path.abspath(__file__)), ["git", "describe", "--always", "--dirty"]
    try:
        return subprocess.run(command, capture_output=True, text=True, cwd=here).stdout.strip() or "unknown"
    except OSError:  # git is not installed
        return "unknown"


class Log:
    """Progress of a run: a line on stdout and in OUT_DIR/log.jsonl every log_every steps, and each evaluation; its
    settings in OUT_DIR/settings.json.

    Logged terms are means over the steps since the last line and over all ranks; until then they stay on the device.
    """

    def __init__(self, cfg, machine, images_per_step, data, meta, tflop=0.0):
        """data: the dataset's fingerprint.  meta: of a checkpoint to resume, or {}.  tflop: of training on an image."""
        self.cfg, self.machine, self.images_per_step, self.tflop = cfg, machine, images_per_step, tflop
        self.path, self.latest = f"{cfg.out_dir}/log.jsonl", f"{cfg.out_dir}/latest.safetensors"
        self.pending, self.keys, self.bad_images, self.wandb = [], [], 0, None
        self.last_step, self.started = meta.get("step", 0), time.time()
        self.restart_clock()
        kind = machine.device.type
        hardware = "Apple GPU" if kind == "mps" else f"{torch.get_num_threads()} CPU threads"
        hardware = torch.cuda.get_device_name() if kind == "cuda" else hardware
        self.peak = next((tflops for name, tflops in PEAK_TFLOPS.items() if name in hardware), 0)
        # run: tells its snapshots from those of another run
        self.about = dict(config=cfg, git=git_revision(), run=meta.get("run", time.time_ns()))
        self.about |= dict(images_per_step=images_per_step, data=data)
        if machine.rank > 0:
            return
        os.makedirs(cfg.out_dir, exist_ok=True)
        self.print(f"command: {' '.join(sys.argv)}")
        self.print(f"git {self.about['git']}, python {platform.python_version()}, torch {torch.__version__}")
        self.print(f"{machine.world} x {hardware}, {machine.precision}; settings not default: {cfg.changed}")
        start = f"resumed from {self.latest} at step {self.last_step}" if meta else f"a new run in {cfg.out_dir}"
        accumulated = images_per_step // (cfg.batch_size * machine.world)
        size = f"processes {machine.world} x batch_size {cfg.batch_size} x grad_accum {accumulated}"
        self.print(f"{start}; {images_per_step} images per step: {size}")
        if meta:
            saved, now = meta["config"], json.loads(json.dumps(cfg))  # tuples as lists
            others = [f"{k}={now[k]} was {saved[k]}" for k in now if k in saved and now[k] != saved[k]]
            self.print(f"settings changed since: {', '.join(others) or 'none'}")
            if meta["data"] != data:
                self.print("warning: the dataset has changed since the checkpoint; images come in another order")
        about = {"script": os.path.basename(sys.argv[0]), "changed": cfg.changed, "config": cfg}
        write_whole(f"{cfg.out_dir}/settings.json", lambda file: file.write(json.dumps(about, indent=1).encode()))
        with open(self.path, "a" if meta else "w") as file:
            file.write("\n" if meta else "")  # ends a line that a kill cut short
        if cfg.wandb:
            import wandb

            self.wandb = wandb.init(project="latent-diffusion", name=cfg.out_dir, config=dict(cfg))

    def header(self, step, **more):
        """The meta of a checkpoint at a step."""
        return {"step": step, "images_seen": step * self.images_per_step} | self.about | more

    def print(self, text):
        """On rank 0."""
        if self.machine.rank == 0:
            print(text, flush=True)

    def saw(self, batch):
        """Keep the keys of a batch of this step; name and count its images that did not decode, on every rank."""
        self.keys += batch["key"]
        for line in batch.get("bad", ()):
            self.bad_images += 1
            print(f"skipped a bad image ({self.bad_images} so far on rank {self.machine.rank}): {line}", flush=True)

    def step(self, step, terms, ok, lr):
        """After optimizer step number `step` (from 1).

        terms: {name: tensor} of this rank, (), or (2,K) for sums and counts in K bins, of which the means are logged.
        ok: of `all_finite`.
        """
        self.pending.append((step, {name: t.detach() for name, t in terms.items()}, ok, self.keys))
        self.keys, self.last_step = [], step
        if step % self.cfg.log_every == 0 or step == self.cfg.max_steps:
            self.check()
            self.progress(step, lr)

    def progress(self, step, lr):
        names = dict.fromkeys(name for _, terms, _, _ in self.pending for name in terms)
        means = [torch.stack([t[name] for _, t, _, _ in self.pending if name in t]).mean(dim=0) for name in names]
        average_over_ranks(*means)
        record = dict(zip(names, [mean.tolist() for mean in means]))
        text = ", ".join(f"{name} {value:.4g}" for name, value in record.items() if isinstance(value, float))
        for name, value in record.items():
            if not isinstance(value, float):
                record[name] = [total / count if count else None for total, count in zip(*value)]
        speed = (step - self.clock_step) * self.images_per_step / max(time.time() - self.clock, 1e-9)
        record |= {"lr": lr, "images_per_s": float(f"{speed:.6g}")}
        text += f", lr {lr:.2e}, {speed:.1f} images/s"
        if self.peak:
            record["mfu"] = speed * self.tflop / (self.machine.world * self.peak)
            text += f", MFU {record['mfu']:.1%}"
        if self.machine.device.type == "cuda":
            record["memory_gb"] = torch.cuda.max_memory_allocated() / 2**30
            text += f", {record['memory_gb']:.1f} GiB"
        left = datetime.timedelta(seconds=int((self.cfg.max_steps - step) * self.images_per_step / max(speed, 1e-9)))
        self.write(step, record)
        self.print(f"step {step}, {step * self.images_per_step} images: {text}, {left} left")
        self.pending = []
        self.restart_clock()

    def evaluation(self, step, scores):
        """After an evaluation: numbers, or lists of numbers, by name."""
        self.write(step, scores)
        text = ", ".join(f"{name.removeprefix('val_')} {brief(value)}" for name, value in scores.items())
        self.print(f"evaluation at step {step}: {text}")

    def restart_clock(self):
        """After what is not training time."""
        self.clock, self.clock_step = time.time(), self.last_step

    def write(self, step, record):
        """Append one line to log.jsonl. A resumed run repeats steps: the last record of a step counts."""
        if self.machine.rank > 0:
            return
        with open(self.path, "a") as file:
            file.write(json.dumps({"step": step, "images_seen": step * self.images_per_step} | record) + "\n")
        if self.wandb:
            self.wandb.log(record, step=step)

    def check(self):
        """End the run if a step since the last line was not finite; all ranks call it, before anything is saved."""
        fine = torch.stack([ok for _, _, ok, _ in self.pending]).tolist() if self.pending else []
        if all(fine):
            return
        step, terms, _, keys = self.pending[fine.index(False)]
        names = [name for name, t in terms.items() if not t.isfinite().all()]
        what = f"{', '.join(names) or 'a term of another rank'} not finite at step {step}; the weights were not updated"
        saved = f"last checkpoint: {self.latest}" if os.path.exists(self.latest) else "no checkpoint yet"
        images = ", ".join(keys[:8]) + (f" and {len(keys) - 8} more" if len(keys) > 8 else "")
        remedy = "try a lower lr, grad_clip or more warmup_steps"
        raise UserError(f"{what}; {saved}; {remedy}; images of the step: {images}")

    def end(self, step, stop):
        """The last line of a run that has finished, or was stopped by a signal; all ranks leave."""
        how = "finished" if step >= self.cfg.max_steps else "stopped"
        self.print(f"{how} at step {step} after {time.time() - self.started:.0f} s: {self.latest}")
        leave(128 + stop.signal if how == "stopped" else 0)


def progress_bar(items, title):
    """`items`, with a bar and the time left on the terminal of rank 0, if there is one."""
    return tqdm(items, title, leave=False, disable=None if int(os.environ.get("RANK", 0)) == 0 else True)


def brief(value):
    if isinstance(value, list):
        return " ".join(map(brief, value))
    return "-" if value is None else f"{value:.4f}"


def read_log(out_dir):
    """The records of a run's log.jsonl, see read_records."""
    with open(f"{out_dir}/log.jsonl") as file:
        return read_records(file)


def read_records(lines):
    """[{step, ...}, ...] of lines of a log.jsonl, one for each step in order; of a repeated step the last values."""
    records = {}
    for line in lines:
        # a kill may cut a line short
        with contextlib.suppress(ValueError, TypeError, KeyError, OverflowError, RecursionError):
            record = json.loads(line)
            step = int(record["step"])
            records[step] = records.get(step, {}) | record
    return [records[step] for step in sorted(records)]


def plot_log(out_dir, panels):
    """Draw OUT_DIR/loss.png: a panel for each of {title: names in log.jsonl}; a list gives several curves."""
    try:
        import matplotlib
    except ImportError:  # optional
        return
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    records = read_log(out_dir)
    logged = {name for record in records for name, value in record.items() if value is not None}
    panels = {title: [n for n in names if n in logged] for title, names in panels.items() if logged & set(names)}
    columns = min(4, max(1, len(panels)))
    rows = max(1, math.ceil(len(panels) / columns))
    figure = plt.figure(figsize=(4.5 * columns, 3.5 * rows), layout="constrained")
    for number, (title, names) in enumerate(panels.items(), 1):
        axis = figure.add_subplot(rows, columns, number)
        for name in names:
            steps, values = zip(*[(record["step"], record[name]) for record in records if record.get(name) is not None])
            values = np.array(values, dtype=float)  # None becomes NaN
            labels = name if values.ndim == 1 else list(range(values.shape[1]))  # the index in the list
            axis.plot(steps, values, marker="." if len(steps) < 30 else None, label=labels)
        positive = not any((line.get_ydata() <= 0).any() for line in axis.lines)
        axis.set_yscale("log" if positive and any(word in title for word in ("loss", "norm")) else "linear")
        axis.set_title(title)
        axis.set_xlabel("step")
        if len(axis.lines) > 1:
            axis.legend(fontsize="small", ncols=2 if len(axis.lines) > 4 else 1)
    figure.savefig(f"{out_dir}/loss.png", dpi=80)
    plt.close(figure)
