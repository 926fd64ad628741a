import itertools
import json
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from diffusion import (
    make_denoiser,
    randn,
    sample_times,
    samplers,
)
from metrics import psnr, ssim
from sample import (
    choose_conditions,
    compile_unet,
    decode,
    generate,
    load_pipeline,
    read_prompts,
    round_weights,
    save_grid,
    to_pil,
)


def seeded(seeds):
    return [torch.Generator().manual_seed(seed) for seed in seeds]


# --- the command: drawing ---

CONDITIONS = {
    "text": ["a red star", "", "🌟 twice 🌟", "x" * 2000, "a red star"],
    "class": [0, 3, 1, 3, 2],
    "none": [None] * 5,
    "pixels": [None] * 5,
}


@pytest.fixture(scope="module")
def pipelines(runs):
    return {name: load_pipeline(runs[name].path) for name in CONDITIONS}


@pytest.mark.parametrize("sampler, options", [("ddim", {"eta": 0.6}), ("ddpm", {}), ("heun", {})])
@pytest.mark.parametrize("name", CONDITIONS)
def test_a_picture_depends_on_its_condition_and_seed_alone(pipelines, name, sampler, options):
    def draw(rows, **more):
        conditions, seeds = zip(*[(CONDITIONS[name][i], [7, 8, 9, 10, 7][i]) for i in rows])
        return generate(pipelines[name], list(conditions), seeds, 3, 2.0, sampler, **options, **more)

    together = draw(range(5))
    side = 8 if name == "pixels" else 32
    assert together.shape == (5, 3, side, side) and together.dtype == torch.float32
    assert together.abs().max() <= 1 and (together.abs() < 1).float().mean() > 0.2, "not all is clamped"
    for batch_size in (1, 2, 4):
        torch.testing.assert_close(draw(range(5), batch_size=batch_size), together, rtol=0, atol=1e-5)
    torch.testing.assert_close(draw([3, 1]), together[[3, 1]], rtol=0, atol=1e-5)
    for i, j in itertools.combinations(range(5), 2):
        same = (CONDITIONS[name][i], i % 4) == (CONDITIONS[name][j], j % 4)  # the last has the first one's seed
        assert torch.allclose(together[i], together[j], rtol=0, atol=1e-5) == same, (i, j)


@pytest.mark.parametrize("cfg", [1.0, 2.5])
@pytest.mark.parametrize("name", ["text", "class", "none", "pixels"])
def test_generate_is_its_parts(runs, pipelines, name, cfg):
    """The condition alone at cfg = 1, guidance from the empty prompt or the class after the last one otherwise."""
    run, objective, schedule = runs[name], pipelines[name].objective, pipelines[name].schedule
    cond, null, times = {}, {}, sample_times(3, schedule)
    if name == "text":
        cond, null = ({"context": run.denoiser.text(prompts)} for prompts in (["a", "blue star"], ["", ""]))
    if name == "class":
        cond, null = {"y": torch.tensor([1, 2])}, {"y": torch.tensor([4, 4])}
    x = schedule.sigma(torch.ones(1)) * randn((2, 3, 8, 8), seeded([3, 4]))
    denoise = make_denoiser(run.denoiser.unet, schedule, objective, cond, null, cfg if cond else 1.0)
    expected = samplers["ddim"](denoise, x, times, schedule)
    if run.vae is not None:
        expected = run.vae.decode(run.vae.denormalize(expected))
    conditions = {"text": ["a", "blue star"], "class": [1, 2]}.get(name, [None] * 2)
    got = generate(pipelines[name], conditions, [3, 4], 3, cfg)
    torch.testing.assert_close(got, expected.clamp(-1, 1), rtol=0, atol=1e-5)
    assert generate.evaluations == (6 if cond and cfg != 1 else 3)
    if cond:
        other = generate(pipelines[name], conditions, [3, 4], 3, cfg + 1)
        assert (other - got).abs().max() > 1e-2, "guidance matters"


@pytest.mark.parametrize("name", ["text", "class"])
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compiled_drawing_is_the_same(runs, pipelines, name, backend):
    """Whole batches by the compiled U-Net, once for a size; the last, smaller one without it."""
    pipeline = load_pipeline(runs[name].path)
    compile_unet(pipeline, backend=backend)
    args = (CONDITIONS[name], [7, 8, 9, 10, 7], 3, 2.0)
    eager = generate(pipelines[name], *args, batch_size=2)
    torch.compiler.reset()
    counters = torch._dynamo.utils.counters
    counters.clear()
    compiled = generate(pipeline, *args, batch_size=2)
    assert counters["stats"]["unique_graphs"] == 1 and not counters["graph_break"], counters
    torch.testing.assert_close(compiled, eager, rtol=0, atol=1e-5)
    assert pipeline.denoiser.unet.state_dict().keys() == pipelines[name].denoiser.unet.state_dict().keys()


@pytest.mark.parametrize("name", ["text", "class", "pixels"])
def test_rounding_the_weights_once_is_what_autocast_does(runs, pipelines, name):
    pipeline, args = load_pipeline(runs[name].path), (CONDITIONS[name], [7, 8, 9, 10, 7], 3, 2.0)
    round_weights(pipeline)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(generate(pipeline, *args), generate(pipelines[name], *args))


@pytest.mark.parametrize("batch", [1, 2, 3, 5, 9])
def test_decoding_in_slices(pipelines, batch):
    vae = pipelines["text"].vae
    x = torch.randn(5, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        whole, sizes = vae.decode(vae.denormalize(x)), []
        hook = vae.decoder.register_forward_pre_hook(lambda module, inputs: sizes.append(len(inputs[0])))
        torch.testing.assert_close(decode(vae, x, batch=batch), whole, rtol=0, atol=1e-5)
        torch.testing.assert_close(decode(vae, x, tile=8, batch=batch), whole, rtol=0, atol=1e-5)
        hook.remove()
    assert max(sizes) == min(batch, 5) and sum(sizes) == 10


def test_generate_at_another_size(pipelines):
    assert generate(pipelines["text"], ["a"], [0], 1, size=(48,)).shape == (1, 3, 48, 48)
    assert generate(pipelines["text"], ["a"], [0], 1, size=(48, 16)).shape == (1, 3, 48, 16)
    assert generate(pipelines["pixels"], [None], [0], 1, size=(9,)).shape == (1, 3, 9, 9)
    for size, wrong, better in (
        ((30,), 30, 32),
        ((3,), 3, 8),
        ((-8,), -8, 8),
        ((16, 20), 20, 16),
        ((16.5, 16), 16.5, 16),
    ):
        with pytest.raises(ValueError, match=f"size={wrong} is not a multiple of 8: choose {better}"):
            generate(pipelines["text"], ["a"], [0], 1, size=size)
    with pytest.raises(ValueError, match="size=8,8,8 is neither a side nor height,width: give 1 or 2"):
        generate(pipelines["text"], ["a"], [0], 1, size=(8, 8, 8))


def test_generate_errors(pipelines):
    with pytest.raises(ValueError, match="sampler 'dpm' is not one of ddpm, ddim, plms, .*, unipc"):
        generate(pipelines["text"], ["a"], [0], 1, sampler="dpm")
    with pytest.raises(ValueError, match="batch_size=0 pictures at a time: choose 1 or more"):
        generate(pipelines["text"], ["a"], [0], 1, batch_size=0)
    with pytest.raises(ValueError, match="1 seeds for 2 pictures: give one each"):
        generate(pipelines["text"], ["a", "b"], [0], 1)
    with pytest.raises(ValueError, match="steps is 0"):
        generate(pipelines["text"], ["a"], [0], 0)


# --- the command: what to draw ---


@pytest.mark.parametrize(
    "cls, expected",
    [
        ("", [0, 1, 2, 3]),
        ("dog", [1]),
        ("0", [0]),
        ("3, cat ,2", [3, 0, 2]),
        ("7", [2]),  # a name goes before a number
        ("tench, Tinca", [3]),  # a name may hold a comma
    ],
)
def test_choose_classes(pipelines, cls, expected):
    assert choose_conditions(pipelines["class"], "", "", cls) == expected


@pytest.mark.parametrize(
    "cls, wrong", [("4", "4"), ("0,-1", "-1"), ("bird", "bird"), ("²", "²"), ("1.5", "1.5"), ("1,", "")]
)
def test_choose_classes_that_are_none(pipelines, cls, wrong):
    names = "choose 0 to 3, or one of cat, dog, 7, tench, Tinca"
    with pytest.raises(ValueError, match=re.escape(f"cls={wrong} is no class of this checkpoint: {names}")):
        choose_conditions(pipelines["class"], "", "", cls)
    nameless = pipelines["class"]._replace(classes=[])
    with pytest.raises(ValueError, match=f"cls={re.escape(wrong)} is no class of this checkpoint: choose 0 to 3$"):
        choose_conditions(nameless, "", "", cls)


def test_choose_prompts(pipelines, tmp_path, capsys):
    file = tmp_path / "prompts.txt"
    file.write_bytes("\ufeffa red star\r\n\n  \n  naïve 🌟  \r\na red star".encode())
    text, shown = pipelines["text"], ["a red star", "a blue circle"]
    assert choose_conditions(text, "", "", "") == shown
    assert choose_conditions(text, "a cat", "", "") == ["a cat"]
    assert read_prompts(file) == ["a red star", "naïve 🌟", "a red star"]
    assert choose_conditions(text, "", str(file), "") == read_prompts(file)
    assert choose_conditions(pipelines["none"], "", "", "") == [None] * 3
    assert capsys.readouterr().out == ""
    assert choose_conditions(text, "🌟 and far too long", "", "") == ["🌟 and far too long"], "cut by the text encoder"
    assert capsys.readouterr().out == "prompt of 22 tokens cut to 16: 🌟 and far too long...\n"


@pytest.mark.parametrize(
    "name, settings, message",
    [
        ("class", ("a cat", "", ""), "takes no prompt: use --cls"),
        ("class", ("", "file.txt", ""), "takes no prompt: use --cls"),
        ("none", ("a cat", "", ""), "takes no prompt: use neither --prompt nor --cls"),
        ("text", ("", "", "3"), "takes no class: use --prompt"),
        ("pixels", ("", "", "3"), "takes no class: use neither --prompt nor --cls"),
        ("text", ("a cat", "file.txt", ""), "prompt and prompts are both set: choose one"),
    ],
)
def test_conditions_that_the_checkpoint_does_not_take(pipelines, name, settings, message):
    with pytest.raises(ValueError, match=message):
        choose_conditions(pipelines[name], *settings)


def test_bad_prompt_files(tmp_path):
    file = tmp_path / "prompts.txt"
    for content, message in (
        (b"", "holds no prompts: give a file with a prompt a line"),
        (b"\n \n\t\n", "holds no prompts"),
        ("naïve".encode("latin-1"), "is not text in UTF-8"),
        ("a star".encode("utf-16"), "is not text in UTF-8"),
    ):
        file.write_bytes(content)
        with pytest.raises(ValueError, match=message):
            read_prompts(file)
    with pytest.raises(FileNotFoundError, match="nowhere.txt"):
        read_prompts(tmp_path / "nowhere.txt")


# --- the command: pictures ---


def test_to_pil():
    image = torch.tensor([-1.0, -9.0, 0.0, 1.0, 3.0, 0.5]).view(1, 2, 3).expand(3, 2, 3)
    assert np.array(to_pil(image))[..., 1].tolist() == [[0, 0, 128], [255, 255, 191]]
    assert to_pil(torch.zeros(3, 4, 6)).size == (6, 4)


def test_save_grid(tmp_path):
    colours = torch.linspace(-1, 1, 5).view(5, 1, 1, 1).expand(5, 3, 24, 32)
    captions = ["a red star", "🌟 漢字 naïve", "", "long " * 40, "two\nlines"]
    settings = {"prompt": "🌟 naïve", "steps": 50, "nested": {"ch_mult": [1, 2]}}
    save_grid(tmp_path / "grid.png", colours, captions, settings)
    with Image.open(tmp_path / "grid.png") as grid:
        assert json.loads(grid.text["settings"]) == settings
        pixels = np.array(grid)
    cell_w, cell_h = 4 * 32 + 4, 4 * 24 + 4 + 24  # enlarged four times, with two lines of caption
    assert pixels.shape == (2 * cell_h, 3 * cell_w, 3)
    for i, value in enumerate([0, 64, 128, 191, 255]):
        row, column = divmod(i, 3)
        cell = pixels[row * cell_h : (row + 1) * cell_h, column * cell_w : (column + 1) * cell_w]
        assert (cell[2:98, 2:130] == value).all() and (cell[:2] == 255).all() and (cell[:, :2] == 255).all()
        assert (cell[98:] < 128).any() == bool(captions[i]), "a caption stands below"
    save_grid(tmp_path / "plain.png", colours[:1], [""])
    with Image.open(tmp_path / "plain.png") as grid:
        assert grid.size == (132, 100) and json.loads(grid.text["settings"]) == {}


# --- the command, run ---

ROOT = Path(__file__).resolve().parent.parent
FAST = ("--device=cpu", "--steps=2")


@pytest.fixture
def command(tmp_path, monkeypatch, capsys):
    """command(*args, alone=False) -> (exit status, stdout, stderr) of sample.py in an empty folder.

    In this process, which saves the seconds in which torch loads, or alone, in one of its own.
    """
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)  # the script sets its own
    monkeypatch.delenv("TRACEBACK", raising=False)

    def run(*args, alone=False):
        if alone:
            line, environment = [sys.executable, str(ROOT / "sample.py"), *args], os.environ | {"OMP_NUM_THREADS": "1"}
            done = subprocess.run(line, capture_output=True, text=True, encoding="utf-8", env=environment)
            return done.returncode, done.stdout, done.stderr
        monkeypatch.setattr(sys, "argv", ["sample.py", *args])
        capsys.readouterr()
        try:
            runpy.run_path(str(ROOT / "sample.py"), run_name="__main__")
            status = 0
        except SystemExit as e:
            status = e.code
        except BaseException as e:
            sys.excepthook(type(e), e, e.__traceback__)
            status = 1
        return status, *capsys.readouterr()

    return run


def records(folder):
    """samples.jsonl, and the picture of each line with the settings that lie in it."""
    with open(folder / "samples.jsonl") as f:
        lines = [json.loads(line) for line in f]
    pictures = []
    for line in lines:
        with Image.open(folder / line["file"]) as picture:
            settings = json.loads(picture.text["settings"])
            assert settings.items() >= line.items()
            pictures.append((np.array(picture), settings["config"]))
    assert len(list(folder.glob("0*.png"))) == len(lines)
    return lines, pictures


def test_by_default_it_draws_what_training_showed(runs, pipelines, command):
    status, out, err = command(f"--ckpt={runs['text'].path}", *FAST, alone=True)
    assert (status, err) == (0, "")
    folder = Path(runs["text"].path) / "samples"
    assert re.fullmatch(rf"2 pictures in .* images/s, 4 network evaluations each: {folder}/grid.png\n", out)
    lines, pictures = records(folder)
    assert lines == [
        {"file": "00000.png", "prompt": "a red star", "seed": 0},
        {"file": "00001.png", "prompt": "a blue circle", "seed": 1},
    ]
    expected = generate(pipelines["text"], ["a red star", "a blue circle"], [0, 1], 2, 3.0, "unipc")
    for (picture, config), image in zip(pictures, expected):
        assert abs(picture.astype(int) - np.array(to_pil(image))).max() <= 1
        assert config["steps"] == 2 and config["cfg"] == 3.0 and config["sampler"] == "unipc"
    with Image.open(folder / "grid.png") as grid:
        assert json.loads(grid.text["settings"])["config"] == pictures[0][1]


def test_prompts_from_a_file(runs, command, tmp_path):
    (tmp_path / "prompts.txt").write_text("🌟 a star with far too many words\na cat\n", encoding="utf-8")
    args = f"--ckpt={runs['text'].path}/latest.safetensors", "--prompts=prompts.txt", "--n=2", "--seed=5", *FAST
    status, out, err = command(*args, "--out_dir=new/folder", "--batch_size=3", "--sampler=dpmpp_2m", "--size=16")
    assert (status, err) == (0, ""), err
    assert out.startswith("prompt of 36 tokens cut to 16: 🌟 a star with far too many words...\n4 pictures in")
    lines, pictures = records(tmp_path / "new" / "folder")
    assert [line["prompt"] for line in lines] == ["🌟 a star with far too many words"] * 2 + ["a cat"] * 2
    assert [line["seed"] for line in lines] == [5, 6, 7, 8]
    assert all(picture.shape == (16, 16, 3) for picture, _ in pictures)
    assert len({picture.tobytes() for picture, _ in pictures}) == 4


@pytest.mark.parametrize(
    "name, args, captions",
    [
        ("text", ["--prompt=a cat", "--eta=0.5", "--sampler=ddim"], ["a cat"] * 4),
        ("text", ["--prompt=a cat", "--n=1", "--cfg=1", "--dtype=bfloat16"], ["a cat"]),
        ("class", [], ["cat", "dog", "7", "tench, Tinca"]),
        ("class", ["--cls=dog, 0"], ["dog", "cat"]),
        ("class", ["--cls=dog", "--n=3"], ["dog"] * 3),
        ("none", [], [""] * 3),
        ("none", ["--n=5", "--sampler=ddpm"], [""] * 5),
        ("pixels", ["--n=1"], [""]),
    ],
)
def test_how_many_of_what(runs, command, tmp_path, name, args, captions):
    status, out, err = command(f"--ckpt={runs[name].path}", "--out_dir=out", *args, *FAST)
    assert (status, err) == (0, ""), err
    lines, pictures = records(tmp_path / "out")
    assert [line["prompt"] for line in lines] == captions
    assert [line["seed"] for line in lines] == list(range(len(captions)))
    assert len({picture.tobytes() for picture, _ in pictures}) == len(captions)


def test_a_seed_is_a_picture(runs, command, tmp_path):
    args = f"--ckpt={runs['class'].path}", "--cls=dog", *FAST
    command(*args, "--out_dir=many", "--n=4", "--seed=3")
    command(*args, "--out_dir=one", "--n=1", "--seed=5")
    many, one = records(tmp_path / "many")[1], records(tmp_path / "one")[1]
    assert abs(many[2][0].astype(int) - one[0][0]).max() <= 1


def test_a_class_out_of_range_is_one_line(runs, command):
    status, out, err = command(f"--ckpt={runs['class'].path}", "--cls=4", *FAST, alone=True)
    expected = "sample.py: cls=4 is no class of this checkpoint: choose 0 to 3, or one of cat, dog, 7, tench, Tinca\n"
    assert (status, out, err) == (1, "", expected)


@pytest.mark.parametrize(
    "name, args, message",
    [
        ("vae", [], r".*/vae/latest.safetensors is an autoencoder \(stage 1\): train_ldm.py --first_stage=.* can draw"),
        ("pixels", ["--reconstruct=."], ".*was trained on pixels: it holds no autoencoder"),
        ("text", ["--cls=3"], "this checkpoint takes no class: use --prompt"),
        ("class", ["--prompt=a cat"], "this checkpoint takes no prompt: use --cls"),
        ("none", ["--cfg=2"], "cfg=2.0 has nothing to guide towards: this checkpoint is unconditional"),
        ("text", ["--eta=1", "--sampler=heun"], "eta=1.0 is for sampler=ddim or euler_a or dpmpp_2m_sde, not heun"),
        ("text", ["--eta=2", "--sampler=ddim"], r"eta is 2.0: choose between 0 \(DDIM\) and 1 \(DDPM\)"),
        ("text", ["--sampler=dpm"], "sampler 'dpm' is not one of .*"),
        ("text", ["--size=20"], "size=20 is not a multiple of 8: choose 16"),
        ("text", ["--n=-1"], "n=-1: choose 1 or more pictures"),
        ("text", ["--batch_size=0"], "batch_size=0: choose 1 or more pictures"),
        ("text", ["--steps=0"], "steps is 0: at least 1 is needed"),
        ("text", ["--prompts=nowhere.txt"], ".*nowhere.txt.*"),
        ("text", ["--dtype=float16"], "dtype=float16 is not one of auto, float32, bfloat16"),
        ("text", ["--device=gpu"], "device=gpu is not one of auto, cpu, cuda"),
        ("vae", ["--reconstruct=nowhere"], "dataset nowhere is not there: .*"),
    ],
)
def test_mistakes_are_one_line(runs, command, name, args, message):
    fast = FAST[:1] if any(arg.startswith("--reconstruct") for arg in args) else FAST
    status, out, err = command(f"--ckpt={runs[name].path}", *fast, "--out_dir=out", *args)
    assert (status, out) == (1, "")
    assert re.fullmatch(f"sample.py: {message}\n", err), err


def test_checkpoints_that_are_none(runs, command, tmp_path):
    whole = Path(runs["text"].path, "latest.safetensors").read_bytes()
    (tmp_path / "cut.safetensors").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "notes.txt").write_text("nothing that draws\n" * 9)
    (tmp_path / "empty").mkdir()
    for file, message, alone in (
        ("cut.safetensors", r"cut.safetensors is no checkpoint, or one cut short \(.*\)", True),
        ("notes.txt", r"notes.txt is no checkpoint, or one cut short \(.*\)", False),
        ("empty", "empty holds no latest.safetensors: train first, or name a checkpoint file", False),
        ("nowhere", "checkpoint nowhere is not there: name a .safetensors file or the out_dir of a run", False),
    ):
        for more in (FAST, ["--device=cpu", "--reconstruct=."])[: 1 if alone else 2]:
            status, out, err = command(f"--ckpt={file}", "--out_dir=out", *more, alone=alone)
            assert (status, out) == (1, "") and re.fullmatch(f"sample.py: {message}\n", err), err


def test_traceback_on_request(runs, command, monkeypatch):
    monkeypatch.setenv("TRACEBACK", "1")
    status, _, err = command("--ckpt=nowhere")
    assert status == 1 and "Traceback" in err and err.rstrip().endswith("or the out_dir of a run")


def test_a_setting_that_does_not_exist(command):
    assert command("--promt=a cat")[::2] == (
        2,
        "sample.py: unknown setting 'promt': did you mean 'prompt'? (--help lists all)\n",
    )


# --- the command: reconstructions ---


@pytest.fixture
def photos(tmp_path):
    """Pictures of several sizes and kinds, one that is damaged and one that is too small."""
    folder, rng = tmp_path / "photos", np.random.default_rng(0)
    folder.mkdir()
    for name, (W, H) in {"a.png": (40, 24), "b.jpg": (37, 50), "d.png": (64, 64), "small.png": (8, 40)}.items():
        pixels = np.kron(rng.integers(0, 256, (-(-H // 8), -(-W // 8), 3)), np.ones((8, 8, 1)))[:H, :W]
        Image.fromarray(pixels.astype(np.uint8)).save(folder / name)
    Image.open(folder / "a.png").convert("L").save(folder / "grey.png")
    (folder / "c.png").write_bytes((folder / "d.png").read_bytes()[:100])
    (folder / "readme.txt").write_text("not an image")
    return folder


def test_reconstruct(runs, command, photos, tmp_path):
    status, out, err = command(f"--ckpt={runs['vae'].path}", f"--reconstruct={photos}", "--device=cpu", alone=True)
    assert (status, err) == (0, ""), err
    lines, sheet = out.splitlines(), Path(runs["vae"].path) / "samples" / "reconstructions.png"
    scores = {}
    for name, W, H in (("a.png", 40, 24), ("b.jpg", 36, 48), ("d.png", 64, 64), ("grey.png", 40, 24)):
        with Image.open(photos / name) as image:
            x = torch.from_numpy(np.array(image.convert("RGB"))[:H, :W].copy()).permute(2, 0, 1)[None] / 127.5 - 1
        vae = runs["vae"].vae
        y = vae.decode(vae.encode(x).mode())
        line = next(line for line in lines if line.startswith(f"{name} "))
        assert line.startswith(f"{name} {W}x{H}: PSNR ")
        scores[name] = [float(number) for number in re.findall(r"PSNR (\S+) dB, SSIM (\S+)", line)[0]]
        assert scores[name] == pytest.approx([psnr(x, y).item(), ssim(x, y).item()], abs=0.006)
    assert any(re.fullmatch("skipped a bad image: c.png: .*", line) for line in lines)
    assert "skipped small.png: 8x40 is too small" in lines
    mean = np.mean(list(scores.values()), axis=0)
    got = re.fullmatch(rf"4 images: PSNR (\S+) dB, SSIM (\S+); {sheet}", lines[-1]).groups()
    assert [float(number) for number in got] == pytest.approx(mean.tolist(), abs=0.01)
    assert len(lines) == 7
    with Image.open(sheet) as picture:
        assert picture.size == (40 + 36 + 64 + 40 + 4 * 4, 2 * 64 + 4)
        with Image.open(photos / "a.png") as original:
            assert np.array_equal(np.array(picture)[:24, :40], np.array(original)), "originals above"
        assert not np.array_equal(np.array(picture)[68:92, :40], np.array(picture)[:24, :40])


def test_reconstruct_by_the_first_stage_of_a_denoiser(runs, command, photos, tmp_path):
    args = f"--reconstruct={photos}", "--device=cpu"
    assert command(f"--ckpt={runs['vae'].path}", *args, "--out_dir=one")[0] == 0
    assert command(f"--ckpt={runs['text'].path}", *args, "--out_dir=two")[0] == 0
    one, two = (Path(folder, "reconstructions.png").read_bytes() for folder in ("one", "two"))
    assert one == two


def test_reconstruct_what_is_all_bad(runs, command, photos):
    for name in ("a.png", "b.jpg", "d.png", "grey.png"):
        (photos / name).unlink()
    status, out, err = command(f"--ckpt={runs['vae'].path}", f"--reconstruct={photos}", "--device=cpu")
    assert status == 1 and len(out.splitlines()) == 2
    assert err == f"sample.py: {photos} holds no image that can be reconstructed\n"
