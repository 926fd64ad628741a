"""Encode and decode the images of a folder at their own size: PSNR and SSIM of each, and a sheet of the first ones.

python -m examples.reconstruct --ckpt=out/vae --images=photos
"""

import torch
from PIL import Image

from checkpoint import reject
from common import install_excepthook
from configurator import configure
from data.dataset import BadImage, Dataset, to_tensor
from grid import as_rgb, to_pil
from metrics import psnr, ssim
from sample import fit
from vae import VAE

ckpt = "out/vae"  # stage-1 checkpoint, or a stage-2 one with its autoencoder
images = "photos"  # folder of images, or another data set
decode_tile = 0  # >= 0: side in latents of the tiles that are decoded separately; 0 is no tiles
out = "reconstructions.png"  # sheet of up to 8 images, originals above


@torch.no_grad()
def reconstruct(vae, images, tile=0):
    """Yields (key, original, reconstruction (1,C,H,W)) of a Dataset's images, cropped to multiples of the factor."""
    for i in range(len(images)):
        try:
            image = images.image(i)
        except BadImage as error:
            print(f"skipped a bad image: {error}")
            continue
        if min(image.size) < max(vae.factor, 11):  # ssim's window
            print(f"skipped {images.key(i)}: {image.size[0]}x{image.size[1]} is too small")
            continue
        x = to_tensor(fit(image, (), vae.factor))[None]
        z = vae.encode(x).mode()
        yield images.key(i), x, vae.decode_tiled(z, tile, tile // 4) if tile else vae.decode(z)


def make_sheet(pairs):
    """Pairs of images (1,C,H,W) side by side, the first of each pair above the second, as one PIL image."""
    width, height = sum(a.shape[3] + 4 for a, _ in pairs), max(a.shape[2] for a, _ in pairs) + 4
    sheet, left = Image.new("RGB", (width, 2 * height - 4), "white"), 0
    for pair in pairs:
        for row, image in enumerate(pair):
            sheet.paste(to_pil(as_rgb(image[0])), (left, row * height))
        left += pair[0].shape[3] + 4
    return sheet


if __name__ == "__main__":
    cfg = configure(globals())
    install_excepthook()
    vae, pairs, scores = VAE.from_pretrained(cfg.ckpt), [], []
    images = Dataset(cfg.images, "all", image_mode=vae.settings["image_mode"])
    for key, x, y in reconstruct(vae, images, cfg.decode_tile):
        scores.append((psnr(y, x).item(), ssim(y, x).item()))
        print(f"{key} {x.shape[3]}x{x.shape[2]}: PSNR {scores[-1][0]:.2f} dB, SSIM {scores[-1][1]:.4f}", flush=True)
        pairs = [*pairs, (x, y)][:8]
    if not scores:
        reject(cfg.images, "no image that can be reconstructed", "give a folder of images")
    make_sheet(pairs).save(cfg.out)
    mean = [sum(values) / len(scores) for values in zip(*scores)]
    print(f"{len(scores)} images: PSNR {mean[0]:.2f} dB, SSIM {mean[1]:.4f}; {cfg.out}")
