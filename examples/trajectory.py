"""How an image forms: x0_hat of every step as an animation.

python -m examples.trajectory --ckpt=out/ldm --prompt="a red star" --n=4
"""

import torch

from common import install_excepthook
from configurator import configure
from sample import generate, load_pipeline, make_grid

ckpt = "out/ldm"  # stage-2 checkpoint without a task
prompt = ""  # prompt; "" is an example of the checkpoint's
cls = -1  # >= -1: class number; -1 is an example of the checkpoint's
n = 4  # in [1, 16]: images
seed = 0  # of the first image
sampler = "ddim"  # ddpm | ddim | plms | euler | euler_a | heun | dpmpp_2m | dpmpp_2m_sde | unipc
steps = 20  # in [1, 1000]: sampling steps
guidance = 3.0  # >= 0: classifier-free guidance scale
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
    pipeline = load_pipeline(ckpt).to("cuda" if torch.cuda.is_available() else "cpu")
    condition = prompt or (cls if cls >= 0 else pipeline.examples[0])
    conditions, captions = [condition] * n, [pipeline.caption(condition)] * n
    seeds = range(seed, seed + n)
    images, frames = trajectory(pipeline, conditions, seeds, steps, sampler=sampler, guidance=guidance)
    first, *others = [make_grid(frame, captions) for frame in frames]
    first.save(out, save_all=True, append_images=others, duration=100, loop=0)
    print(f"{len(frames)} steps in {out}")
