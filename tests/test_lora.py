"""examples/lora.py: trained files open in diffusers, and files of every layout merge into the same weights."""

import json
import os

import pytest
import torch
from conftest import normal, refused
from PIL import Image
from safetensors.torch import load_file, save_file
from test_convert import stable  # noqa: F401

import sample
from checkpoint import read
from examples.lora import LowRank, merged, read_lora, unet_names


@pytest.fixture
def photos(tmp_path):
    """A folder of images with captions."""
    folder = tmp_path / "photos"
    folder.mkdir()
    lines = []
    for i in range(4):
        pixels = torch.randint(0, 255, (40, 40, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(i))
        Image.fromarray(pixels.numpy()).save(folder / f"{i}.png")
        lines.append(json.dumps({"file_name": f"{i}.png", "text": "low low"}))
    (folder / "metadata.jsonl").write_text("\n".join(lines))
    return folder


@pytest.fixture
def run(command):
    def run(*args):
        status, out, err = command("examples/lora.py", "--workers=0", *args)
        assert (status, err) == (0, ""), err
        return out.strip()

    return run


def unet_output(unet, *args):
    with torch.no_grad():
        out = unet(*args)
    return out if isinstance(out, torch.Tensor) else out.sample


@pytest.mark.parametrize("name", ["sd1", "sd2"])
def test_what_is_trained_opens_in_diffusers(name, stable, run, photos):  # noqa: F811
    pytest.importorskip("peft", reason="load_lora_weights needs peft")
    pipe, folder = stable[name]
    file = run(f"--init_from={folder}", f"--dataset={photos}", "--steps=3", "--rank=2", "--lr=0.01")
    inputs = normal(1, 4, 16, 16), torch.tensor([500]), normal(1, 12, 24)
    before = unet_output(pipe.unet, *inputs)
    pipe.load_lora_weights(file)
    theirs = unet_output(pipe.unet, *inputs)
    pipe.unload_lora_weights()
    assert (theirs - before).abs().max() > 1e-2, "the matrices were trained"
    checkpoint = run(f"--init_from={folder}", f"--merge={file}")
    ours = sample.load_pipeline(checkpoint)
    torch.testing.assert_close(unet_output(ours.denoiser.unet, *inputs), theirs, rtol=0, atol=2e-5)
    assert len(sample.generate(ours, ["low low"], [0], steps=2)) == 1


def test_our_own_checkpoint(runs, run, photos):
    file = run(f"--init_from={runs['text'].path}", f"--dataset={photos}", "--steps=2", "--lr=0.01")
    checkpoint = run(f"--init_from={runs['text'].path}", f"--merge={file}", "--scale=0.5")
    before, after, lora = read(str(runs["text"].path), "ema")[0], read(checkpoint, "ema")[0], load_file(file)
    assert before.keys() == after.keys()
    names = unet_names(sample.load_pipeline(checkpoint).denoiser.unet.settings)
    for ours, theirs in names.items():
        a, b = (f"unet.{theirs}.lora_{x}.weight" for x in "AB")
        change = 0.5 * lora[b] @ lora[a] if a in lora else 0
        name = f"ema.unet.{ours}.weight"
        torch.testing.assert_close(after[name], before[name] + change)
    assert len(sample.generate(sample.load_pipeline(checkpoint), ["a cat"], [0], steps=2)) == 1


LAYER = "down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_out.0"
TEXT = "text_model.encoder.layers.0.self_attn.q_proj"
OURS = "ema.unet.input_blocks.1.1.blocks.0.attn2.to_out.weight"
KOHYA = f"lora_unet_{LAYER.replace('.', '_')}"
LAYOUTS = {  # names of down, up and alpha; the metadata; adapter_config.json
    "diffusers": ([f"unet.{LAYER}.lora_A.weight", f"unet.{LAYER}.lora_B.weight"], {"unet.lora_alpha": 8}, None),
    "diffusers 0.20": ([f"unet.{LAYER}.lora.{x}.weight" for x in ("down", "up")] + [f"unet.{LAYER}.alpha"], {}, None),
    "processors": ([f"unet.{LAYER[:-9]}.processor.to_out_lora.{x}.weight" for x in ("down", "up")], {}, None),
    "peft": ([f"base_model.model.{LAYER}.lora_{x}.weight" for x in "AB"], {}, {"lora_alpha": 8}),
    "kohya": ([f"{KOHYA}.lora_down.weight", f"{KOHYA}.lora_up.weight", f"{KOHYA}.alpha"], {}, None),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout, stable, tmp_path):  # noqa: F811
    names, metadata, config = LAYOUTS[layout]
    tensors = dict(zip(names, (normal(4, 16), normal(16, 4, seed=1), torch.tensor(8.0))))
    metadata = {"lora_adapter_metadata": json.dumps(metadata)} if metadata else None
    save_file(tensors, tmp_path / "lora.safetensors", metadata=metadata)
    if config:
        (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    before = sample.load_pipeline(stable["sd1"][1]).denoiser.unet.state_dict()[OURS.removeprefix("ema.unet.")]
    after, _ = merged(stable["sd1"][1], f"{tmp_path}/lora.safetensors", 0.5, "out")
    strength = 1.0 if layout == "processors" else 2.0
    torch.testing.assert_close(after[OURS], before + 0.5 * strength * normal(16, 4, seed=1) @ normal(4, 16))


@pytest.mark.parametrize("prefix", ["lora_te_", "text_encoder."])
def test_the_text_encoder(prefix, stable, tmp_path, run):  # noqa: F811
    layer = prefix + (TEXT.replace(".", "_") if prefix == "lora_te_" else TEXT)
    save_file({f"{layer}.lora_{x}.weight": normal(*shape) for x, shape in (("down", (2, 24)), ("up", (24, 2)))},
              tmp_path / "lora.safetensors")  # fmt: skip
    pipe, folder = stable["sd1"]
    checkpoint = run(f"--init_from={folder}", f"--merge={tmp_path}/lora.safetensors", f"--out={tmp_path}/m.safetensors")
    before, after = (sample.load_pipeline(path).tower.state_dict() for path in (folder, checkpoint))
    changed = {name: after[name] - before[name] for name in before if not torch.equal(before[name], after[name])}
    assert list(changed) == ["blocks.0.attn.to_q.weight"]
    torch.testing.assert_close(changed["blocks.0.attn.to_q.weight"], normal(24, 2) @ normal(2, 24))


GOOD = {f"{KOHYA}.lora_down.weight": normal(4, 16), f"{KOHYA}.lora_up.weight": normal(16, 4)}
BAD = {
    "another model": ({name.replace("attn2", "attn9"): t for name, t in GOOD.items()}, "1 of its layers are not in"),
    "another width": (GOOD | {f"{KOHYA}.lora_down.weight": normal(4, 8)}, "is (16, 8), not (16, 16)"),
    "half": (dict(list(GOOD.items())[:1]), "has down alone"),
    "LoHa": ({f"{KOHYA}.hada_w1_a": normal(4, 4)}, "hada_w1_a, which is not of a LoRA"),
    "LoCon": (GOOD | {f"{KOHYA}.lora_mid.weight": normal(4, 4)}, "lora_mid.weight, which is not of a LoRA"),
    "DoRA": (GOOD | {f"{KOHYA}.dora_scale": normal(4)}, "dora_scale, which is not of a LoRA"),
}


def test_an_error_is_one_line(command):
    status, _, err = command("examples/lora.py", "--init_from=nowhere", "--merge=lora.safetensors")
    assert status == 1 and err.startswith("lora.py: ") and err.count("\n") == 1, err


@pytest.mark.parametrize("case", BAD)
def test_what_does_not_fit(case, stable, tmp_path):  # noqa: F811
    tensors, message = BAD[case]
    save_file(tensors, tmp_path / "lora.safetensors")
    refused(message, merged, stable["sd1"][1], f"{tmp_path}/lora.safetensors", 1.0, "out")


def test_ranks_and_start():
    layer = torch.nn.Linear(6, 4)
    x, before = normal(3, 6), layer(normal(3, 6))
    lora = LowRank(layer, 2)
    assert torch.equal(layer(x), before), "zero at first"
    torch.nn.init.ones_(lora.lora_B.weight)
    torch.testing.assert_close(layer(x), before + (x @ lora.lora_A.weight.T).sum(1, keepdim=True))


def test_convolutions_of_a_pointwise_kind(tmp_path):
    save_file({"lora_unet_conv_in.lora_down.weight": normal(2, 4, 3, 3),
               "lora_unet_conv_in.lora_up.weight": normal(8, 2, 1, 1)}, tmp_path / "a.safetensors")  # fmt: skip
    down, up, strength = read_lora(os.fspath(tmp_path / "a.safetensors"))["conv_in"]
    assert down.shape == (2, 4, 3, 3) and up.shape == (8, 2, 1, 1) and strength == 1
