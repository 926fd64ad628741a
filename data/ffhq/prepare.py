"""FFHQ: 70,000 faces of 1024 x 1024 pixels from Flickr (Karras et al. 2019).

    python data/ffhq/prepare.py --source=DIR
    python data/ffhq/prepare.py --source=DIR --size=1024 --quality=0

DIR holds images1024x1024 (00000/00000.png ... 69000/69999.png) or thumbnails128x128, as download_ffhq.py of
https://github.com/NVlabs/ffhq-dataset fetches them, or is a .zip of them.
Licence: CC BY-NC-SA 4.0 for the set; every picture has a licence of its own, listed in ffhq-dataset-v2.json.
Size: 89 GB fetched (thumbnails: 2 GB); about 3 GB made at 256 pixels. Time: 26 images/s and core, it is all PNG.
On disk: train-*.tar (the first 60,000), val-*.tar (the last 10,000, as its authors ask), meta.json, dropped.jsonl,
sheet.png.
"""

import os
import sys

sys.path.insert(0, os.path.abspath(os.path.join(os.path.dirname(__file__), "..", "..")))
from data.prepare import list_images, make, need_source, run

source = ""  # folder that holds 00000.png ..., in sub-folders or not, or a .zip
out_dir = "data/ffhq"  # where the shards go
size = 256  # side in pixels
crop = "none"  # or center; they are square
quality = 95  # of JPEG; 0: PNG
min_side = 32  # pixels; images with a shorter side are dropped
drop_duplicates = True  # the first of equal images is kept
shard_mb = 256.0  # size of a shard
workers = 8  # processes that decode and resize; 0: none but this

N_TRAIN = 60000


def items(images):
    for path, image in images:
        number = os.path.splitext(os.path.basename(path))[0]
        if not number.isdigit():
            raise ValueError(f"{path} is not named by its number, as 00000.png: set source to the folder of those")
        yield dict(key=number, image=image, split="train" if int(number) < N_TRAIN else "val")


def prepare(cfg):
    images = list_images(need_source(cfg, "the folder of 00000.png ... 69999.png"))
    make(items(images), cfg, total=len(images))


if __name__ == "__main__":
    run(prepare, globals())
