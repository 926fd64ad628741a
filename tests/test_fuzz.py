"""A few of the hostile files of tests/fuzz.py, the same ones each time; and each one that once did harm."""

import errno
import gzip
import io
import json
import os
import re
import subprocess
import sys
import tarfile
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import ROOT, read
from PIL import Image
from safetensors.torch import save_file

import convert
import fid
import lpips_train
import sample
import train_ldm
import train_vae
from configurator import SettingError, parse
from data import prepare
from data.celeba import prepare as celeba
from data.dataset import BadImage, Dataset, read_classes
from data.laion400m.prepare import lost_links
from data.openimages import prepare as openimages
from text import CLIPTokenizer, LayoutTokenizer, make_tokenizer
from vae import VAE


def says(wanted, call, *args, kind=ValueError):
    """The call raises an error of this very kind, of one line that matches."""
    with pytest.raises(kind) as caught:
        call(*args)
    assert "\n" not in str(caught.value) and re.search(wanted, str(caught.value)), str(caught.value)
    assert type(caught.value) in (kind, BadImage)


def png(path):
    Image.fromarray(np.arange(48, dtype=np.uint8).reshape(4, 4, 3)).save(path)


def test_hostile_files_do_no_harm():
    command = [sys.executable, str(ROOT / "tests/fuzz.py"), "--seconds=0", "--examples=10"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert "100 examples, 0 failures" in done.stdout


def test_nothing_is_unpickled_that_could_run():
    """Every torch.load is weights_only, no np.load takes pickles; pickle itself is not used."""
    for path in [*ROOT.glob("*.py"), *ROOT.glob("data/**/*.py")]:
        text = path.read_text()
        assert not re.search(r"weights_only\s*=\s*False|allow_pickle\s*=\s*True|pickle\.loads?\(", text), path
        assert not re.search(r"\b(eval|exec)\(", text.replace(".eval()", "")), path
        for call in re.findall(r"(?:torch\.load|load_state_dict_from_url)\(.*\)", text):
            assert "weights_only=True" in call, (path, call)


# -- json --


@pytest.mark.parametrize("content", ("[" * 100_000, '{"text": ' + "[" * 3000 + "]" * 3000 + "}"))
def test_json_that_nests_too_deep(content, tmp_path):
    png(tmp_path / "a.png")
    (tmp_path / "metadata.jsonl").write_text(content)
    says("metadata.jsonl line 1 is not JSON", Dataset, tmp_path)
    says("metadata.jsonl is not JSON", read_classes, tmp_path / "metadata.jsonl")
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        tar.add(tmp_path / "a.png", "x.png")
        tar.add(tmp_path / "metadata.jsonl", "x.json")
    says("a/x: its caption does not read", Dataset(tmp_path / "a.tar", "all").meta, 0, kind=BadImage)
    (tmp_path / "stats").mkdir()
    (tmp_path / "stats/0_stats.json").write_text(content)
    assert lost_links(str(tmp_path / "stats"))["links"] == 0
    says("does not read", LayoutTokenizer.from_json, content)


def test_classes_that_are_no_names(tmp_path):
    path = tmp_path / "classes.json"
    path.write_text(json.dumps({"9" * 30: "a", "²": "b", "1": "c"}))
    assert read_classes(path) == ["0", "c"]
    path.write_text(json.dumps({"999999999": "a"}))
    says("names 1 classes up to number 999999999", read_classes, path)
    path.write_bytes(b"\xff\xfe")
    says("classes.json is not JSON", read_classes, path)
    (tmp_path / "0_stats.json").write_text('{"count": "x", "status_dict": 3, "successes": 2}')
    assert lost_links(str(tmp_path))["images"] == 2


def test_no_file_outside_the_folder_is_read(tmp_path):
    folder, secret = tmp_path / "data", tmp_path / "secret.png"
    folder.mkdir()
    png(secret)
    png(folder / "a.png")
    lines = [{"file_name": name, "text": "x"} for name in ("a.png", "../secret.png", str(secret))]
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)))
    assert [Dataset(folder, "all").meta(i)["key"] for i in range(len(Dataset(folder, "all")))] == ["a.png"]
    os.remove(folder / "a.png")
    with tarfile.open(folder / "a.tar", "w") as tar:
        for name, kind in (("../secret.png", tarfile.SYMTYPE), ("b.png", tarfile.LNKTYPE), ("c.png", tarfile.SYMTYPE)):
            member = tarfile.TarInfo(name)
            member.type, member.linkname = kind, str(secret)
            tar.addfile(member)
        member = tarfile.TarInfo("../../secret.png")
        member.size = 3
        tar.addfile(member, io.BytesIO(b"bad"))
    says("not an image", Dataset(folder, "all").__getitem__, 0, kind=BadImage)
    assert len(Dataset(folder, "all")) == 1


# -- shards --


def test_a_member_that_ends_beyond_the_file(tmp_path):
    png(tmp_path / "a.png")
    with tarfile.open(tmp_path / "a.tar", "w", format=tarfile.GNU_FORMAT) as tar:
        tar.add(tmp_path / "a.png", "x.png")
    member = tarfile.TarInfo("x.json")
    member.size = 2**42
    content = (tmp_path / "a.tar").read_bytes()[: 512 + 512 * -(-os.path.getsize(tmp_path / "a.png") // 512)]
    (tmp_path / "a.tar").write_bytes(content + member.tobuf(tarfile.GNU_FORMAT))
    assert Dataset(tmp_path / "a.tar", "all").meta(0)["text"] == []
    assert [list(sample) for _, sample in prepare.tar_samples(str(tmp_path / "a.tar"))] == [[".png"]]


@pytest.fixture
def table(tmp_path):
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    png(tmp_path / "a.png")
    cells = [{"bytes": (tmp_path / "a.png").read_bytes()}] * 4
    os.remove(tmp_path / "a.png")

    def table(metadata=None, **columns):
        made = pa.table({"image": cells, "label": [0, 1, 0, 1], "text": ["a"] * 4} | columns)
        pq.write_table(made.replace_schema_metadata(metadata), tmp_path / "a.parquet", compression="none")
        return str(tmp_path / "a.parquet")

    return table


@pytest.mark.parametrize("told", ("[" * 100_000, "[1]", '{"info": [1]}', '{"info": {"features": {"label": 3}}}'))
def test_parquet_whose_schema_tells_nonsense(told, table):
    path = table({"huggingface": told})
    assert Dataset(path, "all").classes == [] and prepare.parquet_names(path, "label") == []


def test_parquet_without_bytes_or_with_damaged_pages(table, tmp_path):
    path = table(image=[{"path": "../secret.png"}] * 4)
    assert [image() for _, image, _ in prepare.parquet_rows(path, ("image",), ["text"])] == [b""] * 4
    path = Path(table())
    content = path.read_bytes()
    for at in range(4, len(content) - 400, 7):  # pages, not the footer
        path.write_bytes(content[:at] + bytes([content[at] ^ 0xFF]) * 3 + content[at + 3 :])
        try:
            ds = Dataset(path, "all", 4)
            for i in range(4):
                try:
                    ds[i]
                except BadImage as e:
                    assert "\n" not in str(e)
            list(prepare.parquet_rows(str(path), ("image",), ["text"]))
        except ValueError as e:
            assert "\n" not in str(e) and "a.parquet" in str(e)


def test_arrays_that_are_none(tmp_path):
    header = "{'descr': '|u1', 'fortran_order': False, 'shape': (0, 4, 4, 3), }"
    bad = [
        header.replace("(0,", "(2,"),
        header.replace("(0,", "(-1,"),
        "(" * 60_000,
        header.replace("|u1", "|O"),
    ]
    for text in bad:
        content = b"\x93NUMPY\2\0" + len(text).to_bytes(4, "little") + text.encode()
        (tmp_path / "images.npy").write_bytes(content)
        says("images.npy does not load as .npy", Dataset, tmp_path)
    np.savez(tmp_path / "a.npz", a=np.zeros(3))
    os.rename(tmp_path / "a.npz", tmp_path / "images.npy")
    says("images.npy does not load as .npy .it is an .npz", Dataset, tmp_path)
    folder = tmp_path / "2afc/val/x"
    folder.mkdir(parents=True)
    for images, judge in ((np.zeros((2, 3, 4, 4)), np.zeros(2)), (np.zeros((2, 3, 4, 4, 3), "u1"), np.zeros(()))):
        np.save(folder / "images.npy", images)
        np.save(folder / "judge.npy", judge)
        says("run data/bapps/prepare.py again", lpips_train.Judgements, str(tmp_path), "2afc", "val")
    (tmp_path / "b.npz").write_bytes(b"PK\3\4")
    says("b.npz does not load as .npz", fid.open_pictures, str(tmp_path / "b.npz"), "samples", 4)


def test_lists_of_published_sets_that_do_not_read(tmp_path):
    path = tmp_path / "detections.csv"
    head = "ImageID,LabelName,XMin,YMin,XMax,YMax\n"
    for line in ("a,/m/1,x,0,1,1", "a,/m/1,0", '"' + "a" * 200_000, "a,/m/1,0,0,1,\0"):
        path.write_text(head + line)
        says("detections.csv does not read about line", openimages.read_boxes, str(path), {"a"}, {})
    lines = ['{"image_id": ["a"]}', "[1]", '{"image_id": "a", "caption": 3}', '{"image_id": "a", "caption": " b "}']
    (tmp_path / "captions.jsonl").write_text("\n".join(lines))
    assert openimages.read_captions(str(tmp_path), {"a"}) == {"a": ["b"]}
    (tmp_path / "captions.jsonl").write_text("{")
    says("captions.jsonl line 1 is not JSON", openimages.read_captions, str(tmp_path), {"a"})
    (tmp_path / "attributes.txt").write_bytes(b"\xff\xfe a b\n1.jpg 1")
    says("attributes.txt is not a table", celeba.read_attributes, str(tmp_path / "attributes.txt"))


# -- settings --


@pytest.mark.parametrize(
    "text, name", [("[1," * 5000, "ch"), ("-" * 100_000 + "1", "lr"), ("1" + "0" * 400, "lr"), ("x" * 10**6, "lr")]
)
def test_settings_that_are_no_values(text, name, tmp_path):
    defaults = {"lr": 1.0, "ch": (1, 2)}
    says(f"^{name} wants", parse, [f"--{name}={text}"], defaults, kind=SettingError)
    (tmp_path / "a.py").write_text(f"{name} = {text}")
    says("a.py", parse, [str(tmp_path / "a.py")], defaults, kind=SettingError)
    (tmp_path / "a.py").write_bytes(b"lr = 1\0")
    says("a.py", parse, [str(tmp_path / "a.py")], defaults, kind=SettingError)


# -- checkpoints --


def altered(run, path, change):
    """A copy of a run's checkpoint whose settings were changed, with a checksum to match."""
    tensors, meta = read(Path(run.path, "latest.safetensors"))
    text = change(meta, tensors)
    text = json.dumps(meta) if text is None else text
    save_file(tensors, path, metadata={"latent_diffusion": text, "crc32": str(zlib.crc32(text.encode()))})
    return str(path)


@pytest.mark.parametrize(
    "change",
    [
        lambda meta, tensors: "[1]",
        lambda meta, tensors: "[" * 100_000,
        lambda meta, tensors: "{",
        lambda meta, tensors: meta.update(format=None),
        lambda meta, tensors: meta.update(model=3),
        lambda meta, tensors: meta.update(other=meta.pop("model")),
        lambda meta, tensors: meta["model"].update(ch=10**6),
        lambda meta, tensors: meta["model"].update(num_res_blocks=10**9),
        lambda meta, tensors: meta["model"].update(ch_mult=[1] * 10**5),
        lambda meta, tensors: meta["model"].update(ch={"a": 1}),
        lambda meta, tensors: meta["model"].update(nonsense=1),
        lambda meta, tensors: tensors.update({"ema.decoder.conv_out.bias": torch.zeros(7)}),
        lambda meta, tensors: tensors.update(extra=tensors.pop("ema.decoder.conv_out.bias")),
    ],
)
def test_an_altered_autoencoder(change, runs, tmp_path):
    path = altered(runs["vae"], tmp_path / "latest.safetensors", change)
    says("latest.safetensors|in the file|tensors can be of", VAE.from_pretrained, path)


@pytest.mark.parametrize(
    "change",
    [
        lambda meta, tensors: meta.update(other=meta.pop("classes")),
        lambda meta, tensors: meta["model"].update(unet=None),
        lambda meta, tensors: meta["model"]["unet"].update(channels=10**6),
        lambda meta, tensors: meta["model"]["unet"].update(num_res_blocks=10**9),
        lambda meta, tensors: meta["model"]["text"].update(width=2**19),
        lambda meta, tensors: meta["model"].update(image_size="x"),
        lambda meta, tensors: meta["model"].update(schedule=[]),
        lambda meta, tensors: tensors.update({"text.bpe": torch.zeros(7, dtype=torch.uint8)}),
    ],
)
def test_an_altered_denoiser(change, runs, tmp_path):
    path = altered(runs["text"], tmp_path / "latest.safetensors", change)
    says("", sample.load_pipeline, path)


@pytest.mark.parametrize("script", (train_vae, train_ldm, lpips_train))
@pytest.mark.parametrize("text", ("[1]", "{", "[" * 100_000, "{}", '{"format": 1}'))
def test_a_checkpoint_without_its_settings(script, text, tmp_path):
    path = str(tmp_path / "latest.safetensors")
    crc = str(zlib.crc32(text.encode()))
    save_file({"a": torch.zeros(1)}, path, metadata={"latent_diffusion": text, "crc32": crc})
    says("latest.safetensors is cut short or damaged", script.load_checkpoint, path, "vae")
    says("latest.safetensors", convert.read_checkpoint, path) if text != '{"format": 1}' else None


class Evil:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (self.path, "w")


@pytest.mark.parametrize("zipped", (True, False))
def test_code_in_a_pickle_is_not_run(zipped, tmp_path):
    path, pwned = str(tmp_path / "a.ckpt"), str(tmp_path / "pwned")
    for content in ({"w": torch.zeros(1), "x": Evil(pwned)}, Evil(pwned), [Evil(pwned)]):
        torch.save(content, path, _use_new_zipfile_serialization=zipped)
        says("a.ckpt holds io.open, code that would be run: it is not read", convert.read_tensors, path)
        says("a.ckpt does not load", lpips_train.read_pth, path)
    assert not os.path.exists(pwned)


def test_pickles_that_are_damaged(tmp_path):
    path = tmp_path / "a.ckpt"
    torch.save({"w": torch.zeros(1)}, path, _use_new_zipfile_serialization=False)
    good = path.read_bytes()
    for end in range(0, len(good), 5):
        path.write_bytes(good[:end])
        says("a.ckpt (is no checkpoint, or one cut short|holds)", convert.read_tensors, str(path))
    for content in (b"\x80\x02" + b"(" * 20_000, b"\x80\x02J", b"\x80\x02X\xff\xff\xff\x7f", b"PK\x03\x04"):
        path.write_bytes(content)
        says("a.ckpt", convert.read_tensors, str(path))


# -- text --


def test_merges_and_layouts_that_would_fill_the_memory(tmp_path):
    says("unpack to more than 64 MB", CLIPTokenizer, gzip.compress(b"\0" * 2**27))
    packed = bytearray(gzip.compress(os.urandom(1000) + b"a" * 1000))
    packed[700] ^= 255
    says("CLIP's merges cannot be read", CLIPTokenizer, bytes(packed[:-8]))
    says("layout grid 1000000000", make_tokenizer, 'layout {"names": ["a"], "grid": 1000000000}')


# -- what is not the file's fault --


@pytest.mark.parametrize("lack", (OSError(errno.EMFILE, "Too many open files"), MemoryError()))
def test_a_process_that_lacks_something_drops_no_image(lack, tmp_path, monkeypatch):
    """An image is not called bad, left out of a data set or NaN in a cache because of this process."""
    png(tmp_path / "a.png")
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "a.png", "text": "a"}')
    ds = Dataset(tmp_path, "all", 4)

    def fail(*args, **options):
        raise lack

    monkeypatch.setattr("builtins.open", fail)
    monkeypatch.setattr("time.sleep", lambda seconds: None)  # between tries
    for read_one in (ds.rgb, ds.meta, ds.size, ds._objects):
        says("", read_one, 0, kind=type(lack))
    with pytest.raises(type(lack)):
        prepare.convert(str(tmp_path / "a.png"), {}, dict(size=4, crop="none", quality=90, min_side=1))
