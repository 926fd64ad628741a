"""LAION-400M: up to 400 million images of the web with their alternative texts (Schuhmann et al. 2021), by their URLs.

    python data/laion400m/prepare.py --urls=DIR            # pip install img2dataset; DIR has the lists, as parquet
    python data/laion400m/prepare.py --urls=DIR --repack=False   # img2dataset's shards are enough
    python data/laion400m/prepare.py --fetched=DIR         # tar or parquet shards that img2dataset wrote before

The lists have the columns URL and TEXT, and NSFW and similarity. LAION withdrew those of LAION-400M in December 2023;
its later lists (Re-LAION) name some columns differently: rename them. Put the parquet files that you want into one
folder: a tenth of them is a tenth of the images. License: of the lists CC BY 4.0; every image has its own.
Size: 256 pixels, aspect ratio kept: about 25 KB an image, 10 TB for all (estimate); many of the links are dead by now.
Time: days on several machines for all; img2dataset shows its speed. On disk: in out_dir/.fetched img2dataset's own
shards (which can be trained on, --dataset=data/laion400m/.fetched); then train-*.tar and val-*.tar, without the broken,
tiny and duplicate, bpe.tiktoken, meta.json with the links that were lost and why, dropped.jsonl. When these are there,
.fetched may be deleted.
"""

import collections
import glob
import json
import os
import sys

sys.path.insert(0, os.path.abspath(os.path.join(os.path.dirname(__file__), "..", "..")))
from checkpoint import read_json, reject
from common import check_same_settings
from data.forms import IMAGES, NOWHERE, Index, captions_of, decode, parse, tar_samples
from data.prepare import check_source, need, pack, parquet_rows, run, save

urls = ""  # folder of parquet files with URL and TEXT, or one such file
fetched = ""  # img2dataset's tar or parquet output (its files: data/folder/prepare.py); default out_dir/.fetched
repack = True  # pack the fetched images into shards; False only reports
out_dir = "data/laion400m"  # folder for the shards
max_unsafe = "UNLIKELY"  # UNLIKELY | UNSURE | NSFW: keep images with NSFW up to this
min_similarity = 0.0  # keep images whose text is this similar (cosine of CLIP's embeddings), where the lists have it
min_side = 64  # >= 0: images with a shorter side are dropped
vocab_size = 32768  # 0 or >= 256: most tokens of a tokenizer trained on the captions; 0 trains none
workers = 8  # >= 0: processes that decode and resize; 0 uses only this one
threads = 64  # >= 1: connections of each process while fetching
# further settings, the same for all data sets: see data/prepare.py

UNSAFE = ("UNLIKELY", "UNSURE", "NSFW")


def fetch_urls(cfg, folder, **options):
    """Let img2dataset fetch and resize what the lists name; it skips the shards that it finished before."""
    img2dataset = need("img2dataset", "fetching by URL")
    os.makedirs(folder, exist_ok=True)
    now, mark = {"urls": cfg.urls, "size": cfg.size, "quality": cfg.quality}, f"{folder}/.settings"
    if os.path.exists(mark):  # img2dataset would skip the shards of another list or size too
        remedy = "delete it, or set another out_dir"
        check_same_settings(folder, read_json(mark, remedy), now, then="then", remedy=remedy)
    save(mark, json.dumps(now))
    img2dataset.download(
        output_folder=folder,
        output_format="webdataset",
        image_size=cfg.size,
        resize_mode="keep_ratio",
        resize_only_if_bigger=True,
        encode_quality=cfg.quality or 100,
        processes_count=max(cfg.workers, 1),
        thread_count=cfg.threads,
        number_sample_per_shard=10000,
        retries=1,
        **options,
    )


def count_links(folder):
    """Sums of img2dataset's *_stats.json: links, images, and how often each reason for a loss occurred."""
    total, reasons = collections.Counter(), collections.Counter()
    for path in sorted(glob.glob(f"{glob.escape(folder)}/*_stats.json")):
        with open(path, "rb") as f:
            stats = parse(f.read())  # {} where it was cut short
        total.update({name: n for name, n in stats.items() if isinstance(n, int)})
        reasons.update(stats.get("status_dict", {}))
    del reasons["success"]
    return dict(
        links=total["count"],
        images=total["successes"],
        not_downloaded=total["failed_to_download"],
        not_resized=total["failed_to_resize"],
        reasons=dict(reasons.most_common(20)),
    )


def report(links):
    if links["links"]:
        lost = links["links"] - links["images"]
        print(f"{links['links']} links: {links['images']} images, {lost} lost ({100 * lost / links['links']:.1f} %)")
        for reason, n in list(links["reasons"].items())[:10]:
            print(f"  {n:9d}  {' '.join(reason.split())[:100]}")


def from_tar(path):
    """(key, image, record) of each sample."""
    with open(path, "rb") as f:

        def read(_, offset, size):
            f.seek(offset)
            return f.read(size)

        for key, sample in tar_samples(f, Index()):
            image = next((sample[ending] for ending in sample if ending in IMAGES), None)
            if image is None:
                continue
            record = parse(read(*sample.get(".json", NOWHERE)))
            record = record if isinstance(record, dict) else {}  # damaged
            if not captions_of(record) and ".txt" in sample:
                record["text"] = decode(read(*sample[".txt"])).strip()
            yield key, (path, *image[1:]), record


def from_parquet(path):
    """The same; the rows of dead links have no image."""
    for row, image, record in parquet_rows(path):
        if record.get("status") in (None, "success"):
            yield record.get("key") or f"{os.path.basename(path)}/{row:06d}", image, record


def items(shards, unwanted=lambda record: ""):
    for path in shards:
        for key, image, record in (from_tar if path.endswith(".tar") else from_parquet)(path):
            item = dict(key=key, image=image, text=captions_of(record), url=record.get("url", ""))
            yield item | dict(drop=unwanted(record))


def from_urls(cfg, unwanted=lambda record: "", **options):
    """Fetch if there are lists, report the links, pack the shards; shared by both data sets of URLs."""
    folder = cfg.fetched or f"{cfg.out_dir}/.fetched"
    is_begun = cfg.repack and os.path.exists(f"{cfg.out_dir}/meta.json")  # then everything has been fetched
    if cfg.urls and not is_begun:
        fetch_urls(cfg, folder, **options)
    # beside each tar img2dataset writes a parquet file without the images
    tars, tables = (sorted(glob.glob(f"{glob.escape(folder)}/*.{ending}")) for ending in ("tar", "parquet"))
    if not tars and not tables and not is_begun:
        remedy = "set --urls to the lists, or --fetched to the output of img2dataset (tar or parquet)"
        reject(folder, "no shards", remedy)
    links = count_links(folder)
    report(links)
    if cfg.repack:
        pack(items(tars or tables, unwanted), cfg, total=links["images"] or None, links=links)


def prepare(cfg):
    allowed = UNSAFE[: UNSAFE.index(cfg.max_unsafe) + 1]

    def unwanted(record):
        if record.get("NSFW") not in (None, *allowed):
            return f"unsafe: {record['NSFW']}"
        similarity = record.get("similarity")
        is_unlike = isinstance(similarity, int | float) and similarity < cfg.min_similarity
        return f"unlike: similarity {similarity:.3f}" if is_unlike else ""

    if cfg.urls:
        check_source(cfg.urls, "the lists, as the top of this file says", "urls")
    columns = dict(input_format="parquet", url_col="URL", caption_col="TEXT")
    from_urls(cfg, unwanted, url_list=cfg.urls, save_additional_columns=["NSFW", "similarity"], **columns)


if __name__ == "__main__":
    run(prepare, globals())
