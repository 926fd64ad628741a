"""Watches the processes of a run: says which of them hangs, fails or is slow, and ends all, so that torchrun restarts.

    dist.init_process_group(store=fresh_store(timeout), rank=rank, world_size=world, ...)
    watch = Watch(rank, world, hang_timeout)
    watch.at("reading data", step)            # what the main thread does from here on
    watch.progress()                          # it gets on with that

A thread of every process puts where it stands into the store in which the process group met, over a connection of its
own, and reads where the others stand. A training step does not wait for it: at() sets a few attributes. It has a file
to itself because no line of it says anything about training.
"""

import faulthandler
import json
import os
import platform
import statistics
import sys
import threading
import time

import torch.distributed as dist


def fresh_store(timeout):
    """The store in which the processes meet, without what those before a restart have left in it.

    torchrun lends all restarts the same one, where they would find addresses of the dead. ValueError where it is to
    restart several nodes so: each counts its own restarts.
    """
    store, _, _ = next(dist.rendezvous("env://", timeout=timeout))
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":  # rank 0 has just made it
        return store
    if os.environ["GROUP_WORLD_SIZE"] != "1" and os.environ["TORCHELASTIC_MAX_RESTARTS"] != "0":
        remedy = "set TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 on all nodes, with --rdzv_backend=c10d"
        raise ValueError(f"torchrun's --max_restarts on several nodes needs a new store at each restart: {remedy}")
    return dist.PrefixStore(f"restart {os.environ['TORCHELASTIC_RESTART_COUNT']}", store)


def hanging(reports, limit):
    """The ranks that all others wait for, if they have been still for more than limit seconds, else [].

    Those are the ones that have begun the fewest things: every rank begins the same ones in the same order.
    """
    fewest = min(report["begun"] for report in reports)
    behind = [rank for rank, report in enumerate(reports) if report["begun"] == fewest]
    return behind if all(reports[rank]["still"] > limit for rank in behind) else []


def describe(reports, behind, limit):
    """hanging()'s answer in words."""
    lines = [
        f"rank {rank} ({reports[rank]['name']}) has made no progress for {reports[rank]['still'] / 60:.3g} min: "
        f"{reports[rank]['phase']}, step {reports[rank]['step']}"
        + ", when last heard of: it was stopped, or its node is lost"
        * (reports[rank]["silent"] > 0.5 * limit)
        for rank in behind[:4]
    ]
    rest, more = len(reports) - len(behind), len(behind) - 4
    lines += [f"and {more} more like it"] * (more > 0)
    last = f"the other {rest} {'wait' if rest > 1 else 'waits'} for it" if rest else "no rank is behind the others"
    return "; ".join([*lines, last])


def slow_reader(reports, before, seconds):
    """A sentence on the rank that waited for data much longer than the others in these seconds, or ""."""
    waits = [report["reading"] - old["reading"] for report, old in zip(reports, before)]
    worst, usual = max(waits), statistics.median_low(waits)
    if worst < 0.1 * seconds or worst < 2 * usual:
        return ""
    rank = waits.index(worst)
    return (
        f"rank {rank} ({reports[rank]['name']}) waited for data in {worst / seconds:.0%} of the last "
        f"{seconds / 60:.3g} min, others in {usual / seconds:.0%}: look at its disk, or raise workers"
    )


class Watch:
    """rank, world: of the process group.  minutes: without progress before the run ends.  One process has no thread."""

    def __init__(self, rank, world, minutes):
        self.rank, self.world, self.limit = rank, world, 60 * minutes
        self.tick = min(10.0, self.limit / 20)  # seconds between looks
        self.begun, self.phase, self.step, self.spent = 0, "starting", 0, {}
        self.since = self.moved = time.monotonic()
        self.name = f"{platform.node()}, process {os.getpid()}"
        self.over, self.thread = threading.Event(), None
        if world > 1:
            # a clone is a connection of its own: a request that waits on the first one does not hold it up
            self.store = dist.PrefixStore("watch", dist.distributed_c10d._get_default_store().clone())
            self.usual_hook, sys.excepthook = sys.excepthook, self.excepthook
            self.tell()  # the others know of this rank, whatever stops it
            self.answers = 0
            self.thread = threading.Thread(target=self.look, daemon=True)
            self.thread.start()
            threading.Thread(target=self.guard, daemon=True).start()

    def at(self, phase, step=None):
        """The main thread begins something; every rank must say the same things in the same order."""
        now = time.monotonic()
        self.spent[self.phase] = self.spent.get(self.phase, 0.0) + now - self.since
        self.begun, self.phase, self.step = self.begun + 1, phase, self.step if step is None else step
        self.since = self.moved = now

    def progress(self, *_):
        """Also as a forward hook: every batch that a network sees is progress."""
        self.moved = time.monotonic()

    def stop(self):
        """Before the process group is destroyed, or the process ends."""
        self.over.set()
        if self.thread:
            self.thread.join(timeout=10)

    def end(self, text, behind=()):
        """All processes are to end because of text; the first reason given is the one that counts, and is returned."""
        return json.loads(self.store.compare_set("end", "", json.dumps([text, self.rank, list(behind)])))

    def excepthook(self, kind, error, trace):
        """An error here is told to the others, of whom one may have been first: then this is but its echo."""
        self.over.set()  # what follows is said here, not by the thread
        try:
            line = str(error).strip().rsplit("\n", 1)[-1]
            first, by, _ = self.end(f"rank {self.rank} ({self.name}) failed: {line or kind.__name__}")
        except Exception:  # the store's process has died
            by = self.rank
        if by != self.rank and issubclass(kind, RuntimeError):  # as a collective says whose other end is gone
            self.say(first)
        else:
            self.usual_hook(kind, error, trace)
        self.stop()

    def tell(self):
        now = time.monotonic()
        reading = self.spent.get("reading data", 0.0) + (now - self.since) * (self.phase == "reading data")
        mine = dict(begun=self.begun, phase=self.phase, step=self.step, still=now - self.moved)
        self.store.set(str(self.rank), json.dumps(mine | {"reading": reading, "name": self.name}))

    def look(self):
        seen, told, before = {}, time.monotonic(), None
        while not self.over.wait(self.tick):
            now = time.monotonic()
            try:
                self.tell()
                ended = self.store.check(["end"])
                keys = [str(rank) for rank in range(self.world)]
                reports = [*map(json.loads, self.store.multi_get(keys))] if self.store.check(keys) else []
                for rank, report in enumerate(reports):
                    if seen.get(rank, (None, 0))[0] != report:
                        seen[rank] = (dict(report), now)
                    report["silent"] = now - seen[rank][1]
                    report["still"] += report["silent"]  # by its own clock and by this one: they may differ
                behind = hanging(reports, self.limit) if reports else []
                if behind:
                    self.end(describe(reports, behind, self.limit), behind)
                if (behind or ended) and not self.over.is_set():
                    self.finish(*self.end(""))
                self.answers += 1
            except (RuntimeError, OSError):  # the store has gone with its process: at the end, or for ever
                continue
            if self.rank == 0 and reports and now - told > 600:
                text = slow_reader(reports, before, now - told) if before else ""
                print(text, flush=True) if text else None
                told, before = now, reports
            before = before or reports

    def guard(self):
        """Ends this process when look() gets no answer: where the store's process was stopped it waits for ever."""
        before, silent = 0, 0
        while not self.over.wait(self.tick):
            before, silent = self.answers, silent + 1 if self.answers == before else 0
            if silent * self.tick > self.limit:  # looks are counted: a clock goes on while this process is stopped
                print(
                    f"rank {self.rank} ({self.name}): the process group's store is silent or gone: what keeps it, "
                    f"rank 0 or torchrun on the first node, was stopped or has died, or its node is lost",
                    file=sys.stderr,
                    flush=True,
                )
                os._exit(1)

    def say(self, text):
        """Why all end, in one line of one rank."""
        try:
            is_first = self.store.add("told", 1) == 1
        except (RuntimeError, OSError):
            is_first = True
        if is_first:
            print(f"{os.path.basename(sys.argv[0])}: {text}", file=sys.stderr, flush=True)

    def finish(self, text, by, behind):
        """Ends this process: those that hang show where, one rank says why, and all had time to do so."""
        if self.rank in behind:
            print(f"rank {self.rank} hangs here:", file=sys.stderr, flush=True)
            faulthandler.dump_traceback(all_threads=True)
        self.say(text)
        if not self.over.wait(3 * self.tick):  # the main thread may end by itself
            os._exit(1)
