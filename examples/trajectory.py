"""How an image forms: x0_hat of every step as an animation.

python -m examples.trajectory --ckpt=out/ldm --prompt="a red star" --n=4
"""

import torch

from common import install_excepthook
from configurator import configure
from diffusion import samplers  # noqa: F401  of the setting `sampler`
from grid import make_grid
from sample import choose_conditions, generate, load_pipeline, with_sampling

ckpt = "out/ldm"  # stage-2 checkpoint without a task
prompt = ""  # prompt; "" is the checkpoint's first example
cls = ""  # class name or number; "" is the checkpoint's first example
n = 4  # in [1, 16]: images
seed = 0  # of the first image
sampler = "unipc"  # one of samplers: see diffusion.py; unless given, the checkpoint's
steps = 20  # in [1, 1000]: sampling steps; unless given, the checkpoint's
guidance = 3.0  # >= 0: classifier-free guidance scale; unless given, the checkpoint's
out = "trajectory.gif"  # file to write


def trajectory(pipeline, conditions, seeds, steps, **options):
    """(images (N,3,H,W), x0_hat at each evaluation as images), N up to 16; options of `generate`."""
    frames = []
    images = generate(
        pipeline, conditions, seeds, steps, batch_size=len(conditions), callback=frames.append, progress=True, **options
    )
    return images, frames


if __name__ == "__main__":
    cfg = configure(globals())
    install_excepthook()
    pipeline = load_pipeline(cfg.ckpt).to("cuda" if torch.cuda.is_available() else "cpu")
    cfg, condition = with_sampling(cfg, pipeline), choose_conditions(pipeline, cfg)[0]
    conditions, captions = [condition] * cfg.n, [pipeline.caption(condition)] * cfg.n
    seeds = range(cfg.seed, cfg.seed + cfg.n)
    images, frames = trajectory(pipeline, conditions, seeds, cfg.steps, sampler=cfg.sampler, guidance=cfg.guidance)
    first, *others = [make_grid(frame, captions) for frame in frames]
    first.save(cfg.out, save_all=True, append_images=others, duration=100, loop=0)
    print(f"{len(frames)} steps in {cfg.out}")
