"""FFHQ: 70,000 faces of 1024 x 1024 pixels from Flickr (Karras et al. 2019).

    python data/ffhq/prepare.py --source=DIR
    python data/ffhq/prepare.py --source=DIR --size=1024 --quality=0

DIR has images1024x1024 (00000/00000.png ... 69000/69999.png) or thumbnails128x128, as download_ffhq.py of
https://github.com/NVlabs/ffhq-dataset fetches them, or is a .zip of them.
License: CC BY-NC-SA 4.0 for the set; every image has its own license, listed in ffhq-dataset-v2.json.
Size: 89 GB to download (thumbnails: 2 GB); about 3 GB made at 256 pixels. Time: 26 images/s and core (PNG).
On disk: train-*.tar (the first 60,000), val-*.tar (the last 10,000, as its authors ask), meta.json, dropped.jsonl.
"""

import os
import sys

sys.path.insert(0, os.path.abspath(os.path.join(os.path.dirname(__file__), "..", "..")))
from checkpoint import reject
from data.prepare import check_source, list_images, pack, run

source = ""  # folder with 00000.png ..., in sub-folders or not, or a .zip
out_dir = "data/ffhq"  # folder for the shards
workers = 8  # >= 0: processes that decode and resize; 0 uses only this one
# further settings, the same for all data sets: see data/prepare.py

N_TRAIN = 60000


def items(images):
    for path, image in images:
        number = os.path.splitext(os.path.basename(path))[0]
        if not number.isdigit():
            reject(path, "is not named by a number, as 00000.png", "set --source to the folder of those")
        yield dict(key=number, image=image, split="train" if int(number) < N_TRAIN else "val")


def prepare(cfg):
    images = list_images(check_source(cfg.source, "the folder of 00000.png ... 69999.png"))
    pack(items(images), cfg, total=len(images))


if __name__ == "__main__":
    run(prepare, globals())
