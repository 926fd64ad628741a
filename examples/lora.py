"""LoRA (Hu et al. 2021, arXiv 2106.09685): fine-tune a denoiser's attention by matrices of low rank; merge such files.

    python -m examples.lora --init_from=stable-diffusion-v1-5 --dataset=photos --steps=1000   # out/lora.safetensors
    python -m examples.lora --init_from=stable-diffusion-v1-5 --merge=out/lora.safetensors    # out/merged.safetensors
    python sample.py --ckpt=out/merged.safetensors --prompt="a photo of my dog"

`init_from` is a checkpoint of train_ldm.py or a folder or file of Stable Diffusion, with text or without a condition.
The file has diffusers' names: StableDiffusionPipeline.load_lora_weights("out/lora.safetensors") opens it. `merge` reads
files of diffusers, peft and kohya's sd-scripts and adds scale * alpha / rank * B A to the weights.
"""

import json
import os
import re

import torch
import torch.nn as nn
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import save_file

import checkpoint
import common
import convert
from attention import Attention
from checkpoint import part, reject, with_prefix
from configurator import configure
from data.dataset import Dataset, Stream, loader
from diffusion import t_max, target, unet_time
from sample import encode, load_pipeline

init_from = "out/ldm"  # model to fine-tune, or to merge into
merge = ""  # LoRA file to merge instead of training
scale = 1.0  # of merge: strength
dataset = "photos"  # folder of images, their captions beside them, or another data set
rank = 8  # >= 1: of the matrices
batch_size = 1  # >= 1: images per step
steps = 1000  # >= 1: optimizer steps
lr = 1e-4  # > 0: learning rate
cond_drop = 0.1  # in [0, 1]: share of examples trained without their caption
flip = True  # mirror half of the images
seed = 0  # of the matrices, data order and noise
workers = 2  # >= 0: processes that decode images
device = "auto"  # auto | cpu | cuda | mps
dtype = "auto"  # auto | float32 | bfloat16: auto is bfloat16 on CUDA, else float32
out = ""  # file to write; "" is out/lora.safetensors, or with merge out/merged.safetensors


# --- training ---


class LowRank(nn.Module):
    """B A x, added to the output of a linear layer; zero at first. Named as in peft."""

    def __init__(self, layer, rank):
        super().__init__()
        self.lora_A = nn.Linear(layer.in_features, rank, bias=False)
        self.lora_B = nn.Linear(rank, layer.out_features, bias=False)
        nn.init.normal_(self.lora_A.weight, std=1 / rank)
        nn.init.zeros_(self.lora_B.weight)
        layer.register_forward_hook(lambda layer, inputs, output: output + self.lora_B(self.lora_A(inputs[0])))


def add_lora(unet, rank):
    """{name of a layer: LowRank} for the four linear layers of every attention."""
    attentions = [(name, module) for name, module in unet.named_modules() if isinstance(module, Attention)]
    return {f"{name}.{layer}": LowRank(getattr(module, layer), rank)
            for name, module in attentions for layer in ("to_q", "to_k", "to_v", "to_out")}  # fmt: skip


def loss(pipeline, images, captions):
    """Mean squared error of the denoiser's prediction at uniform t, for images (B,C,H,W) and their captions."""
    with torch.no_grad():
        x0 = encode(pipeline, images)
        context = pipeline.text and pipeline.text(captions)
    schedule, objective = pipeline.schedule, pipeline.objective
    t = torch.rand(len(x0), device=x0.device) * t_max(objective, schedule)
    if schedule.discrete:  # the times of a table's entries
        t = (torch.floor(t * schedule.discrete) + 1).clamp(max=schedule.discrete) / schedule.discrete
    alpha, sigma = (f(t).to(x0.dtype).view(-1, 1, 1, 1) for f in (schedule.alpha, schedule.sigma))
    eps = torch.randn_like(x0)
    prediction = pipeline.denoiser.unet(alpha * x0 + sigma * eps, unet_time(schedule, t).to(x0.dtype), context)
    return F.mse_loss(prediction.to(x0.dtype), target(objective, x0, eps, alpha, sigma))


def train(pipeline, cfg, device, autocast):
    """Train matrices of low rank for the pipeline's U-Net; returns {name of a layer: LowRank}."""
    torch.manual_seed(cfg.seed)
    lora = add_lora(pipeline.denoiser.unet, cfg.rank)
    pipeline.to(device)
    parameters = [p for module in lora.values() for p in module.to(device).parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=cfg.lr)
    sides = [side * pipeline.factor for side in pipeline.latent_shape[1:]]
    images = Dataset(cfg.dataset, "train", sides, image_mode=pipeline.image_mode)
    batches = loader(Stream(images, cfg.seed, flip=cfg.flip), 0, cfg.steps, cfg.batch_size, workers=cfg.workers)
    for _ in common.progress_bar(range(cfg.steps), "training"):
        batch = next(batches)
        dropped = torch.rand(cfg.batch_size) < cfg.cond_drop
        captions = ["" if drop else text for text, drop in zip(batch["text"], dropped)]
        with autocast:
            error = loss(pipeline, batch["image"].to(device), captions)
        error.backward()
        optimizer.step()
        optimizer.zero_grad()
    return lora


# --- files ---


def layer_names(layers, layout, prefix=""):
    """{name of a layer here: there} of layers of convert.py, all that have a weight."""
    return {key.ours[0].removesuffix(".weight"): prefix + key.theirs.removesuffix(".weight")
            for key in convert.key_table(layers, layout) if key.theirs.endswith(".weight")}  # fmt: skip


def unet_names(settings):
    return layer_names(convert.unet_layers(settings), "diffusers")


def read_lora(path):
    """{layer, as in diffusers with _ for dots: [down, up, alpha / rank]} of a file of diffusers, peft or kohya."""
    tensors, beside = convert.read_tensors(path), os.path.join(os.path.dirname(path), "adapter_config.json")
    config, found = checkpoint.read_json(beside) if os.path.exists(beside) else {}, {}
    with safe_open(path, framework="pt") as file:
        about = json.loads((file.metadata() or {}).get("lora_adapter_metadata", "{}"))
    for name, t in tensors.items():
        name = name.replace(".processor", "").replace("to_out_lora", "to_out.0_lora").replace("_lora.", ".lora.")
        match = re.fullmatch(r"(.+?)\.(?:lora[._])?(A|down|B|up|alpha)(?:\.default)?(?:\.weight)?", name)
        if not match:
            reject(path, f"holds {name}, which is not of a LoRA", "only plain LoRA is supported")
        layer = re.sub(r"^(base_model\.model\.|unet\.|lora_unet_)+", "", match[1]).replace(".", "_")
        layer = re.sub(r"^(text_encoder_|lora_te_)(text_model_)?", "text_", layer)
        found.setdefault(layer, {})[{"A": "down", "B": "up"}.get(match[2], match[2])] = t.float()
    for layer, parts in found.items():
        if not {"down", "up"} <= parts.keys():
            reject(path, f"{layer} has {' and '.join(parts)} alone", "give a complete file")
        alpha = about.get("unet.lora_alpha", config.get("lora_alpha", len(parts["down"])))
        found[layer] = [parts["down"], parts["up"], float(parts.get("alpha", alpha)) / len(parts["down"])]
    return found


def add_to(state, names, lora, scale, path):
    """Add to the state dict what `lora` has for its layers, names {ours: theirs}, and take it out of `lora`."""
    for ours, theirs in names.items():
        down, up, strength = lora.pop(theirs.replace(".", "_"), (None, None, None))
        if down is not None:
            weight, change = state[f"{ours}.weight"], up.flatten(1) @ down.flatten(1)
            if change.numel() != weight.numel() or len(change) != len(weight):
                reject(path, f"{theirs} is {tuple(change.shape)}, not {tuple(weight.shape)}", "made for another model")
            state[f"{ours}.weight"] = weight + scale * strength * change.view_as(weight)


def merged(path, lora_path, scale, out):
    """(tensors, meta) of a checkpoint: the model at `path` with a LoRA merged into it.

    A text encoder of another project that the LoRA changes is written beside `out`.
    """
    lora, path = read_lora(lora_path), checkpoint.find(path)
    if checkpoint.is_ours(path):
        tensors, meta = checkpoint.read(path, "ema", "text", "vae")
        text = None
    else:
        parts = convert.load_pipeline(path)
        meta, text = parts["meta"] | {"config": {"tower_weights": path, "clip_vocab": ""}}, parts["text"]
        tensors = with_prefix("ema.unet", parts["unet"][1])
        tensors |= with_prefix("vae", parts["vae"][1]) if parts["vae"] else {}
    unet = part(tensors, "ema.unet")
    add_to(unet, unet_names(meta["model"]["unet"]), lora, scale, lora_path)
    if text and any(layer.startswith("text_") for layer in lora):
        layers, merges = convert.text_layers(convert.used_blocks(text[0])), text[2]
        add_to(text[1], layer_names(layers, "transformers", "text_"), lora, scale, lora_path)
        save_file(text[1], f"{out}.text.safetensors")
        if isinstance(merges, bytes):  # out of a tokenizer.json
            merges = f"{out}.merges.txt"
            checkpoint.write_whole(merges, lambda file: file.write(text[2]))
        meta["config"] = {"tower_weights": f"{out}.text.safetensors", "clip_vocab": merges or ""}
    if text:
        meta["model"]["tower_hash"] = checkpoint.hash_weights(text[1])
    if lora:
        reject(lora_path, f"{len(lora)} of its layers are not in {path}: {', '.join(list(lora)[:3])}", "use its model")
    return tensors | with_prefix("ema.unet", unet), meta


if __name__ == "__main__":
    cfg = configure(globals())
    common.install_excepthook()
    machine = common.setup(cfg)
    file = cfg.out or ("out/merged.safetensors" if cfg.merge else "out/lora.safetensors")
    os.makedirs(os.path.dirname(file) or ".", exist_ok=True)
    if cfg.merge:
        checkpoint.write(file, *merged(cfg.init_from, cfg.merge, cfg.scale, file))
    else:
        pipeline = load_pipeline(cfg.init_from)
        if pipeline.num_classes or pipeline.task["task"] != "none":
            reject(cfg.init_from, "conditioned on classes or images", "give a model of text or without a condition")
        autocast = torch.autocast(machine.device.type, torch.bfloat16, enabled=machine.precision == "bfloat16")
        lora, names = train(pipeline, cfg, machine.device, autocast), unet_names(pipeline.denoiser.unet.settings)
        tensors = {}
        for name, module in lora.items():
            tensors |= with_prefix(f"unet.{names[name]}", module.cpu().state_dict())
        with checkpoint.replacing(file) as temporary:
            save_file(tensors, temporary, metadata={"format": "pt"})
    print(file)
