"""LAION-400M: up to 400 million images of the web with their alternative texts (Schuhmann et al. 2021), by their URLs.

    python data/laion400m/prepare.py --urls=DIR            # pip install img2dataset; DIR holds the lists, as parquet
    python data/laion400m/prepare.py --urls=DIR --repack=False   # img2dataset's shards are enough
    python data/laion400m/prepare.py --fetched=DIR         # what img2dataset fetched before, on other machines perhaps

The lists have the columns URL and TEXT, and NSFW and similarity. LAION withdrew those of LAION-400M in December 2023;
its later lists (Re-LAION) name their columns otherwise here and there: rename them. Put the parquet files that you want
into one folder: a tenth of them is a tenth of the images. Licence: of the lists CC BY 4.0; every image has its own.
Size: 256 pixels, ratio kept: about 25 KB an image, 10 TB for all (estimate); many of the links are dead by now.
Time: days on several machines for all; img2dataset tells its speed. On disk: in out_dir/.fetched img2dataset's own
shards (which can be trained on, --dataset=data/laion400m/.fetched); then train-*.tar and val-*.tar, without the broken,
tiny and duplicate, bpe.tiktoken, meta.json with the links that were lost and why, dropped.jsonl, sheet.png. When these
are there, .fetched may go.
"""

import collections
import glob
import json
import os
import sys

sys.path.insert(0, os.path.abspath(os.path.join(os.path.dirname(__file__), "..", "..")))
from data.dataset import IMAGES, captions_of, field, parse
from data.prepare import make, need, run, tar_samples, write

urls = ""  # folder of parquet files with URL and TEXT, or one such file
fetched = ""  # img2dataset's output; out_dir/.fetched without
repack = True  # check what came, and pack it into shards; False: only report
out_dir = "data/laion400m"  # where the shards go
max_unsafe = "UNLIKELY"  # keep images with NSFW up to this: UNLIKELY, UNSURE, NSFW
min_similarity = 0.0  # keep images whose text is this similar (cosine of CLIP's embeddings), where the lists say
size = 256  # short side in pixels; smaller images stay as they are
crop = "none"  # keeps the ratio of the sides; center: the middle square
quality = 95  # of JPEG
min_side = 64  # pixels; images with a shorter side are dropped
drop_duplicates = True  # the first of equal images is kept; takes 9 bytes of memory an image
vocab_size = 32768  # most tokens of a tokenizer trained on the captions; 0: none
shard_mb = 256.0  # size of a shard
workers = 8  # processes that decode and resize; 0: none but this
threads = 64  # connections of each process while fetching

UNSAFE = ("UNLIKELY", "UNSURE", "NSFW")


def fetch_urls(cfg, folder, **options):
    """Has img2dataset fetch and resize what the lists name; it leaves out the shards that it has finished before."""
    img2dataset = need("img2dataset", "fetching by URL")
    if not os.path.exists(cfg.urls):
        raise ValueError(f"urls {cfg.urls} is not there: set it to the lists, as the top of this file says")
    os.makedirs(folder, exist_ok=True)
    now, mark = {"urls": cfg.urls, "size": cfg.size, "quality": cfg.quality}, f"{folder}/.settings"
    if os.path.exists(mark):  # img2dataset would take the shards of another list or size for done
        with open(mark) as f:
            before = json.load(f)
        if changed := [name for name in now if before.get(name) != now[name]]:
            told = f"{changed[0]}={before.get(changed[0])}, now it is {now[changed[0]]}"
            raise ValueError(f"{folder} was fetched with {told}: remove it, or set another out_dir")
    write(mark, json.dumps(now))
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


def number(value):
    return value if isinstance(value, int) else 0  # a damaged file's


def lost_links(folder):
    """What img2dataset's *_stats.json say in all: links, images, and how often each reason for a loss was met."""
    total, reasons = collections.Counter(), collections.Counter()
    for path in sorted(glob.glob(f"{glob.escape(folder)}/*_stats.json")):
        with open(path, "rb") as f:
            stats = parse(f.read())
        for name in ("count", "successes", "failed_to_download", "failed_to_resize"):
            total[name] += number(field(stats, [name]))
        statuses = field(stats, ["status_dict"])
        statuses = statuses if isinstance(statuses, dict) else {}
        reasons.update({name: number(n) for name, n in statuses.items() if name != "success"})
    links = dict(links=total["count"], images=total["successes"], not_downloaded=total["failed_to_download"])
    return links | dict(not_resized=total["failed_to_resize"], reasons=dict(reasons.most_common(20)))


def report(links):
    if links["links"]:
        lost = links["links"] - links["images"]
        print(f"{links['links']} links: {links['images']} images, {lost} lost ({100 * lost / links['links']:.1f} %)")
        for reason, n in list(links["reasons"].items())[:10]:
            print(f"  {n:9d}  {' '.join(reason.split())[:100]}")


def items(shards, unwanted=lambda record: ""):
    for path in shards:
        with open(path, "rb") as f:
            for key, sample in tar_samples(path):
                image = next((sample[ending] for ending in sample if ending in IMAGES), None)
                if image is None:
                    continue
                at, size = sample.get(".json", (0, 0))
                f.seek(at)
                record = parse(f.read(size)) if size else {}
                record = record if isinstance(record, dict) else {}  # a damaged file's
                texts = captions_of(record)
                if not texts and ".txt" in sample:
                    f.seek(sample[".txt"][0])
                    texts = captions_of(f.read(sample[".txt"][1]).decode("utf-8", "replace").strip())
                item = dict(key=key, image=(path, *image), text=texts, url=record.get("url", ""))
                yield item | dict(drop=unwanted(record))


def from_urls(cfg, unwanted=lambda record: "", **options):
    """Fetches where there are lists, reports the links, packs the shards; what both sets of URLs do."""
    folder = cfg.fetched or f"{cfg.out_dir}/.fetched"
    made = cfg.repack and os.path.exists(f"{cfg.out_dir}/meta.json")  # then nothing is fetched again
    if cfg.urls and not made:
        fetch_urls(cfg, folder, **options)
    shards = sorted(glob.glob(f"{glob.escape(folder)}/*.tar"))
    if not shards and not made:
        raise ValueError(f"{folder} has no tar shards: set urls to the lists, or fetched to what img2dataset made")
    links = lost_links(folder)
    report(links)
    if cfg.repack:
        make(items(shards, unwanted), cfg, total=links["images"] or None, links=links)


def prepare(cfg):
    if cfg.max_unsafe not in UNSAFE:
        raise ValueError(f"max_unsafe {cfg.max_unsafe!r} is not known: choose {', '.join(UNSAFE)}")
    allowed = UNSAFE[: UNSAFE.index(cfg.max_unsafe) + 1]

    def unwanted(record):
        if record.get("NSFW") not in (None, *allowed):
            return f"unsafe: {record['NSFW']}"
        similarity = record.get("similarity")
        unlike = isinstance(similarity, int | float) and similarity < cfg.min_similarity
        return f"unlike: similarity {similarity:.3f}" if unlike else ""

    columns = dict(input_format="parquet", url_col="URL", caption_col="TEXT")
    from_urls(cfg, unwanted, url_list=cfg.urls, save_additional_columns=["NSFW", "similarity"], **columns)


if __name__ == "__main__":
    run(prepare, globals())
