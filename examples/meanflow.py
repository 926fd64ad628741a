"""MeanFlow (Geng et al. 2025, arXiv 2505.13447; improved in 2512.02012): turn a flow model into one of a single step.

    bash demo.sh                                                                                # out/shapes_ldm
    python -m examples.meanflow --init_from=out/shapes_ldm --dataset=data/shapes                # out/meanflow
    python sample.py --ckpt=out/meanflow --prompts=data/shapes/prompts.txt --steps=1

The U-Net learns u(x, r, t), the mean velocity from t down to r of the path through x at t. (t - r) u is the integral of
the velocity v over that time; differentiated by t along the path it gives the target u = v - (t - r) du/dt. Here v is
the velocity of the model that training starts from, with guidance: without the noise of eps - x0, which the first paper
has in its place, and along the path, as the second paper wants it. Sampling then needs no guidance.

x - t u(x, 0, t) is x0, as of a flow model that predicts u(x, 0, t). So the checkpoint is one, with r = 0 folded into
its time embedding, and sample.py opens it. One step of any sampler is x1 - u; of several, ddpm adds the noise again.
"""

import contextlib
import copy
import os
import time

import torch
import torch.nn as nn

import checkpoint
import common
from attention import use_attention
from checkpoint import UserError, reject, with_prefix
from configurator import configure
from data.cache import LatentCache
from data.dataset import Dataset, Stream, loader
from sample import load_pipeline, network_inputs
from unet import timestep_embedding

init_from = "out/shapes_ldm"  # checkpoint of train_ldm.py with objective and schedule flow
dataset = "data/shapes"  # what it was trained on
cache_dir = "cache"  # folder of cached latents
out_dir = "out/meanflow"  # checkpoint
guidance = 1.5  # >= 0: of v, which the result then has inside
equal = 0.25  # in [0, 1): share of examples with r = t
zero = 0.5  # in [0, 1]: share of examples with r = 0
t_mean = 0.0  # of the normal of the logit-normal times, of which r and t are the smaller and the larger
t_std = 1.0  # > 0: of that normal
batch_size = 32  # >= 1: images per step
max_steps = 200  # >= 1: optimizer steps
lr = 5e-4  # > 0: learning rate, falls to 0 along a cosine
optimizer = "muon"  # adamw | muon: as in train_ldm.py
muon_lr = 1e-3  # > 0: muon's learning rate
warmup_steps = 50  # >= 0: steps of linear warm-up
ema_decay = 0.995  # in [0, 1]: of the averaged weights
flip = False  # mirror half of the images
workers = 0  # >= 0: processes that read latents
seed = 0  # of data order, noise and times
device = "auto"  # auto | cpu | cuda | mps

ADAMW = dict(beta1=0.9, beta2=0.99, weight_decay=0.0, shard_optimizer=False)


def column(t):
    return t.view(-1, 1, 1, 1)


class TwoTimes(nn.Module):
    """The time embedding of t, which is its input, and of r (B,), which is set before each call; 0 for r at first."""

    def __init__(self, time_embed):
        super().__init__()
        self.of_t, self.of_r, self.r = time_embed, copy.deepcopy(time_embed), None
        for p in self.of_r[-1].parameters():
            nn.init.zeros_(p)

    def embed_r(self, r):
        weight = self.of_r[0].weight
        return self.of_r(timestep_embedding(1000 * r, weight.shape[1]).to(weight.dtype))

    def forward(self, embedding):
        return self.of_t(embedding) + self.embed_r(self.r)

    def at_zero(self):
        """The embedding of t alone that is the same for r = 0."""
        plain = copy.deepcopy(self.of_t)
        with torch.no_grad():
            plain[-1].bias += self.embed_r(torch.zeros_like(plain[-1].bias[:1]))[0]
        return plain


def mean_velocity(unet, x, r, t, condition):
    """u(x, r, t) of x (B,C,h,w), r and t (B,) in [0, 1]."""
    unet.time_embed.r = r
    return unet(x, 1000 * t, **condition)


def guided_velocity(unet, x, t, condition, null, guidance):
    """Velocity of a flow model with classifier-free guidance."""
    both = {name: torch.cat([value, null[name].expand_as(value)]) for name, value in condition.items()}
    v, v_null = unet(torch.cat([x, x]), 1000 * torch.cat([t, t]), **both).chunk(2)
    return v_null + guidance * (v - v_null)


def error(unet, x, r, t, v, condition):
    """Error (B,C,h,w) of u(x, r, t) as the mean of a velocity that is v at t (Geng et al., eq. 8 to 11)."""
    with torch.no_grad():
        du_dt, moving = torch.zeros_like(x), r < t  # where r = t the target is v
        x_t, r_t, v_t = x[moving], r[moving], v[moving]
        parts = {name: value[moving] for name, value in condition.items()}
        along = (x_t, t[moving]), (v_t, torch.ones_like(r_t))
        du_dt[moving] = torch.func.jvp(lambda x, t: mean_velocity(unet, x, r_t, t, parts), *along)[1]
    return mean_velocity(unet, x, r, t, condition) - (v - column(t - r) * du_dt)


def draw_times(count, cfg):
    """r and t (B,), r <= t, of which the first have r = t and the next r = 0."""
    r, t = torch.sigmoid(cfg.t_mean + cfg.t_std * torch.randn(2, count)).sort(dim=0).values
    equal, zero = int(cfg.equal * count), int(cfg.zero * count)
    r[:equal], r[equal : equal + zero] = t[:equal], 0.0
    return r, t


def train(pipeline, cfg, machine):
    """Train the pipeline's U-Net, which ends with the averaged weights and the time embedding of r = 0."""
    torch.manual_seed(cfg.seed)
    pipeline.to(machine.device)
    unet, vae, first = pipeline.denoiser.unet, pipeline.vae, copy.deepcopy(pipeline.denoiser.unet)
    unet.time_embed = TwoTimes(unet.time_embed)
    unet.requires_grad_(True)
    # forward-mode differentiation has neither fused attention nor GroupNorm in channels_last
    use_attention(unet, "reference")
    unet.to(memory_format=torch.contiguous_format)
    parameters = list(unet.parameters())
    ema = [p.detach().clone() for p in parameters]
    optimizer = common.make_optimizer(pipeline.denoiser, cfg, machine)
    optimizer.found_inf = torch.zeros((), device=machine.device)
    sides = [side * pipeline.factor for side in pipeline.latent_shape[1:]]
    images = Dataset(cfg.dataset, "train", sides, image_mode=pipeline.image_mode)
    cache = LatentCache(Stream(images, cfg.seed, flip=cfg.flip), vae, cfg.cache_dir)
    cache.build(vae, machine.device, contextlib.nullcontext(), cfg.workers, 0, 1)
    batches = loader(cache, 0, cfg.max_steps, cfg.batch_size, workers=cfg.workers)
    null, started = network_inputs(pipeline, ["" if pipeline.text else pipeline.num_classes]), time.time()
    for step in range(1, cfg.max_steps + 1):
        common.set_lr(optimizer, common.learning_rate(step - 1, cfg))
        batch = next(batches)
        conditions = batch["text"]
        if not pipeline.text:
            conditions = [label if label >= 0 else pipeline.num_classes for label in batch["label"].tolist()]
        with torch.no_grad():
            mean, std = batch["image"].to(machine.device).float().unbind(1)
            x0 = vae.normalize(mean + std * torch.randn(std.shape).to(std))
            r, t = (times.to(x0) for times in draw_times(cfg.batch_size, cfg))
            x = torch.lerp(x0, torch.randn(x0.shape).to(x0), column(t))
            condition = network_inputs(pipeline, conditions)
            v = guided_velocity(first, x, t, condition, null, cfg.guidance)
        squares = error(unet, x, r, t, v, condition).square().mean(dim=(1, 2, 3))
        (squares / (squares.detach() + 1e-3).sqrt()).mean().backward()  # the adaptive weight of section 4.3, p = 0.5
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        torch._foreach_lerp_(ema, [p.detach() for p in parameters], 1 - min(cfg.ema_decay, (1 + step) / (10 + step)))
        if step % 100 == 0 or step == cfg.max_steps:
            print(f"step {step}: squared error {squares.mean():.3f}, {time.time() - started:.0f} s", flush=True)
    with torch.no_grad():
        torch._foreach_copy_(parameters, ema)
    unet.time_embed = unet.time_embed.at_zero()


if __name__ == "__main__":
    cfg = configure(globals()).replace(lr_schedule="cosine", lr_end=0.0, **ADAMW)
    common.install_excepthook()
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise UserError("examples.meanflow runs in one process: start it without torchrun")
    machine = common.setup(cfg.replace(dtype="float32"))
    pipeline = load_pipeline(cfg.init_from)
    tensors, meta = checkpoint.read(cfg.init_from, "ema", "text", "vae")
    if meta["model"]["cond"] == "layout":
        reject(cfg.init_from, "cond=layout", "give a model with text or classes")
    if (pipeline.objective, pipeline.schedule.name, pipeline.task["task"]) != ("flow", "flow", "none"):
        reject(cfg.init_from, "not a flow model, or one with a task", "train it with objective=flow and schedule=flow")
    if pipeline.vae is None or not (pipeline.text or pipeline.num_classes):
        reject(cfg.init_from, "a model of pixels or without a condition", "give one of latents with text or classes")
    train(pipeline, cfg, machine)
    tensors |= with_prefix("ema.unet", pipeline.denoiser.unet.state_dict())
    meta["config"] |= {"sampler": "ddpm", "sample_steps": 1, "guidance": 1.0}
    os.makedirs(cfg.out_dir, exist_ok=True)
    checkpoint.write(f"{cfg.out_dir}/latest.safetensors", tensors, meta)
    print(f"{cfg.out_dir}/latest.safetensors")
