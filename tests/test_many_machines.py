"""Many ranks, and ranks in trouble: who hangs, fails or waits, bad batches, spikes, a shared optimizer, two nodes.

LDM_LONG_TESTS=1 adds what takes minutes: stage 2 on two nodes, and a node that is lost.
"""

import contextlib
import json
import os
import re
import runpy
import shutil
import signal
import socket
import subprocess
import sys
import textwrap
import time

import helpers
import pytest
import torch
from helpers import ARGS, ROOT, assert_same, read
from test_train_vae import both_stages, continued, numbers

import lpips_train
import train_ldm
import train_vae
from watch import describe, fresh_store, hanging, slow_reader

GAME = ("--disc_weight=0.5", "--disc_layers=1", "--disc_channels=16", "--disc_start=2", "--image_size=16")
QUICK = ("--eval_every=100", "--val_images=4")
LONG = pytest.mark.skipif(not os.environ.get("LDM_LONG_TESTS"), reason="takes minutes: LDM_LONG_TESTS=1")


def breaking(stage, where, what):
    """Python for Run(first=): at position p of the training data, where `where` holds, do `what` to `item`.

    Names to use: p, rank, item, and what Python has.
    """
    module, name = {"vae": ("data.dataset", "Stream"), "ldm": ("data.tasks", "WithCondition")}[stage]
    return textwrap.dedent(f"""
        import os, signal, sys, time
        sys.path.insert(0, {str(ROOT)!r})
        import {module} as module
        rank, usual = int(os.environ["RANK"]), module.{name}.__getitem__

        def broken(self, p):
            item = usual(self, p)
            stream = getattr(self, "stream", self)
            if getattr(stream, "stream", stream).train and ({where}):
                {what}
            return item

        module.{name}.__getitem__ = broken
    """)


# -- who hangs, who is slow --


def report(begun, still, reading=0.0):
    return dict(
        begun=begun, still=still, silent=0.0, reading=reading, name=f"node{begun}, process 7", phase="forward", step=3
    )


def test_who_hangs():
    assert hanging([report(9, 700), report(8, 601), report(9, 700)], 600) == [1]
    assert hanging([report(9, 700), report(8, 599), report(9, 700)], 600) == [], "slow, but it gets on"
    assert hanging([report(5, 700), report(5, 601)], 600) == [0, 1], "in the same place"
    assert hanging([report(5, 700), report(5, 1)], 600) == [], "one works, the other waits for it in a collective"
    text = describe([report(9, 700), report(8, 660), report(9, 700)], [1], 600)
    assert text == (
        "rank 1 (node8, process 7) has made no progress for 11 min: forward, step 3; the other 2 wait for it"
    )
    text = describe([report(9, 700), report(8, 660) | {"silent": 650}], [1], 600)
    assert "forward, step 3, when last heard of: it was stopped, or its node is lost; the other 1 waits" in text
    assert describe([report(5, 60)] * 6, [*range(6)], 50).endswith("; and 2 more like it; no rank is behind the others")


def test_who_waits_for_data():
    before = [report(0, 0, reading) for reading in (5.0, 6.0, 7.0, 5.0)]
    after = [report(0, 0, reading) for reading in (11.0, 12.0, 187.0, 5.0)]
    text = slow_reader(after, before, 600)
    assert text.startswith("rank 2 (node0, process 7) waited for data in 30% of the last 10 min, others in 1%: ")
    assert slow_reader(before, before, 600) == "" == slow_reader([report(0, 0, 300.0)] * 4, before, 600), "all alike"
    assert slow_reader(after[1:3], before[1:3], 600), "of two"


@both_stages
@pytest.mark.parametrize("how", ("sleeps", "stopped"))
def test_a_rank_that_hangs_is_named(stage, how, start):
    """It sleeps as if on a dead disk, or is stopped as a whole; in stage 2 rank 0 does, which keeps the store."""
    rank = {"vae": 1, "ldm": 0}[stage]
    what = {"sleeps": "time.sleep(1000)", "stopped": "os.kill(os.getpid(), signal.SIGSTOP)"}[how]
    run = start(
        stage,
        "--hang_timeout=0.1",
        "--batch_size=2",
        "--max_steps=100",
        *QUICK,
        ranks=2,
        first=breaking(stage, f"rank == {rank} and p >= 12", what),
    )
    began = time.time()
    run.processes[1 - rank].join(100)
    assert run.processes[1 - rank].exitcode == 1 and time.time() - began < 90
    if how == "stopped":
        run.processes[rank].kill()
    run.processes[rank].join(20)
    output = [(run.folder / f"stderr{r}").read_text() for r in range(2)]
    if how == "stopped" and rank == 0:  # nobody can say more of it
        told = r"rank 1 \(\S+, process \d+\): the process group's store is silent or gone: what keeps it, rank 0 or "
        assert re.search(told, output[1]), output
        return
    lines = [line for line in "".join(output).splitlines() if "has made no progress" in line]
    wanted = rf"train_{stage}.py: rank {rank} \(\S+, process \d+\) has made no progress for 0\.\d+ min: "
    wanted += (
        "reading data, step 3" if how == "sleeps" else ".*, when last heard of: it was stopped, or its node is lost"
    )
    assert len(lines) == 1 and re.fullmatch(rf"{wanted}; the other 1 waits for it", lines[0]), output
    if how == "sleeps":
        assert run.processes[rank].exitcode == 1
        assert f"rank {rank} hangs here:" in output[rank] and "in broken" in output[rank], output[rank]
        assert "hangs here" not in output[1 - rank]


def test_progress_is_not_a_hang(start):
    """Data that take longer than hang_timeout between them all, but not each, stop nothing."""
    slow = breaking("vae", "rank == 1 and p < 16", "time.sleep(0.5)")
    args = ("--hang_timeout=0.05", "--batch_size=2", "--eval_every=100", "--max_steps=6")
    began = time.time()
    start("vae", *args, ranks=2, first=slow).finish()
    assert time.time() - began > 3.5


@both_stages
def test_a_rank_that_fails_ends_all_with_its_message(stage, start):
    """It says so itself, one of the others for all of them."""
    ranks = {"vae": 3, "ldm": 2}[stage]
    fails = breaking(stage, "rank == 1 and p >= 12", "raise OSError('the disk of shard 17 is gone')")
    run = start(stage, "--batch_size=2", "--max_steps=1000", ranks=ranks, first=fails)
    began = time.time()
    assert run.wait() == [1] * ranks and time.time() - began < 30
    output = [(run.folder / f"stderr{rank}").read_text() for rank in range(ranks)]
    assert output.pop(1) == f"[rank1]: train_{stage}.py: the disk of shard 17 is gone\n"
    message = rf"train_{stage}.py: rank 1 \(\S+, process \d+\) failed: the disk of shard 17 is gone\n"
    assert len(re.findall(message, "".join(output))) == 1, output


# -- bad batches --


@both_stages
@pytest.mark.parametrize("ranks", (1, 2))
def test_a_poisoned_image_is_named(stage, ranks, start):
    """One infinite pixel, in one of many images: its key, its step's by rank, and nothing of it in the weights."""
    poison = f"""
import sys
sys.path.insert(0, {str(ROOT)!r})
import data.dataset
usual = data.dataset.Dataset.pixels
def pixels(self, i, *args, **named):
    x = usual(self, i, *args, **named)
    if self.split == "train" and i == 7:
        x[0, 3, 3] = float("inf")
    return x
data.dataset.Dataset.pixels = pixels
"""
    args = (
        f"--batch_size={4 // ranks}",
        "--save_every=1",
        *QUICK,
        *["--cache_latents=false"][: stage == "ldm"],
    )
    run = start(stage, *args, "--max_steps=12", ranks=ranks, keep=True, first=poison)
    message = run.fail()
    assert run.codes == [1] * ranks
    found = re.search(
        r" not finite at step (\d+): .* is good: look at (\S+) \((\S+) has all keys\), lower lr, ", message
    )
    step = int(found[1])
    assert found[3] == f"out/bad_batch_{step:08d}.json"
    record = json.loads((run.folder / found[3]).read_text())
    images = train_vae.Dataset(run_dataset(run), "train", 16)
    stream = train_vae.Stream(images, 0)
    keys = [stream.draw(p)["key"] for p in range(4 * step - 4, 4 * step)]
    wanted = [keys[i : i + 4 // ranks] for i in range(0, 4, 4 // ranks)]
    assert found[2] == images.key(7) and record["step"] == step and record["keys_by_rank"] == wanted
    assert sum(record["not_finite_by_rank"], []) == [images.key(7)]
    assert record["terms"]["loss"] == "nan" or record["terms"]["loss"] == "inf"
    tensors, meta = run.checkpoint
    assert meta["step"] == step - 1 and all(t.isfinite().all() for n, t in tensors.items() if "latent_" not in n)
    for rank in range(ranks):
        weights = read(run.folder / f"rank{rank}.safetensors")[0]
        assert_same(weights, train_vae.without_prefix("model", tensors))


def run_dataset(run):
    return re.search(r"images \(npy\) in (\S+)", run.stdout)[1]


@pytest.mark.parametrize("script", (train_vae, train_ldm, lpips_train))
def test_what_a_spike_is(script):
    """Against the definition in plain floats: warm-up, the mean over about 100, a lasting change is followed."""
    generator = torch.Generator().manual_seed(0)
    norms = (1 + 0.2 * torch.rand(400, generator=generator, dtype=torch.float64)).tolist()
    norms[50], norms[150], norms[151], norms[200] = 100.0, 30.0, float("inf"), float("nan")
    norms[300:] = [10 * norm for norm in norms[300:]]
    usual, mean, count, spikes, at = torch.zeros(3, dtype=torch.float64), 0.0, 0, 0, []
    for i, norm in enumerate(norms):
        got = script.is_spike(torch.tensor(norm, dtype=torch.float64), usual, 4.0).item()
        is_spike = count >= 100 and norm > 4 * mean
        assert got == is_spike, i
        at += [i] * is_spike
        enters = 4 * mean if is_spike else norm
        if enters < float("inf"):
            spikes, mean, count = spikes + is_spike, mean + (enters - mean) / min(count + 1, 100), count + 1
        assert usual.tolist() == pytest.approx([mean, count, spikes], rel=1e-12)
    assert at[:3] == [150, 151, 300], "100 at 50 is in the first hundred"
    assert 300 < at[-1] < 350, "ten times the norm for ever: followed after some steps"


@pytest.mark.parametrize("script", (train_vae, train_ldm, lpips_train))
def test_a_spike_is_above_the_mean(script):
    settings = {name: value for name, value in vars(script).items() if name.islower()}
    for times in (0.0, 1.5):
        script.check_settings(settings | {"skip_spikes": times})
    for times in (-1.0, 0.5, 1.0):
        with pytest.raises(ValueError, match="skip_spikes="):
            script.check_settings(settings | {"skip_spikes": times})


@pytest.mark.parametrize("stage, ranks", (("vae", 2), ("ldm", 1)))
def test_a_spike_is_left_out(stage, ranks, start, finished, tmp_path):
    script, args = {"vae": train_vae, "ldm": train_ldm}[stage], [*QUICK, f"--batch_size={4 // ranks}"]
    args += ["--recon_loss=l2"] if stage == "vae" else []
    folders = [continued(finished(stage, ranks), tmp_path / name) for name in ("quiet", "on", "parts", "not")]
    tensors, meta = finished(stage, ranks).checkpoint
    mean = sum(r["grad_norm"] for r in finished(stage, ranks).log if r["grad_norm"]) / 6
    tensors["state.grad_norm"] = torch.tensor([mean, 200.0, 2.0])  # as after 200 steps of which two were left out
    for folder in folders:
        script.save_checkpoint(f"{folder}/out/latest.safetensors", tensors, meta)
    # position 30 is in step 8
    options = dict(ranks=ranks, first=breaking(stage, "p == 30", "item['image'] = item['image'] * 300"))

    def go(folder, steps, times=20):
        run = start(stage, *args, f"--skip_spikes={times}", f"--max_steps={steps}", folder=folder, **options)
        return run.finish()

    before, _ = go(folders[0], 7).checkpoint
    on = go(folders[1], 9)
    found = re.search(
        r"left out step 8, 3 so far: gradient norm (\S+), over 20 times its running mean; images: (.*)", on.stdout
    )
    assert float(found[1]) > 20 * mean and on.stdout.count("left out step") == 1
    images = train_vae.Dataset(run_dataset(on), "train", 16)
    assert found[2].split(", ") == [train_vae.Stream(images, 0).draw(p)["key"] for p in range(28, 32)]
    parts = go(folders[2], 8)
    after, meta = parts.checkpoint
    held = [name for name in before if name.startswith(("model.", "optim.")) and ".latent_" not in name]
    assert_same({name: before[name] for name in held}, {name: after[name] for name in held})
    assert meta["step"] == 8 and after["state.grad_norm"].tolist()[1:] == [202, 3]
    resumed = go(folders[2], 9)  # exactly as if there had been no stop
    assert_same(resumed.checkpoint[0], on.checkpoint[0])
    assert numbers(resumed.log)[-2:] == numbers(on.log)[-2:]
    if stage == "vae":
        taken = go(folders[3], 8, times=0)
        assert "left out" not in taken.stdout
        assert any(not torch.equal(taken.checkpoint[0][name], before[name]) for name in held)


# -- the optimizer's state, shared out --


@pytest.mark.parametrize("script", (train_vae, train_ldm, lpips_train))
def test_shares_are_even_and_the_same_everywhere(script):
    sizes = [1000, 10, 700, 700, 300, 5, 5, 900]
    parameters = [torch.nn.Parameter(torch.zeros(n)) for n in sizes]
    owner = script.share_out(parameters, 3)
    assert set(owner) == set(parameters) and owner == script.share_out(parameters, 3)
    kept = [sum(p.numel() for p in parameters if owner[p] == rank) for rank in range(3)]
    assert sum(kept) == sum(sizes) and max(kept) - min(kept) <= max(sizes)
    few = script.share_out(parameters[:1], 3)  # ranks that keep nothing still take the step
    empty = torch.optim.AdamW([{"params": [p for p in few if few[p] == 2]}], fused=True)
    empty.found_inf = torch.zeros(())
    empty.step()


COUNT_STATE = """
import torch
class Counted(torch.optim.AdamW):
    def __init__(self, groups, **settings):
        super().__init__(groups, **settings)
        print("AdamW keeps", sum(p.numel() for group in self.param_groups for p in group["params"]), flush=True)
torch.optim.AdamW = Counted
"""


@both_stages
def test_a_shared_optimizer_is_the_whole_one_bit_for_bit(stage, start, finished, killed, tmp_path):
    """Steps, checkpoints with all of its state, and going on with it from a run without it."""
    args = ("--eval_every=3", "--save_every=3", "--snapshot_every=3", "--batch_size=2", "--shard_optimizer=true")
    shared = start(stage, *args, ranks=2, first=COUNT_STATE).finish()
    tensors, meta = finished(stage, 2).checkpoint
    assert_same(shared.checkpoint[0], tensors)
    assert numbers(shared.log) == numbers(finished(stage, 2).log)
    kept = [int(re.search(r"AdamW keeps (\d+)", (shared.folder / f"stdout{r}").read_text())[1]) for r in range(2)]
    total = sum(t.numel() for name, t in tensors.items() if name.startswith("optim.") and name.endswith("exp_avg"))
    assert sum(kept) == total and max(kept) < 0.6 * total
    resumed = start(stage, *args, ranks=2, folder=continued(killed(stage, 2), tmp_path)).finish()
    assert_same(resumed.checkpoint[0], tensors)


@both_stages
def test_a_shared_optimizer_at_another_world_size(stage, start, tmp_path):
    """2 ranks, then 1, then 2 again, are one process in float64; in stage 1 with the discriminator's."""
    args = ("--dtype=float64", *QUICK, *(GAME if stage == "vae" else ()))
    one = start(stage, *args)
    for ranks, steps in ((2, 3), (1, 4), (2, 6)):
        options = (f"--max_steps={steps}", f"--batch_size={4 // ranks}", "--shard_optimizer=true")
        parts = start(stage, *args, *options, ranks=ranks, folder=tmp_path).finish()
        assert parts.checkpoint[1]["step"] == steps
    assert_same(parts.checkpoint[0], one.finish().checkpoint[0], 1e-9)
    assert ("disc_optim.main.0.bias.step" in parts.checkpoint[0] or stage == "ldm") and parts.log[-1]["step"] == 6


def test_a_shared_optimizer_leaves_bad_steps_and_dead_codes_alone(start):
    """VQ: the codes' state is on one rank only, and is forgotten there when codes restart."""
    args = ("--bottleneck=vq", "--codebook_size=32", "--restart_every=2", "--batch_size=2", *QUICK)
    a, b = (start("vae", *args, f"--shard_optimizer={on}", ranks=2) for on in (True, False))
    assert_same(a.finish().checkpoint[0], b.finish().checkpoint[0])


# -- who writes, and where --


ELSEWHERE = """
import os, time
if os.environ["RANK"] == "1":
    os.makedirs("node1", exist_ok=True)
    os.chdir("node1")
usual = time.monotonic
time.monotonic = lambda: 30 * usual()  # no minute of waiting for a network disk
"""


@both_stages
def test_rank_0_alone_writes_and_all_must_see_it(stage, start, finished):
    """Rank 1 as on a node with a disk of its own, where out_dir is another folder."""
    args = ("--eval_every=3", "--save_every=3", "--snapshot_every=3", "--batch_size=2")
    apart = start(stage, *args, "--max_steps=3", ranks=2, first=ELSEWHERE).finish()
    assert not os.listdir(apart.folder / "node1") and (apart.out / "ema_00000003.safetensors").exists()
    message = start(stage, *args, ranks=2, first=ELSEWHERE, folder=apart.folder).fail()
    assert re.fullmatch(
        r"the checkpoint's step: 3 on rank 0 \(\S+\), none on rank 1 \(\S+\): out_dir must lie on a disk that all "
        r"nodes share; dataset too, or be alike",
        message,
    )


def test_a_latent_cache_that_is_not_shared(start, finished, tmp_path):
    args = (*QUICK, "--batch_size=2", "--cache_dir=cache", "--max_steps=1")
    message = start("ldm", *args, ranks=2, first=ELSEWHERE, folder=tmp_path).fail()
    assert re.match(r"cache/latents-\w+ on \S+ is another folder than on rank 0's node: set cache_dir to one ", message)
    assert not list(tmp_path.glob("cache/*/*"))
    start("ldm", *args, folder=tmp_path / "one").finish()  # complete copies on each node's disk will do
    for folder in (tmp_path, tmp_path / "node1"):
        shutil.copytree(tmp_path / "one/cache", folder / "cache", dirs_exist_ok=True)
    start("ldm", *args, ranks=2, first=ELSEWHERE, folder=tmp_path).finish()
    assert not list(tmp_path.glob("**/shared.*"))


# -- no waiting for the device inside a step --

SYNCS = """
import sys, torch
from torch.utils._python_dispatch import TorchDispatchMode

def note(what):
    frame, inside = sys._getframe(1), []
    while frame:
        inside.append(frame)
        frame = frame.f_back
    scripts = (f.f_globals for f in inside if f.f_globals.get("__name__") == "__main__")
    watch = next((scope["watch"] for scope in scripts if "watch" in scope), None)
    if watch and watch.phase in ("forward", "backward", "optimizer step"):
        if not any(f.f_code.co_name in ("settle", "tokenize", "is_available") for f in inside):
            print("waits:", what, [f"{f.f_code.co_filename}:{f.f_lineno}" for f in inside[:6]], flush=True)

class Syncs(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        aten = torch.ops.aten  # the last one: x[0] = True, x[[0, 1]], torch.tensor(...) copy to a GPU and wait for it
        if func in (aten._local_scalar_dense.default, aten.nonzero.default, aten.lift_fresh.default):
            note(str(func))
        return func(*args, **(kwargs or {}))

for name in ("item", "tolist", "cpu", "numpy"):
    def wrapped(self, *args, usual=getattr(torch.Tensor, name), name=name):
        note(name)
        return usual(self, *args)
    setattr(torch.Tensor, name, wrapped)
Syncs().__enter__()
"""


@both_stages
def test_nothing_in_a_step_asks_for_a_tensors_value(stage, start):
    """.item(), bool(tensor), .cpu(), x[0] = 1 and the like would each make a GPU's host wait; two planted are found."""
    args = ("--max_steps=3", *QUICK, "--skip_spikes=5", *(GAME if stage == "vae" else ()))
    assert "waits:" not in start(stage, *args, first=SYNCS).finish().stdout
    planted = "usual_lerp = torch._foreach_lerp_\ndef lerp(*args):\n    bool(args[0][0].sum() > 0)\n"
    planted += "    torch.zeros(2)[0] = 1\n    usual_lerp(*args)\n"
    planted = start(stage, *args, first=f"{SYNCS}\n{planted}torch._foreach_lerp_ = lerp").finish().stdout
    assert planted.count("waits: aten._local_scalar_dense") == planted.count("waits: aten.lift_fresh") == 3


# -- torchrun: two nodes, restarts --


def agent(folder, log, settings, before, script, args):
    """An elastic agent as torchrun is one, whose workers fork from it, torch loaded, and run script as __main__."""
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    for fd in (1, 2):
        os.dup2(os.open(f"{folder}/{log}", os.O_WRONLY | os.O_CREAT | os.O_APPEND), fd)
    os.chdir(folder)
    os.environ["OMP_NUM_THREADS"] = "1"
    if settings["max_nodes"] > 1:
        os.environ["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"  # or torch 2.13 leaves out nodes that join
    torch.set_num_threads(1)

    def worker():
        sys.argv, sys.path[0], sys.modules["matplotlib"] = [script, *args], str(ROOT), None
        exec(before, {})
        try:
            runpy.run_path(f"{ROOT}/{script}", run_name="__main__")
        except Exception:  # as of a script, not of a function that multiprocessing runs
            sys.excepthook(*sys.exc_info())
            sys.exit(1)

    config = LaunchConfig(rdzv_backend="c10d", start_method="fork", run_id="test", **settings)
    elastic_launch(config, worker)()


class Nodes:
    """Elastic agents on loopback, one for each node; node 0 has the store.  before: Python run in each worker first.

    command: as `torchrun` started by a user, and not from memory; then `before` is not run.
    """

    def __init__(self, folder, stage, args, nodes=2, least=0, per_node=2, max_restarts=0, before="", command=False):
        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            self.port = s.getsockname()[1]
        script, endpoint = f"train_{stage}.py", f"localhost:{self.port}"
        self.folder, self.agents, self.command = folder, [], None
        settings = dict(min_nodes=least or nodes, max_nodes=nodes, nproc_per_node=per_node, max_restarts=max_restarts)
        settings["rdzv_configs"] = dict(last_call_timeout=5, keep_alive_interval=1, keep_alive_max_attempt=3)
        self.start = (settings | {"rdzv_endpoint": endpoint}, before, script, [*ARGS[stage].split(), *args])
        if command:
            self.command = f"{sys.executable} -m torch.distributed.run --rdzv_backend=c10d --rdzv_endpoint={endpoint}"
            self.command += (
                f" --nnodes={least or nodes}:{nodes} --nproc_per_node={per_node} --max_restarts={max_restarts}"
            )
            self.command = [*self.command.split(), f"{ROOT}/{script}", *self.start[-1]]
        for _ in range(nodes):
            self.add()

    def add(self):
        end = time.time() + 60
        while self.agents and time.time() < end:
            with socket.socket() as s:
                if s.connect_ex(("127.0.0.1", self.port)) == 0:
                    break
            time.sleep(0.05)
        log = f"node{len(self.agents)}"
        if self.command:
            with open(f"{self.folder}/{log}", "w") as f:
                environment = os.environ | {"OMP_NUM_THREADS": "1"}
                process = subprocess.Popen(self.command, cwd=self.folder, stdout=f, stderr=f, env=environment)
        else:
            process = helpers.context.Process(target=agent, args=(str(self.folder), log, *self.start))
            process.start()
        self.agents.append(process)

    def code(self, node):
        return self.agents[node].poll() if self.command else self.agents[node].exitcode

    def wait(self, timeout=100):
        end = time.time() + timeout
        while any(self.code(node) is None for node in range(len(self.agents))) and time.time() < end:
            time.sleep(0.02)
        codes = [self.code(node) for node in range(len(self.agents))]
        self.kill()
        return codes

    def kill(self, *nodes):
        """Agents and what they started."""
        for node in nodes or range(len(self.agents)):
            if self.code(node) is None:
                with open(f"/proc/{self.agents[node].pid}/task/{self.agents[node].pid}/children") as f:
                    workers = [int(pid) for pid in f.read().split()]
                for pid in (self.agents[node].pid, *workers):
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(pid, signal.SIGKILL)
                self.agents[node].wait() if self.command else self.agents[node].join()

    @property
    def output(self):
        logs = [self.folder / f"node{node}" for node in range(len(self.agents))]
        return "\n".join(log.read_text() for log in logs if log.exists())


def on_two_nodes(stage, start, places, folder, **how):
    args = ("--dtype=float64", "--eval_every=3")
    one = start(stage, *args, "--batch_size=4")
    nodes = Nodes(folder, stage, [*places, *args, "--batch_size=1"], **how)
    assert nodes.wait() == [0, 0], nodes.output
    tensors, meta = read(folder / "out/latest.safetensors")
    assert "4 images per step: 4 processes x 1 x 1 accumulated" in nodes.output and meta["step"] == 6
    assert_same(tensors, one.finish().checkpoint[0], 1e-9)
    log = [json.loads(line) for line in (folder / "out/log.jsonl").read_text().splitlines()]
    for a, b in zip(log, one.log, strict=True):
        for name in ("loss", "grad_norm", "val_psnr", "val_loss"):
            if a.get(name) is not None:
                assert a[name] == pytest.approx(b[name], rel=1e-9), (a["step"], name)


def places_of(stage, small_data, first_stage, folder):
    places = [f"--dataset={small_data}"]
    return places + ([f"--first_stage={first_stage}", f"--cache_dir={folder}/cache"] if stage == "ldm" else [])


@both_stages
def test_two_nodes_train_as_one_process(stage, start, small_data, first_stage, tmp_path):
    on_two_nodes(stage, start, places_of(stage, small_data, first_stage, tmp_path), tmp_path)


@LONG
@both_stages
def test_two_nodes_by_torchrun(stage, start, small_data, first_stage, tmp_path):
    on_two_nodes(stage, start, places_of(stage, small_data, first_stage, tmp_path), tmp_path, command=True)


def in_life(life, code):
    """Python that is run where torchrun has restarted this often."""
    return f"import os\nif os.environ['TORCHELASTIC_RESTART_COUNT'] in {life!r}:\n{textwrap.indent(code, '    ')}"


def test_a_rank_that_is_killed_is_restarted(start, finished, small_data, tmp_path):
    """max_restarts: from the last checkpoint to the weights of an undisturbed run, bit for bit.

    torchrun's store is the same after it, so what the ranks before wrote there must mean nothing to a later watch.
    """
    before = in_life("0", breaking("vae", "rank == 1 and p >= 18", "os.kill(os.getpid(), signal.SIGKILL)"))
    before += "\n" + in_life("1", breaking("vae", "rank == 1", "time.sleep(0.3)"))  # several looks of the watch
    args = [f"--dataset={small_data}", "--eval_every=3", "--save_every=3", "--snapshot_every=3", "--batch_size=2"]
    nodes = Nodes(tmp_path, "vae", [*args, "--hang_timeout=0.2"], nodes=1, max_restarts=1, before=before)
    assert nodes.wait() == [0], nodes.output
    assert ") failed: " not in nodes.output, "what the watch of the first life told"
    assert nodes.output.count("a new run in out") == nodes.output.count("from out/latest.safetensors at step 3") == 1
    assert_same(read(tmp_path / "out/latest.safetensors")[0], finished("vae", 2).checkpoint[0])
    log = [json.loads(line) for line in (tmp_path / "out/log.jsonl").read_text().splitlines()]
    assert numbers(log) == numbers(finished("vae", 2).log)


def test_restarts_on_several_nodes_want_a_new_store_each(monkeypatch):
    store = torch.distributed.HashStore()
    monkeypatch.setattr(torch.distributed, "rendezvous", lambda *args, **named: iter([(store, 0, 4)]))
    monkeypatch.delenv("TORCHELASTIC_USE_AGENT_STORE", raising=False)
    assert fresh_store(None) is store, "mpirun, or torchrun that lends none"
    environment = dict(USE_AGENT_STORE="True", RESTART_COUNT="1", MAX_RESTARTS="3")
    for name, value in environment.items():
        monkeypatch.setenv(f"TORCHELASTIC_{name}", value)
    monkeypatch.setenv("GROUP_WORLD_SIZE", "1")
    store.set("end", "of the run before")
    assert not fresh_store(None).check(["end"])
    monkeypatch.setenv("GROUP_WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 on all nodes"):
        fresh_store(None)
    monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", "0")
    fresh_store(None)


@LONG
@both_stages
def test_a_node_that_is_lost_and_one_that_joins(stage, start, small_data, first_stage, tmp_path):
    """2 nodes, then 1, then 2 (--nnodes=1:2): the same data in the same order, to 1e-9 in float64."""
    places = places_of(stage, small_data, first_stage, tmp_path)
    args = ("--dtype=float64", "--eval_every=10000", "--save_every=20", "--max_steps=2000", "--lr=1e-5")
    slowly = breaking(stage, "p % 2 == 0", "time.sleep(0.03)")
    command = [*places, *args, "--batch_size=1"]
    nodes = Nodes(tmp_path, stage, command, least=1, per_node=1, max_restarts=5, before=slowly)

    def until(text, times=1):
        end = time.time() + 120
        while nodes.output.count(text) < times:
            assert time.time() < end and nodes.code(0) is None, nodes.output
            time.sleep(0.1)

    try:
        until("step 60,")
        nodes.kill(1)  # node 0 has the store
        until("2 images per step: 1 processes x 1 x 2 accumulated")
        nodes.add()
        until("2 images per step: 2 processes x 1 x 1 accumulated", 2)
        codes = nodes.wait(400)
    finally:
        nodes.kill()
    assert codes[0] == codes[2] == 0, nodes.output
    one = start(stage, *args, "--batch_size=2")
    assert one.wait(400) == [0]
    assert_same(read(tmp_path / "out/latest.safetensors")[0], one.checkpoint[0], 1e-9)
    losses = [[json.loads(line)["loss"] for line in open(f"{out}/log.jsonl")] for out in (tmp_path / "out", one.out)]
    assert losses[0][:2000] == pytest.approx(losses[1][:2000], rel=1e-8)
