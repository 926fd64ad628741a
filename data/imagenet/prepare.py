"""ImageNet (ILSVRC2012): 1,281,167 + 50,000 photos in 1000 classes (Russakovsky et al. 2015), or a part of it.

    python data/imagenet/prepare.py --source=DIR                     # all of it
    python data/imagenet/prepare.py --source=DIR --fraction=0.1      # a tenth of every class
    python data/imagenet/prepare.py --source=DIR --classes=n01440764,n02102040
    python data/imagenet/prepare.py --download=True                  # the hub's parquet, once its terms are accepted

DIR has, from image-net.org (after registration), ILSVRC2012_img_train.tar, ILSVRC2012_img_val.tar and, for names and
validation labels, ILSVRC2012_devkit_t12.tar.gz (read with scipy) or Kaggle's LOC_synset_mapping.txt and
LOC_val_solution.csv. Or it has the hub's parquet, after
`hf download --repo-type dataset ILSVRC/imagenet-1k --local-dir DIR`.
Without labels for it the validation tar is left out, and one training image in a hundred is held out instead.
License: non-commercial research and education, see image-net.org. Size: 145 GB to download; about 70 GB made at
256 pixels (estimate). Time: 200 images/s and core (measured on photos of 500 x 375).
On disk: train-*.tar, val-*.tar, classes.json (labels in the order of the synset ids), meta.json, dropped.jsonl.
Identical images are kept, so that the counts are the published ones.
"""

import io
import os
import re
import sys
import tarfile

sys.path.insert(0, os.path.abspath(os.path.join(os.path.dirname(__file__), "..", "..")))
from checkpoint import UserError, reject
from data.forms import shard_split
from data.prepare import (
    check_source,
    digest,
    find_file,
    from_hub,
    in_fraction,
    list_images,
    need,
    pack,
    parquet_files,
    parquet_names,
    parquet_rows,
    reading,
    run,
)

source = ""  # folder with the tar files, or with the parquet files
download = False  # fetch the parquet files to the hub's cache (HF_HOME)
verify = False  # compare the tar files with the published checksums first (some minutes)
out_dir = "data/imagenet"  # folder for the shards
classes = ""  # only these, by synset id, label or first name, with commas between; they are renumbered
fraction = 1.0  # in (0, 1]: of the training images of each class; a smaller fraction is a subset of a larger one
drop_duplicates = False  # keep only the first of identical images
workers = 8  # >= 0: processes that decode and resize; 0 uses only this one
# further settings, the same for all data sets: see data/prepare.py

TRAIN, VAL, KIT = "ILSVRC2012_img_train.tar", "ILSVRC2012_img_val.tar", "ILSVRC2012_devkit_t12.tar.gz"
MD5 = {TRAIN: "1d675b47d978889d74fa0da5fadfb00e", VAL: "29b22e2961454d5413ddabcf34fc5622"}
KIT_FILES = ("meta.mat", "ILSVRC2012_validation_ground_truth.txt")


def read_kit(source):
    """({synset id: names}, [synset id of validation image 1, 2, ...]), as far as there are files for them."""
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
        with reading(path), tarfile.open(path, "r:gz") as tar:
            members = {os.path.basename(m.name): m for m in tar if m.isfile()}
            files = {name: tar.extractfile(members[name]).read() for name in KIT_FILES if name in members}
        with reading(path, "cannot be read"):
            synsets = scipy.loadmat(io.BytesIO(files["meta.mat"]), squeeze_me=True)["synsets"]
            by_number = {int(row["ILSVRC2012_ID"]): (str(row["WNID"]), str(row["words"])) for row in synsets}
            truth = [by_number[int(number)][0] for number in files[KIT_FILES[1]].split()]
            names = {synset: words for number, (synset, words) in by_number.items() if number <= 1000}
    return names, truth


def choose(synsets, names, wanted):
    """{old label: new label} of the classes in `wanted`, all if it is empty."""
    wanted = [word.strip() for word in wanted.split(",") if word.strip()]
    number = {name.split(",")[0].lower(): i for i, name in reversed(list(enumerate(names)))}
    number |= {str(i): i for i in range(len(names))} | {synset: i for i, synset in enumerate(synsets)}
    if unknown := [word for word in wanted if word.lower() not in number]:
        raise UserError(f"--classes has {unknown[0]!r}: use synset ids (such as {synsets[0]}), labels or first names")
    chosen = sorted({number[word.lower()] for word in wanted}) if wanted else range(len(names))
    return {old: new for new, old in enumerate(chosen)}


def from_tars(source, truth, label_of, fraction):
    with reading(f"{source}/{TRAIN}"), tarfile.open(f"{source}/{TRAIN}", "r:") as tar:
        for member in sorted((m for m in tar if m.name.endswith(".tar")), key=lambda m: m.name):
            synset = member.name.removesuffix(".tar")
            if synset not in label_of:
                continue
            with tarfile.open(fileobj=tar.extractfile(member), mode="r:") as inner:
                for m in inner:
                    key = f"{synset}/{os.path.splitext(m.name)[0]}"
                    if m.isfile() and in_fraction(key, fraction):
                        image = (f"{source}/{TRAIN}", member.offset_data + m.offset_data, m.size)
                        yield dict(key=key, image=image, label=label_of[synset], split="train" if truth else None)
    for name, image in list_images(f"{source}/{VAL}") if truth else ():
        synset = truth[int(re.search(r"(\d+)\.JPEG", name)[1]) - 1]
        if synset in label_of:
            yield dict(key=f"val/{name.removesuffix('.JPEG')}", image=image, split="val", label=label_of[synset])


def from_parquet(files, label_of, fraction):
    for path in files:
        name = os.path.basename(path).removesuffix(".parquet")
        split = {"train": "train", "validation": "val", "val": "val"}.get(shard_split(name))
        for row, image, record in parquet_rows(path, ["label"]) if split else ():
            key, label = f"{name}/{row:06d}", label_of.get(record["label"])
            if label is not None and (split == "val" or in_fraction(key, fraction)):
                yield dict(key=key, image=image, split=split, label=label)


def prepare(cfg):
    hub = "ILSVRC/imagenet-1k", ["data/train-*", "data/validation-*"]
    source = cfg.source or (from_hub(*hub) if cfg.download else "")
    check_source(source, f"a folder with {TRAIN} or parquet files, or add --download=True")
    if files := parquet_files(source):
        names = synsets = parquet_names(files[0], "label")
        if not names:
            labels = [r["label"] for path in files for *_, r in parquet_rows(path, ["label"])]
            highest = max((label for label in labels if isinstance(label, int)), default=-1)
            if highest < 0:
                reject(source, "no numbers in the column label", "use the hub's own files")
            names = synsets = [str(i) for i in range(highest + 1)]
    elif os.path.exists(f"{source}/{TRAIN}"):
        for name, md5 in MD5.items() if cfg.verify else ():
            if os.path.exists(f"{source}/{name}") and digest(f"{source}/{name}") != md5:
                reject(f"{source}/{name}", f"is not the published file (md5 {md5})", "download it again")
        with reading(f"{source}/{TRAIN}"), tarfile.open(f"{source}/{TRAIN}", "r:") as tar:
            synsets = sorted(m.name.removesuffix(".tar") for m in tar if m.name.endswith(".tar"))
        words, truth = read_kit(source)
        truth = truth if os.path.exists(f"{source}/{VAL}") else []
        names = [words.get(synset, synset) for synset in synsets]
    else:
        reject(source, f"has neither {TRAIN} nor parquet files", "see the top of data/imagenet/prepare.py")
    label_of = choose(synsets, names, cfg.classes)
    if files:
        items = from_parquet(files, label_of, cfg.fraction)
    else:
        items = from_tars(source, truth, {synsets[old]: new for old, new in label_of.items()}, cfg.fraction)
    pack(items, cfg, [names[old] for old in label_of])


if __name__ == "__main__":
    run(prepare, globals())
