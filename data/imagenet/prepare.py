"""ImageNet (ILSVRC2012): 1,281,167 + 50,000 photos in 1000 classes (Russakovsky et al. 2015), or a part of it.

    python data/imagenet/prepare.py --source=DIR                     # all of it
    python data/imagenet/prepare.py --source=DIR --fraction=0.1      # a tenth of every class
    python data/imagenet/prepare.py --source=DIR --classes=n01440764,n02102040
    python data/imagenet/prepare.py --download=True                  # the hub's parquet, once its terms are accepted

DIR holds, of image-net.org (after registration), ILSVRC2012_img_train.tar, ILSVRC2012_img_val.tar and, for names and
validation labels, ILSVRC2012_devkit_t12.tar.gz (read with scipy) or Kaggle's LOC_synset_mapping.txt and
LOC_val_solution.csv. Or it holds the hub's parquet, after
`hf download --repo-type dataset ILSVRC/imagenet-1k --local-dir DIR`.
Without labels for it the validation tar is left out, and one training image in a hundred is held out instead.
Licence: non-commercial research and education, see image-net.org. Size: 145 GB fetched; about 70 GB made at 256 pixels
(estimate). Time: 200 images/s and core (measured on photos of 500 x 375). On disk: train-*.tar, val-*.tar, classes.json
(labels in the order of the synset ids), meta.json, dropped.jsonl, sheet.png. Equal images are kept, so
that the counts are the published ones.
"""

import io
import os
import re
import sys
import tarfile

sys.path.insert(0, os.path.abspath(os.path.join(os.path.dirname(__file__), "..", "..")))
from data.dataset import PIXELS, shard_part
from data.prepare import (
    digest,
    find_file,
    from_hub,
    in_fraction,
    make,
    need,
    need_source,
    parquet_files,
    parquet_names,
    parquet_rows,
    run,
)

source = ""  # folder with the tar files, or with the parquet files
download = False  # fetch the parquet files to the hub's cache (HF_HOME)
verify = False  # compare the tar files with the published checksums first: some minutes
out_dir = "data/imagenet"  # where the shards go
classes = ""  # only these, by synset id, label or first name, with commas between; they are numbered anew
fraction = 1.0  # of the training images of each class; a smaller fraction is a part of a larger one
size = 256  # short side in pixels; smaller images stay as they are
crop = "none"  # keeps the ratio of the sides; center: the middle square
quality = 95  # of JPEG; 0: PNG
min_side = 32  # pixels; images with a shorter side are dropped
drop_duplicates = False  # the first of equal images is kept
shard_mb = 256.0  # size of a shard
workers = 8  # processes that decode and resize; 0: none but this

TRAIN, VAL, KIT = "ILSVRC2012_img_train.tar", "ILSVRC2012_img_val.tar", "ILSVRC2012_devkit_t12.tar.gz"
MD5 = {TRAIN: "1d675b47d978889d74fa0da5fadfb00e", VAL: "29b22e2961454d5413ddabcf34fc5622"}


def read_kit(source):
    """({synset id: names}, [synset id of validation image 1, 2, ...]), as far as the files beside the tars say."""
    names, truth = {}, []
    if path := find_file(source, "LOC_synset_mapping.txt"):
        with open(path) as f:
            names = dict(line.strip().split(" ", 1) for line in f if " " in line.strip())
    if path := find_file(source, "LOC_val_solution.csv"):
        with open(path) as f:
            rows = [re.match(r"ILSVRC2012_val_(\d+),(n\d+)", line) for line in f]
        truth = [synset for _, synset in sorted((int(row[1]), row[2]) for row in rows if row)]
    path = find_file(source, KIT)
    if path and not (names and truth):
        scipy = need("scipy.io", f"reading {KIT}")
        with tarfile.open(path, "r:gz") as tar:
            files = {os.path.basename(m.name): tar.extractfile(m).read() for m in tar if m.isfile()}
        try:
            synsets = scipy.loadmat(io.BytesIO(files["meta.mat"]), squeeze_me=True)["synsets"]
            of_number = {int(row["ILSVRC2012_ID"]): (str(row["WNID"]), str(row["words"])) for row in synsets}
            numbers = files["ILSVRC2012_validation_ground_truth.txt"].split()
            truth = [of_number[int(number)][0] for number in numbers]
            names = {synset: words for number, (synset, words) in of_number.items() if number <= 1000}
        except (KeyError, ValueError, TypeError) as e:
            raise ValueError(f"{path} does not read ({e}): fetch it again") from None
    return names, truth


def choose(synsets, names, wanted):
    """{old label: new label} of the classes that wanted names; all without."""
    wanted = [word.strip() for word in wanted.split(",") if word.strip()]
    of_word = {name.split(",")[0].lower(): i for i, name in reversed(list(enumerate(names)))}
    of_word |= {str(i): i for i in range(len(names))} | {synset: i for i, synset in enumerate(synsets)}
    for word in wanted:
        if word.lower() not in of_word:
            raise ValueError(f"class {word!r} is not there: give synset ids ({synsets[0]}), labels or first names")
    chosen = sorted({of_word[word.lower()] for word in wanted}) if wanted else range(len(names))
    return {old: new for new, old in enumerate(chosen)}


def from_tars(source, synsets, truth, label_of, fraction):
    with tarfile.open(f"{source}/{TRAIN}", "r:") as tar:
        for member in sorted((m for m in tar if m.name.endswith(".tar")), key=lambda m: m.name):
            synset = member.name.removesuffix(".tar")
            label = label_of.get(synsets.index(synset))
            if label is None:
                continue
            with tarfile.open(fileobj=tar.extractfile(member), mode="r:") as inner:
                for m in inner:
                    key = f"{synset}/{os.path.splitext(m.name)[0]}"
                    if m.isfile() and in_fraction(key, fraction):
                        image = (f"{source}/{TRAIN}", member.offset_data + m.offset_data, m.size)
                        item = dict(key=key, image=image, label=label)
                        yield item | ({"split": "train"} if truth else {})
    if truth:
        with tarfile.open(f"{source}/{VAL}", "r:") as tar:
            for m in sorted((m for m in tar if m.name.endswith(".JPEG")), key=lambda m: m.name):
                synset = truth[int(re.search(r"(\d+)\.JPEG", m.name)[1]) - 1]
                label = label_of.get(synsets.index(synset)) if synset in synsets else None
                if label is not None:
                    image = (f"{source}/{VAL}", m.offset_data, m.size)
                    yield dict(key=f"val/{m.name.removesuffix('.JPEG')}", image=image, split="val", label=label)


def from_parquet(files, label_of, fraction):
    for path in files:
        name = os.path.basename(path).removesuffix(".parquet")
        split = {"train": "train", "validation": "val", "val": "val"}.get(shard_part(name))
        for row, image, record in parquet_rows(path, PIXELS, ["label"]) if split else ():
            key, label = f"{name}/{row:06d}", label_of.get(record["label"])
            if label is not None and (split == "val" or in_fraction(key, fraction)):
                yield dict(key=key, image=image, split=split, label=label)


def prepare(cfg):
    if cfg.download and not cfg.source:
        cfg.source = from_hub("ILSVRC/imagenet-1k", ["data/train-*", "data/validation-*"])
    source = need_source(cfg, f"a folder with {TRAIN} or parquet files, or add --download=True")
    if files := parquet_files(source):
        names = parquet_names(files[0], "label")
        if not names:
            labels = (r["label"] for path in files for *_, r in parquet_rows(path, PIXELS, ["label"]))
            highest = max((label for label in labels if isinstance(label, int)), default=-1)
            if highest < 0:
                raise ValueError(f"{source} has no numbers for labels: take the hub's own files")
            names = [str(i) for i in range(highest + 1)]
        synsets = names
    elif os.path.exists(f"{source}/{TRAIN}"):
        for name, md5 in MD5.items() if cfg.verify else ():
            if os.path.exists(f"{source}/{name}") and digest(f"{source}/{name}", "md5") != md5:
                raise ValueError(f"{source}/{name} is not the published file (md5 {md5}): fetch it again")
        with tarfile.open(f"{source}/{TRAIN}", "r:") as tar:
            synsets = sorted(m.name.removesuffix(".tar") for m in tar if m.name.endswith(".tar"))
        words, truth = read_kit(source)
        truth = truth if os.path.exists(f"{source}/{VAL}") else []
        names = [words.get(synset, synset) for synset in synsets]
    else:
        raise ValueError(f"{source} holds neither {TRAIN} nor parquet files: see the top of this file")
    label_of = choose(synsets, names, cfg.classes)
    if files:
        items = from_parquet(files, label_of, cfg.fraction)
    else:
        items = from_tars(source, synsets, truth, label_of, cfg.fraction)
    make(items, cfg, [names[old] for old in label_of])


if __name__ == "__main__":
    run(prepare, globals())
