"""Images as PNG files, and many of them in one captioned grid."""

import json
import math
import textwrap

from PIL import Image, ImageDraw
from PIL.PngImagePlugin import PngInfo


def to_uint8(images):
    """Images in [-1,1] -> uint8 of the same shape."""
    return ((images.clamp(-1, 1) + 1) * 127.5).round().byte()


def as_rgb(images):
    """Images (...,C,H,W) in [-1,1] as RGB (...,3,H,W): L is repeated, RGBA put on white."""
    if images.shape[-3] == 4:
        color, alpha = images.split((3, 1), dim=-3)
        alpha = (alpha.clamp(-1, 1) + 1) / 2
        return color * alpha + 1 - alpha
    return images.expand(*images.shape[:-3], 3, *images.shape[-2:])


def to_pil(image):
    """(C,H,W) in [-1,1] -> PIL L, RGB or RGBA."""
    return Image.fromarray(to_uint8(image).permute(1, 2, 0).squeeze(2).cpu().numpy())


def make_grid(images, captions=(), columns=0):
    """Images (N,C,H,W), perhaps with captions below, as one PIL image in RGB, near square or with `columns`."""
    N, _, H, W = images.shape
    columns, zoom = columns or math.ceil(N**0.5), max(1, 128 // W)
    lines = 2 if any(captions) else 0
    cell_w, cell_h = W * zoom + 4, H * zoom + 4 + 12 * lines
    grid = Image.new("RGB", (columns * cell_w, -(-N // columns) * cell_h), "white")
    pen = ImageDraw.Draw(grid)
    for i, image in enumerate(images):
        x, y = i % columns * cell_w + 2, i // columns * cell_h + 2
        grid.paste(to_pil(as_rgb(image)).resize((W * zoom, H * zoom), Image.Resampling.NEAREST), (x, y))
        if lines:
            text = "\n".join(textwrap.wrap(captions[i], max(8, cell_w // 6))[:lines])
            pen.text((x, y + H * zoom), text.encode("latin-1", "replace").decode("latin-1"), fill="black")
    return grid


def save_grid(path, images, captions=(), columns=0):
    make_grid(images, captions, columns).save(path)


def save_png(path, image, settings):
    """Save a PIL image as a PNG with `settings` as JSON in its text "settings"."""
    info = PngInfo()
    info.add_text("settings", json.dumps(settings), zip=True)
    image.save(path, pnginfo=info)
