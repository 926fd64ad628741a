import base64
import io
import json
import re
import shutil
import subprocess
import sys
import zlib
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageFilter

from data.dataset import Dataset
from data.shapes import prepare as shapes
from text import SPLIT_PATTERN

ROOT = Path(__file__).resolve().parent.parent
SCRIPT = ["data/shapes/prepare.py"]
SMALL = ["--n_train=1500", "--n_val=60"]


def run(*args):
    return subprocess.run([sys.executable, *SCRIPT, *map(str, args)], cwd=ROOT, capture_output=True, text=True)


@pytest.fixture(scope="module")
def pictures():
    images, captions = shapes.make_split("val", 500, 64, seed=0)[:2]
    return images, captions


@pytest.fixture(scope="module")
def readings(pictures):
    return [shapes.read(image) for image in pictures[0]]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shapes")
    result = run(*SMALL, f"--out_dir={folder}")
    assert result.returncode == 0, result.stderr
    return folder


def read_captions(folder):
    return [json.loads(line)["text"] for line in (folder / "captions.jsonl").read_text().splitlines()]


# -- captions and combinations


def test_every_caption_parses_to_what_made_it():
    for scene in shapes.combinations():
        assert tuple(shapes.parse(shapes.caption(*scene)).values()) == scene
    assert shapes.parse("A  small RED star on a Blue background ")["shape"] == "star"
    for text in (
        "",
        "a red star",
        "a small red star on a blue background, please",
        "a small pink star on a red background",
    ):
        assert shapes.parse(text) is None


def test_a_tenth_is_held_out_and_everything_still_occurs():
    held = shapes.held_out(0)
    assert len(held) == 39 and held != shapes.held_out(1)
    assert len({(color, background) for _, color, background in held}) == 39  # no pair of colors twice
    for column, most in ((0, 6), (1, 7), (2, 7)):
        assert max(Counter(row[column] for row in held).values()) <= most  # of 56, 49, 49
    assert len(shapes.combinations()) == 2 * (392 - 39)


def test_held_out_combinations_are_in_neither_split(made):
    for split, n in (("train", 1500), ("val", 60)):
        captions = read_captions(made / split)
        assert len(captions) == n and all(len(texts) == 1 for texts in captions)
        for (text,) in captions:
            scene = shapes.parse(text)
            assert not shapes.is_held_out(scene["shape"], scene["color"], scene["background"])
            assert scene["color"] != scene["background"]


# -- files


def test_files_have_the_common_form(made):
    for split, n in (("train", 1500), ("val", 60)):
        images, labels = np.load(made / split / "images.npy"), np.load(made / split / "labels.npy")
        assert images.shape == (n, 64, 64, 3) and images.dtype == np.uint8 and labels.shape == (n,)
        classes = json.loads((made / "classes.json").read_text())
        named = [shapes.parse(text)["shape"] for (text,) in read_captions(made / split)]
        assert [classes[label] for label in labels] == named
        assert json.loads((made / split / "meta.json").read_text())["count"] == n
    assert Image.open(made / "sheet.png").size == (8 * 132, 5 * 160)
    assert not list(made.rglob("*.tmp"))


def test_picture_depends_on_seed_split_and_index_only():
    made = shapes.make_split("train", 20, 64, seed=3)
    again, fewer = shapes.make_split("train", 20, 64, seed=3), shapes.make_split("train", 7, 64, seed=3)
    for one, other, short in zip(made, again, fewer, strict=True):
        assert np.array_equal(one, other) and np.array_equal(one[:7], short)
    captions = made[1]
    for other in (shapes.make_split("val", 20, 64, seed=3), shapes.make_split("train", 20, 64, seed=4)):
        assert captions != other[1]


def test_pictures_are_those_of_the_log():
    """Numbers in LOG.md hold for these very pictures, so they must not change."""
    images, captions = shapes.make_split("val", 100, 64, seed=0)[:2]
    assert zlib.crc32("\n".join(captions).encode()) == 190813147
    mean = [129.1575, 131.3972, 136.1592]
    assert images.mean((0, 1, 2)).tolist() == pytest.approx(mean, abs=2e-3)  # a cosine may differ by machine


def test_maps_and_boxes_are_where_the_shapes_are(made):
    train = Dataset(made, "train", 64)
    assert train.has_maps and train.map_names == ["background", *shapes.SHAPES] and train.has_objects
    assert len(train.object_classes) == 56
    colors = {name: torch.tensor(value) / 127.5 - 1 for name, value in shapes.PALETTE.items()}
    for i in range(0, 1500, 50):
        item, classes, boxes = train[i], train.map(i), train.boxes(i)
        scene = shapes.parse(item["text"][0])
        inside = classes > 0
        assert classes[inside].unique().tolist() == [item["label"] + 1]
        to_shape, to_background = (
            (item["image"] - colors[scene[what]][:, None, None]).norm(dim=0) for what in ("color", "background")
        )  # on the outline the brightness jitter may tell otherwise
        assert ((to_shape < to_background) == inside).float().mean() > 0.985
        ((name, x0, y0, x1, y1),) = boxes
        rows, columns = inside.nonzero(as_tuple=True)
        assert name == f"{scene['color']} {scene['shape']}"
        assert [64 * v for v in (x0, y0, x1, y1)] == [
            columns.min().item(),
            rows.min().item(),
            columns.max().item() + 1,
            rows.max().item() + 1,
        ]


def test_a_folder_of_an_older_form_is_made_anew(made, tmp_path):
    copy = tmp_path / "shapes"
    shutil.copytree(made, copy)
    for split in ("train", "val"):
        (copy / split / "maps.npy").unlink()
        meta = json.loads((copy / split / "meta.json").read_text())
        del meta["map_classes"]
        (copy / split / "meta.json").write_text(json.dumps(meta))
    assert "already there" not in run(*SMALL, f"--out_dir={copy}").stdout
    assert np.array_equal(np.load(copy / "val/maps.npy"), np.load(made / "val/maps.npy"))


def test_rerun_makes_only_what_is_missing_or_different(made, tmp_path):
    copy = tmp_path / "shapes"
    shutil.copytree(made, copy)
    before = {path.name: path.read_bytes() for path in copy.iterdir() if path.is_file()}
    assert run(*SMALL, f"--out_dir={copy}").stdout.count("already there") == 2
    changed = run("--n_train=1500", "--n_val=50", f"--out_dir={copy}").stdout
    assert changed.count("already there") == 1 and "val: 50 pictures" in changed
    (copy / "train" / "meta.json").unlink()  # as after a crash
    (copy / "bpe.tiktoken").unlink()
    assert "train: 1500 pictures" in run("--n_train=1500", "--n_val=50", f"--out_dir={copy}").stdout
    assert {path.name: path.read_bytes() for path in copy.iterdir() if path.is_file()} == before


def test_prompts_are_three_seen_then_one_held_out(made):
    prompts = (made / "prompts.txt").read_text().splitlines()
    assert len(prompts) == len(set(prompts)) == 256
    trained = {text for (text,) in read_captions(made / "train")}
    for k, text in enumerate(prompts):
        scene = shapes.parse(text)
        is_held = shapes.is_held_out(scene["shape"], scene["color"], scene["background"])
        assert is_held == (k % 4 == 3) and (text in trained) == (k % 4 != 3)


@pytest.mark.parametrize(
    "wrong, said", [("--n_train=0", "n_train=0"), ("--vocab_size=99", "256"), ("--size=8", "size=8")]
)
def test_wrong_settings_are_one_line(wrong, said, tmp_path):
    result = run("--n_train=9", "--n_val=9", f"--out_dir={tmp_path}", wrong)
    assert result.returncode != 0 and said in result.stderr and result.stderr.count("\n") == 1


# -- tokenizer


@pytest.fixture(scope="module")
def encoding(made):
    tiktoken = pytest.importorskip("tiktoken")
    pairs = [line.split() for line in (made / "bpe.tiktoken").read_text().splitlines()]
    ranks = {base64.b64decode(token): int(rank) for token, rank in pairs}
    return tiktoken.Encoding("shapes", pat_str=SPLIT_PATTERN, mergeable_ranks=ranks, special_tokens={})


def test_each_caption_word_is_one_token(encoding):
    for scene in shapes.combinations()[::7]:
        text = shapes.caption(*scene)
        tokens = encoding.encode(text)
        assert len(tokens) == len(text.split()) == 8 and encoding.decode(tokens) == text
    assert encoding.n_vocab <= 512


def test_any_text_survives_the_tokenizer(encoding):
    for text in ("", "It's 3 o'clock,\n\n  señor! 你好 🙂\t", "".join(map(chr, range(300)))):
        assert encoding.decode(encoding.encode(text)) == text


def test_training_splits_text_as_tiktoken_will():
    """Trained on one text only, each piece of the trainer's split is a token, and tiktoken finds the same pieces."""
    tiktoken = pytest.importorskip("tiktoken")
    text = "It's  42 over-long words, isn't it?  \n yes"
    table = shapes.train_bpe([text] * 50, 512)
    ranks = {base64.b64decode(line.split()[0]): int(line.split()[1]) for line in table.splitlines()}
    assert list(ranks.values()) == list(range(len(ranks))) and list(ranks)[:256] == [bytes([b]) for b in range(256)]
    trained = tiktoken.Encoding("t", pat_str=SPLIT_PATTERN, mergeable_ranks=ranks, special_tokens={})
    pieces = ["It", "'s", " ", " 42", " over", "-", "long", " words", ",", " isn", "'t", " it", "?", "  \n", " yes"]
    assert [trained.decode([token]) for token in trained.encode(text)] == pieces


def test_tokenizer_is_the_same_each_time(made):
    captions = [text for (text,) in read_captions(made / "train")]  # here in another process than that which made it
    assert shapes.train_bpe(captions, 512) == (made / "bpe.tiktoken").read_text()


# -- judge


def test_judge_is_right_on_real_pictures(pictures, readings):
    right = [got == shapes.parse(text) for got, text in zip(readings, pictures[1])]
    assert np.mean(right) >= 0.99


def test_judge_is_right_on_held_out_combinations_and_at_other_sizes():
    held = sorted(shapes.held_out())
    for side, (shape, color, background), size in zip((64, 32, 96) * 5, held, ("small", "large") * 8):
        mask = shapes.draw_mask(shape, side * 0.45, side * 0.52, side * shapes.RADII[size], side)[0][..., None]
        picture = mask * shapes.PALETTE[color] + (1 - mask) * shapes.PALETTE[background]
        text = shapes.caption(size, color, shape, background)
        assert shapes.judge(picture.astype(np.uint8), text), (side, text)


def test_judge_rejects_shuffled_captions(pictures, readings):
    shuffled = np.random.default_rng(0).permutation(pictures[1])
    assert np.mean([got == shapes.parse(text) for got, text in zip(readings, shuffled)]) <= 0.02


@pytest.mark.parametrize("attribute", shapes.ATTRIBUTES)
def test_judge_rejects_one_wrong_word(pictures, attribute):
    image, text = pictures[0][0], pictures[1][0]
    scene = shapes.parse(text)
    choices = dict(size=shapes.RADII, color=shapes.PALETTE, shape=shapes.SHAPES, background=shapes.PALETTE)[attribute]
    assert shapes.judge(image, text) and shapes.judge(Image.fromarray(image), text.upper())
    for word in set(choices) - {scene[attribute]}:
        assert not shapes.judge(image, shapes.caption(**(scene | {attribute: word})))


def by_pil(change):
    return lambda image: np.asarray(change(Image.fromarray(image)))


def as_jpeg(image, quality):
    file = io.BytesIO()
    image.save(file, "JPEG", quality=quality)
    return Image.open(file)


def add_noise(image):
    noise = np.random.default_rng(int(image.sum())).normal(0, 13, image.shape)
    return np.clip(image + noise, 0, 255).astype(np.uint8)


DEGRADATIONS = {
    "blur": by_pil(lambda image: image.filter(ImageFilter.GaussianBlur(1.8))),
    "noise": add_noise,
    "jpeg": by_pil(lambda image: as_jpeg(image, 20)),
    "down-up": by_pil(lambda image: image.resize((16, 16), Image.BOX).resize((64, 64), Image.BICUBIC)),
}


@pytest.mark.parametrize("name", DEGRADATIONS)
def test_judge_is_right_on_degraded_pictures(name, pictures):
    images, captions = pictures[0][:150], pictures[1][:150]
    degraded = np.stack([DEGRADATIONS[name](image) for image in images])
    squared = ((degraded.astype(np.float64) - images) ** 2).mean((1, 2, 3))
    assert 25 < np.mean(10 * np.log10(255**2 / squared)) < 28
    assert shapes.accuracy(degraded, captions) >= 0.99


def blob(inside, color=(215, 40, 40), background=(240, 240, 240)):
    return np.where(inside[..., None], np.uint8(color), np.uint8(background))


def test_judge_sees_nothing_where_nothing_is():
    rng = np.random.default_rng(0)
    noise = [rng.integers(0, 256, (64, 64, 3), dtype=np.uint8) for _ in range(10)]
    blank = [np.full((64, 64, 3), value, dtype=np.uint8) for value in shapes.PALETTE.values()]
    ramp = np.broadcast_to(np.linspace(0, 255, 64).astype(np.uint8)[:, None], (64, 64, 3))
    for picture in (*noise, *blank, ramp):
        found = shapes.read(picture)
        assert found["shape"] is found["color"] is found["size"] is None
    assert [shapes.read(picture)["background"] for picture in blank] == list(shapes.PALETTE)


def test_judge_rejects_what_is_not_one_clean_shape():
    y, x = np.mgrid[:64, :64] - 31.5
    disc = np.hypot(x, y) < 22
    assert shapes.read(blob(disc)) == dict(size="large", color="red", shape="circle", background="white")
    strange = {
        "two alike": (np.hypot(x - 16, y) < 11) | (np.hypot(x + 16, y) < 11),
        "large and small": (np.hypot(x - 10, y - 10) < 18.5) | (np.hypot(x + 21, y + 21) < 10),
        "a dot beside it": disc | (np.hypot(x - 22, y - 22) < 4),
        "wide ellipse": (x / 18) ** 2 + (y / 12) ** 2 < 1,
        "bar": (abs(x) < 20) & (abs(y) < 5),
        "half a disc": disc & (y < 0),
        "crescent": disc & (np.hypot(x - 8, y) > 14),
        "corner": (np.maximum(abs(x), abs(y)) < 16) & ~((x > -5) & (y < 5)),
        "frame": (np.maximum(abs(x), abs(y)) < 17) & (np.maximum(abs(x), abs(y)) > 10),
        "cut in halves": x > 0,
    }
    for name, inside in strange.items():
        assert shapes.read(blob(inside))["shape"] is None, name
    second = blob(disc)
    second[np.hypot(x + 22, y + 22) < 9] = shapes.PALETTE["green"]
    assert shapes.read(second)["shape"] is None
    middle = shapes.read(blob(np.hypot(x, y) < 64 * 0.325))  # between small and large
    assert middle["shape"] == "circle" and middle["size"] is None


def test_judge_refuses_what_it_cannot_read():
    for picture in (np.zeros((64, 32, 3), np.uint8), np.zeros((64, 64)), np.zeros((64, 64, 3))):
        with pytest.raises(ValueError, match="is \\(S, S, 3\\) uint8"):
            shapes.read(picture)
    with pytest.raises(ValueError, match="'a cat' is no caption"):
        shapes.judge(np.zeros((64, 64, 3), np.uint8), "a cat")


# -- score


def write_samples(folder, images, prompts):
    folder.mkdir()
    names = [f"{k:05d}.png" for k in range(len(images))]
    for name, image in zip(names, images):
        Image.fromarray(image).save(folder / name)
    records = [dict(file=name, prompt=prompt) for name, prompt in zip(names, prompts)]
    (folder / "samples.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return records


def percentages(text):
    return {
        name: float(value) for name, value in re.findall(r"^ *(\S.*?) (\d+\.\d) % \(\d+ of \d+\)$", text, re.MULTILINE)
    }


def test_score_of_true_and_of_shuffled_pictures(pictures, tmp_path):
    images, captions = pictures[0][:64], pictures[1][:64]
    shape, color, background = sorted(shapes.held_out())[0]
    mask = shapes.draw_mask(shape, 32, 32, 16.6, 64)[0][..., None]
    unseen = (mask * shapes.PALETTE[color] + (1 - mask) * shapes.PALETTE[background]).astype(np.uint8)
    images, captions = [*images, unseen], [*captions, shapes.caption("small", color, shape, background)]
    write_samples(tmp_path / "true", images, captions)
    result = run(f"--score={tmp_path / 'true'}")
    assert result.returncode == 0 and result.stdout.startswith("prompt score 100.0 % (65 of 65)\n")
    assert "seen combinations 100.0 % (64 of 64)" in result.stdout
    assert "held-out combinations 100.0 % (1 of 1)" in result.stdout
    assert set(percentages(result.stdout).values()) == {100.0} and len(percentages(result.stdout)) == 7
    write_samples(tmp_path / "shuffled", images, np.roll(captions, 1).tolist())
    result = run(f"--score={tmp_path / 'shuffled'}")
    parts = percentages(result.stdout)
    assert result.returncode == 0 and parts["prompt score"] <= 5
    assert 20 < parts["size"] < 80 and parts["shape"] < 40 and parts["color"] < 40 and parts["background"] < 40


def test_score_names_what_it_cannot_score(pictures, tmp_path):
    result = run(f"--score={tmp_path / 'nowhere'}")
    assert result.returncode == 1 and "nowhere/samples.jsonl is missing" in result.stderr
    folder = tmp_path / "samples"
    records = write_samples(folder, pictures[0][:4], ["a cat", *pictures[1][1:4]])
    (folder / records[1]["file"]).unlink()
    (folder / records[2]["file"]).write_bytes(b"not a picture")
    result = run(f"--score={folder}")
    assert result.returncode == 1 and "(1 of 1)" in result.stdout and "3 of 4 samples" in result.stderr
    assert "'a cat'" in result.stderr and "00001.png" in result.stderr and "00002.png" in result.stderr
    assert result.stderr.count("\n") == 1
    (folder / "samples.jsonl").write_text('{"file": "00003.png"}\nnot json\n[1]\n')
    assert "3 of 3 samples" in run(f"--score={folder}").stderr
    (folder / "samples.jsonl").write_text("")
    assert run(f"--score={folder}").returncode == 1
