"""Images between two seeds, two prompts, or both, as an animation.

python -m examples.interpolate --ckpt=out/ldm --prompt="a cat" --prompt_to="a dog" --seed_to=5 --frames=16
"""

import torch

from common import install_excepthook
from configurator import configure
from diffusion import make_denoiser, randn, sample_times, samplers, start_std
from grid import to_pil
from sample import choose_conditions, decode, load_pipeline, network_inputs, with_sampling

ckpt = "out/ldm"  # stage-2 checkpoint
prompt = ""  # prompt of the first image; "" is the checkpoint's first example
prompt_to = ""  # and of the last; "" is the same
cls = ""  # class name or number; "" is the checkpoint's first example
seed = 0  # of the first image
seed_to = -1  # of the last; -1 is the same
frames = 16  # >= 2: images
sampler = "unipc"  # one of samplers: those that add noise make the animation flicker; unless given, the checkpoint's
steps = 20  # in [1, 1000]: sampling steps; unless given, the checkpoint's
guidance = 3.0  # >= 0: classifier-free guidance scale; unless given, the checkpoint's
out = "interpolation.gif"  # file to write


def slerp(a, b, weights):
    """Points (N,...) on the great circle between two noises, which are as likely as the noises; weights (N,)."""
    dot = (a * b).sum() / (a.norm() * b.norm())
    angle = torch.acos(dot.clamp(-1, 1))
    weights = weights.view(-1, *[1] * a.ndim)
    if angle.sin() < 1e-4:  # the same noise twice
        return torch.lerp(a, b, weights)
    return (((1 - weights) * angle).sin() * a + (weights * angle).sin() * b) / angle.sin()


@torch.no_grad()
def interpolate(pipeline, ends, seeds, count, steps, sampler="unipc", guidance=3.0):
    """Images (count,3,H,W) between two conditions and between two seeds; class numbers must be equal."""
    device = next(pipeline.denoiser.parameters()).device
    weights = torch.linspace(0, 1, count)
    noise = slerp(*randn((2, *pipeline.latent_shape), [torch.Generator().manual_seed(seed) for seed in seeds]), weights)
    null = "" if pipeline.text is not None else pipeline.num_classes or None
    first, last, null = (network_inputs(pipeline, [condition] * count) for condition in (*ends, null))
    cond = dict(first)
    if "context" in cond:  # of text, or of a class as a token
        cond["context"] = torch.lerp(first["context"], last["context"], weights.view(-1, 1, 1).to(device))
    schedule, objective = pipeline.schedule, pipeline.objective
    guidance = guidance if cond else 1.0
    denoise = make_denoiser(pipeline.denoiser.unet, schedule, objective, cond, null, guidance)
    times = sample_times(steps, schedule, objective)
    x = start_std(times, schedule) * noise.to(device)
    return decode(pipeline, samplers[sampler](denoise, x, times, schedule))


if __name__ == "__main__":
    cfg = configure(globals())
    install_excepthook()
    pipeline = load_pipeline(cfg.ckpt).to("cuda" if torch.cuda.is_available() else "cpu")
    cfg, first = with_sampling(cfg, pipeline), choose_conditions(pipeline, cfg)[0]
    ends = first, first if pipeline.text is None else cfg.prompt_to or first
    seeds = cfg.seed, cfg.seed_to if cfg.seed_to >= 0 else cfg.seed
    images = interpolate(pipeline, ends, seeds, cfg.frames, cfg.steps, cfg.sampler, cfg.guidance)
    first, *others = map(to_pil, images)
    first.save(cfg.out, save_all=True, append_images=others, duration=100, loop=0)
    print(f"{len(images)} images in {cfg.out}")
