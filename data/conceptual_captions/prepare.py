"""Conceptual Captions: 3.3 million (CC3M, Sharma et al. 2018) or 12 million (CC12M) images and captions, by their URLs.

    python data/conceptual_captions/prepare.py --urls=Train_GCC-training.tsv     # pip install img2dataset
    python data/conceptual_captions/prepare.py --urls=cc12m.tsv --out_dir=data/cc12m
    python data/conceptual_captions/prepare.py --fetched=DIR    # tar or parquet shards that img2dataset wrote before

The lists come from https://ai.google.com/research/ConceptualCaptions/download: lines of caption and URL (CC12M: URL and
caption), without a header; a copy of them gets one. License: the lists may be used freely; every image has its own.
Size: 25 KB an image (estimate), 60 GB for CC3M; many of the links are dead by now. Time: hours (estimate).
On disk: in out_dir/.fetched the list with its header and img2dataset's own shards; then train-*.tar and val-*.tar,
without the broken, tiny and duplicate, bpe.tiktoken, meta.json with the links that were lost and why, dropped.jsonl.
When these are there, .fetched may be deleted.
"""

import os
import shutil
import sys

sys.path.insert(0, os.path.abspath(os.path.join(os.path.dirname(__file__), "..", "..")))
from checkpoint import reject, replacing
from data.laion400m.prepare import from_urls
from data.prepare import check_source, run

urls = ""  # Train_GCC-training.tsv or cc12m.tsv
fetched = ""  # img2dataset's tar or parquet output (its files: data/folder/prepare.py); default out_dir/.fetched
repack = True  # pack the fetched images into shards; False only reports
out_dir = "data/conceptual_captions"  # folder for the shards
min_side = 64  # >= 0: images with a shorter side are dropped
vocab_size = 16384  # 0 or >= 256: most tokens of a tokenizer trained on the captions; 0 trains none
workers = 8  # >= 0: processes that decode and resize; 0 uses only this one
threads = 64  # >= 1: connections of each process while fetching
# further settings, the same for all data sets: see data/prepare.py


def add_header(path, target):
    """Write a copy of a list with the header that img2dataset needs; the first line shows which column is the URL."""
    with open(path, "rb") as f:
        first = f.readline().rstrip(b"\r\n").split(b"\t")
        is_url = [word.startswith((b"http://", b"https://")) for word in first]
        if len(first) != 2 or sum(is_url) != 1:
            reject(path, "does not begin with a caption, a tab and a URL", "download it again")
        f.seek(0)
        os.makedirs(os.path.dirname(target), exist_ok=True)
        with replacing(target) as temporary, open(temporary, "wb") as file:
            file.write(b"\t".join(b"url" if yes else b"caption" for yes in is_url) + b"\n")
            shutil.copyfileobj(f, file)
    return target


def prepare(cfg):
    url_list = ""
    if cfg.urls:
        path = check_source(cfg.urls, "Train_GCC-training.tsv or cc12m.tsv", "urls")
        url_list = add_header(path, f"{cfg.fetched or cfg.out_dir + '/.fetched'}/urls.tsv")
    from_urls(cfg, url_list=url_list, input_format="tsv", url_col="url", caption_col="caption")


if __name__ == "__main__":
    run(prepare, globals())
