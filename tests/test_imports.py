"""The rooms import each other one way only."""

import ast
import graphlib

from conftest import ROOT

GROUND = ("configurator", "checkpoint", "attention", "conv", "diffusion", "metrics", "grid")  # import none of ours
STAND_ON = dict.fromkeys(GROUND, ()) | {"convert": ("checkpoint", "diffusion"), "common": GROUND}
STAND_ON |= {"vae": (*GROUND, "convert"), "text": (*GROUND, "convert"), "unet": (*GROUND, "convert", "text")}


def name_of(path):
    return ".".join(path.relative_to(ROOT).with_suffix("").parts)


ROOMS = {name_of(path): path for path in [*ROOT.glob("*.py"), *ROOT.glob("data/*.py")]}


def imported(name, everywhere=True):
    """The rooms that a room imports: everywhere, or outside of functions and of its main block."""
    tree, found = ast.parse(ROOMS[name].read_text()), set()
    for node in ast.walk(tree) if everywhere else tree.body:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return found & ROOMS.keys()


def test_the_lower_rooms_stand_on_few():
    for name, below in STAND_ON.items():
        assert imported(name, everywhere=False) <= set(below), name


def test_no_circle():
    graphlib.TopologicalSorter({name: imported(name) for name in ROOMS}).prepare()
