"""A few of the crashes, full disks and kills of tests/faults.py, which tries them all; and the order of writes."""

import json
import os
import subprocess
import sys

import pytest
from helpers import ROOT


def run(*args, timeout=900):
    command = [sys.executable, str(ROOT / "tests/faults.py"), *args]
    done = subprocess.run(command, capture_output=True, text=True, timeout=timeout)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


@pytest.mark.skipif(not os.path.exists("/proc/self/fd"), reason="needs Linux's /proc")
def test_what_was_cut_short_is_made_good():
    out = run("--every=43", "--kinds=points,order,disk", "--targets=prepare,vae,ldm,bulk")
    tried = json.loads(out[out.index("{") : out.index("}") + 1])
    for job in ("prepare", "vae", "ldm", "bulk"):
        assert tried[f"{job}, before"] and tried[f"{job}, after"] and tried[f"{job}, full"]
    assert tried["renames checked for their order"] > 40
    assert any(name.startswith("vae, disk full") for name in tried)
