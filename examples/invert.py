"""Edit an image by DDIM inversion: find the noise that leads to it, and generate from there with another prompt.

python -m examples.invert --ckpt=out/ldm --image=photo.png --source_prompt="a cat" --prompt="a dog"
"""

import torch
from PIL import Image

from common import install_excepthook
from configurator import configure
from data.dataset import to_mode, to_tensor
from diffusion import sample_ddim, sample_times, steps_of
from grid import save_grid
from sample import choose_conditions, decode, encode, fit, guided_denoiser, load_pipeline, with_sampling

ckpt = "out/ldm"  # stage-2 checkpoint without a task
image = "photo.png"  # file
source_prompt = ""  # prompt that describes the image
prompt = ""  # prompt of the edited image
cls = ""  # class name or number of both; "" is the checkpoint's first example
steps = 50  # in [1, 1000]: of the inversion, and of generating
guidance = 2.0  # >= 0: classifier-free guidance scale of generating; unless given, the checkpoint's
iterations = 3  # >= 1: fixed-point iterations per step of the inversion
out = "inverted.png"  # grid of the image, its reconstruction with source_prompt, and the edited image


def ddim_invert(denoise, x0, times, schedule, iterations=3):
    """The sample at times[0] from which DDIM at eta = 0, over these times, leads approximately to x0.

    A step of DDIM (in the coordinates of diffusion.sample_euler) evaluates the network at its start, which is unknown
    here: it is found by fixed-point iterations (Pan et al. 2023, arXiv 2309.04907); 1 is the common explicit inversion.
    """
    x = x0
    for t, _, alpha_t, alpha_s, sigma_t, sigma_s in reversed(steps_of(times, schedule)):
        z_s, r_t, r_s = x / (alpha_s + sigma_s), sigma_t / (alpha_t + sigma_t), sigma_s / (alpha_s + sigma_s)
        z = z_s
        for _ in range(iterations):
            slope = (z - denoise(z * (alpha_t + sigma_t), t)) / r_t
            z = z_s + (r_t - r_s) * slope
        x = z * (alpha_t + sigma_t)
    return x


@torch.no_grad()
def edit(pipeline, images, source, wanted, steps, guidance=2.0, iterations=3):
    """(reconstructions, edited images) of images (B,C,H,W); source and wanted: B conditions as in `generate`."""
    schedule, times = pipeline.schedule, sample_times(steps, pipeline.schedule, pipeline.objective)
    denoise = guided_denoiser(pipeline, source, {})
    noise = ddim_invert(denoise, encode(pipeline, images), times, schedule, iterations)
    again = sample_ddim(denoise, noise, times, schedule)
    edited = sample_ddim(guided_denoiser(pipeline, wanted, {}, guidance), noise, times, schedule)
    return decode(pipeline, again), decode(pipeline, edited)


if __name__ == "__main__":
    cfg = configure(globals())
    install_excepthook()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    pipeline = load_pipeline(cfg.ckpt).to(device)
    x = to_tensor(fit(to_mode(Image.open(cfg.image), pipeline.image_mode), (), pipeline.multiple))[None]
    guidance = with_sampling(cfg, pipeline).guidance  # steps are more than an image needs
    ends = [cfg.source_prompt, cfg.prompt]
    if pipeline.text is None:
        ends = choose_conditions(pipeline, cfg)[:1] * 2
    again, edited = edit(pipeline, x.to(device), ends[:1], ends[1:], cfg.steps, guidance, cfg.iterations)
    save_grid(cfg.out, torch.cat([x, again, edited]), ["image", "reconstruction", pipeline.caption(ends[1])], columns=3)
    print(cfg.out)
