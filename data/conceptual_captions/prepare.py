"""Conceptual Captions: 3.3 million (CC3M, Sharma et al. 2018) or 12 million (CC12M) images and captions, by their URLs.

    python data/conceptual_captions/prepare.py --urls=Train_GCC-training.tsv     # pip install img2dataset
    python data/conceptual_captions/prepare.py --urls=cc12m.tsv --out_dir=data/cc12m
    python data/conceptual_captions/prepare.py --fetched=DIR                     # what img2dataset fetched before

The lists come from https://ai.google.com/research/ConceptualCaptions/download: lines of caption and URL (CC12M: URL and
caption), without a header, which is put before a copy of them. Licence: the lists may be used freely; every image has
its own. Size: 25 KB an image (estimate), 60 GB for CC3M; many of the links are dead by now. Time: hours (estimate).
On disk: in out_dir/.fetched the list with its header and img2dataset's own shards; then train-*.tar and val-*.tar,
without the broken, tiny and duplicate, bpe.tiktoken, meta.json with the links that were lost and why, dropped.jsonl,
sheet.png. When these are there, .fetched may go.
"""

import os
import shutil
import sys

sys.path.insert(0, os.path.abspath(os.path.join(os.path.dirname(__file__), "..", "..")))
from data.laion400m.prepare import from_urls
from data.prepare import run
from data.shards import rename

urls = ""  # Train_GCC-training.tsv or cc12m.tsv
fetched = ""  # img2dataset's output; out_dir/.fetched without
repack = True  # check what came, and pack it into shards; False: only report
out_dir = "data/conceptual_captions"  # where the shards go
size = 256  # short side in pixels; smaller images stay as they are
crop = "none"  # keeps the ratio of the sides; center: the middle square
quality = 95  # of JPEG
min_side = 64  # pixels; images with a shorter side are dropped
drop_duplicates = True  # the first of equal images is kept
vocab_size = 16384  # most tokens of a tokenizer trained on the captions; 0: none
shard_mb = 256.0  # size of a shard
workers = 8  # processes that decode and resize; 0: none but this
threads = 64  # connections of each process while fetching


def with_header(path, target):
    """A copy of a list with the line that img2dataset wants before it; which column is the URL, the list shows."""
    with open(path, "rb") as f:
        first = f.readline().rstrip(b"\r\n").split(b"\t")
        is_url = [word.startswith((b"http://", b"https://")) for word in first]
        if len(first) != 2 or sum(is_url) != 1:
            raise ValueError(f"{path} does not begin with a caption, a tab and a URL: fetch it again")
        f.seek(0)
        os.makedirs(os.path.dirname(target), exist_ok=True)
        with open(f"{target}.tmp", "wb") as out:
            out.write(b"\t".join(b"url" if at else b"caption" for at in is_url) + b"\n")
            shutil.copyfileobj(f, out)
            out.flush()
            os.fsync(out.fileno())
    rename(f"{target}.tmp", target)
    return target


def prepare(cfg):
    given = cfg.urls
    if given and not os.path.isfile(given):
        raise ValueError(f"urls {given} is not there: set it to Train_GCC-training.tsv or cc12m.tsv")
    listed = with_header(given, f"{cfg.fetched or cfg.out_dir + '/.fetched'}/urls.tsv") if given else ""
    from_urls(cfg, url_list=listed, input_format="tsv", url_col="url", caption_col="caption")


if __name__ == "__main__":
    run(prepare, globals())
