"""Make a small captioned data set of the system's color emoji, and compare sampled images with the training images.

    python data/emoji/prepare.py                                   # seconds: images, captions, tokenizer, prompts
    python data/emoji/prepare.py --font=FILE                       # another font with color bitmaps
    python data/emoji/prepare.py --compare=out/emoji_ldm/samples   # beside the nearest training images

Captions are Unicode names in plain words, "woman firefighter, dark skin tone". Every name has six images: a person's
skin tones, else six slightly different sizes and positions. Where Pillow has no libraqm, sequences of code points (skin
tones, genders, professions, flags) are left out.

Some combinations are in val only: each color as a square, a heart or a circle, each person in one skin tone, and the
faces of a third of the animals that have a body too. The images belong to the maker of the font; Noto Color Emoji has
the SIL Open Font License 1.1.
"""

import functools
import json
import os
import re
import sys
import unicodedata
import zlib

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont, features

sys.path.insert(0, os.path.abspath(os.path.join(os.path.dirname(__file__), "..", "..")))
from checkpoint import reject
from data.prepare import is_made, run, save, train_bpe
from grid import save_grid

font = ""  # a font with color bitmaps; "" is the system's Noto Color Emoji or Apple Color Emoji
size = 64  # >= 16: side of an image in pixels
seed = 0  # of sizes and positions
vocab_size = 4096  # >= 256: most tokens of the tokenizer; training stops earlier when each word is one token
out_dir = "data/emoji"  # where everything is written
compare = ""  # a folder with samples.jsonl and its images; compare these instead of making anything

FONTS = (
    "/usr/share/fonts/truetype/noto/NotoColorEmoji.ttf",  # Debian, Ubuntu
    "/usr/share/fonts/noto/NotoColorEmoji.ttf",  # Arch
    "/System/Library/Fonts/Apple Color Emoji.ttc",
)
BITMAPS = (109, 160)  # the size of Noto's bitmaps, and of Apple's largest
COUNTRIES = "/usr/share/zoneinfo/iso3166.tab"  # lines "FR\tFrance"; without it flags are left out
VARIANTS = 6  # images of a name, as many as a person has skin tones
JITTER = 0.01  # relative, uniform, both ways: of size and position

RANGES = (range(0x203C, 0x3300), range(0x1F000, 0x1FB00))
JOINER, AS_EMOJI = "\u200d", "\ufe0f"
TONES = dict(zip(("light", "medium-light", "medium", "medium-dark", "dark"), map(chr, range(0x1F3FB, 0x1F400))))
GENDERS = {"man": "\u2642", "woman": "\u2640"}
PEOPLE = {"person": "\U0001f9d1", "man": "\U0001f468", "woman": "\U0001f469"}
JOBS = {"farmer": "🌾", "cook": "🍳", "student": "🎓", "singer": "🎤", "artist": "🎨", "teacher": "🏫", "judge": "⚖️"}
JOBS |= {"factory worker": "🏭", "programmer": "💻", "office worker": "💼", "mechanic": "🔧", "scientist": "🔬"}
JOBS |= {"astronaut": "🚀", "firefighter": "🚒", "doctor": "⚕️", "pilot": "✈️", "with red hair": "🦰"}
JOBS |= {"with curly hair": "🦱", "with white hair": "🦳", "with a bald head": "🦲"}
COLORS = ("red", "orange", "yellow", "green", "blue", "purple", "brown", "black", "white")
FORMS = ("square", "heart", "circle")

# --- names ---

NOT_ALONE = "REGIONAL INDICATOR|FITZPATRICK|COMPONENT|JOINER|COMBINING|IDEOGRAPH|KATAKANA"
# black and white of old names mean filled and outlined, but for these
COLORED = r".* (square|circle|cross|button)$| heart$| flag$"
TYPOGRAPHIC = rf"\b(heavy|large(?! and)|ornament|sign$|(black|white)(?!{COLORED}))\b"
RENAMED = {"heavy black heart": "red heart", "heavy large circle": "red ring", "no entry sign": "prohibited"}
RENAMED |= {"medium white circle": "white circle", "medium black circle": "black circle", "adult": "person"}


def plain(name):
    """A Unicode name in plain words."""
    name = name.lower()
    return RENAMED.get(name) or " ".join(re.sub(TYPOGRAPHIC, "", name).split())


def with_gender(name, gender):
    renamed = re.sub(r"\b(person|man|woman)\b", gender, name)
    return renamed if gender in renamed.split() else f"{gender} {name}"


def list_emoji(has, countries=()):
    """{name: {caption: text}} of the emoji of a font: of a person in all skin tones, else one.

    has(text): whether the font draws it as one glyph.  countries: [(code of two letters, name), ...].
    """
    found = {}
    for c in map(chr, (code for codes in RANGES for code in codes)):
        name = unicodedata.name(c, "")
        if name and not re.search(NOT_ALONE, name) and has(c):
            found.setdefault(plain(name), c)  # of several with the same words the first
    both = [(name, gender) for name in found for gender in GENDERS]
    more = {with_gender(name, gender): found[name] + JOINER + GENDERS[gender] + AS_EMOJI for name, gender in both}
    more |= {f"{person} {job}": c + JOINER + tool for person, c in PEOPLE.items() for job, tool in JOBS.items()}
    for code, country in countries:
        more[f"flag of {country.lower()}"] = "".join(chr(0x1F1E6 + ord(letter) - ord("A")) for letter in code)
    found |= {name: text for name, text in more.items() if name not in found and has(text)}
    emoji = {}
    for name, text in found.items():
        toned = {f"{name}, {tone} skin tone": text[0] + modifier + text[1:] for tone, modifier in TONES.items()}
        emoji[name] = {name: text} | {caption: t for caption, t in toned.items() if has(t)}
    return emoji


def held_out(captions):
    """Those of the captions that are not trained on."""
    faces = sorted(c for c in captions if c.endswith(" face") and c.removesuffix(" face") in captions)
    held = set(faces[1::3])
    for caption in captions:
        name, _, tone = caption.removesuffix(" skin tone").partition(", ")
        color, _, form = caption.partition(" ")
        if tone == list(TONES)[zlib.crc32(name.encode()) % len(TONES)]:
            held.add(caption)
        if color in COLORS and form == FORMS[COLORS.index(color) % len(FORMS)]:
            held.add(caption)
    return held


# --- rendering ---


def load_font(path):
    file = path or next(filter(os.path.exists, FONTS), None)
    if not file:
        reject("color emoji", "no font is installed", "run `apt install fonts-noto-color-emoji`, or set --font=FILE")
    for bitmap in BITMAPS:
        try:
            loaded = ImageFont.truetype(file, bitmap)
            if np.ptp(draw(loaded, "😀"), axis=2).any():
                return loaded
        except OSError:  # no such file, not a font, or none of this size
            pass
    reject(file, "is not a font with color bitmaps", "set --font to NotoColorEmoji.ttf of fonts-noto-color-emoji")


def draw(font, text):
    """One glyph in the middle of a white image, 1.25 times as wide as an emoji."""
    side, (left, top, right, bottom) = round(1.25 * font.getlength("😀")), font.getbbox(text)
    image = Image.new("RGB", (side, side), "white")
    corner = ((side - left - right) / 2, (side - top - bottom) / 2)
    ImageDraw.Draw(image).text(corner, text, font=font, embedded_color=True)
    return image


def resize(image, side, key):
    """The middle of what `draw` gave as (side, side, 3) uint8; its size and position are functions of key."""
    scale, x, y = 1 + JITTER * np.random.default_rng(key).uniform(-1, 1, 3) * (1, 2, 2)
    half, width = 0.4 * image.width * scale, image.width / 2
    box = (width * x - half, width * y - half, width * x + half, width * y + half)
    return np.asarray(image.resize((side, side), Image.Resampling.LANCZOS, box))


# --- comparing ---


def compare_folder(folder, out_dir):
    """Write FOLDER/compare.png, of each sample: itself, an image of its prompt, the nearest training image.

    Printed is how many samples are nearer to an image of their own prompt than to all others, those of val included, by
    every second pixel both ways.
    """
    index = f"{folder}/samples.jsonl"
    for path, remedy in ((index, "generate some with sample.py"), (f"{out_dir}/meta.json", "run without --compare")):
        if not os.path.exists(path):
            reject(path, "no such file", remedy)
    captions, starts = [], {}
    for split in ("train", "val"):
        starts[split] = len(captions)
        with open(f"{out_dir}/{split}/captions.jsonl") as f:
            captions += [json.loads(line)["text"][0] for line in f]
    images = np.concatenate([np.load(f"{out_dir}/{split}/images.npy") for split in starts])
    with open(index) as f:
        records = [record for record in map(json.loads, f) if record["prompt"] in captions]
    if not records:
        reject(index, "none of its prompts is a caption here", "sample with --prompts=data/emoji/prompts.txt")
    prompts = [record["prompt"] for record in records]
    files = [f"{folder}/{os.path.basename(record['file'])}" for record in records]
    samples, wanted = [np.asarray(Image.open(file)) for file in files], images.shape[1:]
    for file, sample in zip(files, samples):
        if sample.shape != wanted:
            reject(file, f"is {sample.shape}, not {wanted}", f"sample RGB images with --size={wanted[0]}")
    samples = np.stack(samples)
    small, others = (torch.from_numpy(x[:, ::2, ::2].astype(np.float32)).flatten(1) for x in (samples, images))
    distances = torch.cdist(small, others)
    own = [captions.index(prompt) for prompt in prompts]
    copied = distances[:, : starts["val"]].argmin(1).tolist()
    rows = np.concatenate([samples, images[own], images[copied]], axis=2)
    save_grid(f"{folder}/compare.png", torch.from_numpy(rows).permute(0, 3, 1, 2) / 127.5 - 1, prompts)
    right = [captions[k] == prompt for k, prompt in zip(distances.argmin(1), prompts)]
    for name, is_held in (("trained", False), ("held-out", True)):
        hits = [hit for hit, k in zip(right, own) if (k >= starts["val"]) == is_held]
        print(f"{sum(hits)} of {len(hits)} samples of {name} prompts are nearest to an image of their prompt")


# --- files ---

SHOWN = """grinning face, face with tears of joy, smiling face with sunglasses, robot face, ghost, panda face, fox face
frog face, penguin, octopus, butterfly, lady beetle, elephant, snail, tropical fish, sunflower, cactus, christmas tree
mushroom, red apple, strawberry, watermelon, banana, hamburger, slice of pizza, birthday cake, hot beverage, rainbow
snowman, fire, crescent moon, rocket, police car, airplane, sailboat, soccer ball, guitar, crown, umbrella, bomb"""


def choose_prompts(trained, held):
    """Captions that occur in training, then 24 held-out ones."""
    shown = [name for name in SHOWN.replace("\n", ", ").split(", ") if name in trained]
    things, people = [[c for c in sorted(held) if (", " in c) == toned] for toned in (False, True)]
    return shown + things + people[:: max(len(people) // 12, 1)][: 24 - len(things)]


def prepare(cfg):
    if cfg.compare:
        compare_folder(cfg.compare, cfg.out_dir)
        return
    font, has_raqm = load_font(cfg.font), features.check("raqm")
    recipe = {name: cfg[name] for name in ("size", "seed", "vocab_size")} | dict(variants=VARIANTS, jitter=JITTER)
    recipe |= dict(font=font.getname(), raqm=has_raqm, unicode=unicodedata.unidata_version)
    if is_made(cfg.out_dir, recipe):
        return
    if not has_raqm:
        print("Pillow has no libraqm: no skin tones, genders, professions and flags")
    countries = []
    if os.path.exists(COUNTRIES):
        with open(COUNTRIES, encoding="utf-8") as f:
            countries = [line.split("\t") for line in f.read().splitlines() if not line.startswith("#")]
    draw_once = functools.cache(functools.partial(draw, font))
    one, missing = font.getlength("😀"), draw_once("\U0010ffff")
    emoji = list_emoji(lambda text: font.getlength(text) == one and draw_once(text) != missing, countries)
    held = held_out({caption for texts in emoji.values() for caption in texts})

    made = {"train": [], "val": []}
    for texts in emoji.values():
        for caption, text in texts.items():
            split, count = ("val", 1) if caption in held else ("train", VARIANTS // len(texts))
            keys = [(cfg.seed, zlib.crc32(caption.encode()), variant) for variant in range(count)]
            made[split] += [(caption, resize(draw_once(text), cfg.size, key)) for key in keys]
    for split in made:
        os.makedirs(f"{cfg.out_dir}/{split}", exist_ok=True)
        save(f"{cfg.out_dir}/{split}/images.npy", np.stack([image for _, image in made[split]]))
        lines = [json.dumps({"text": [caption]}) + "\n" for caption, _ in made[split]]
        save(f"{cfg.out_dir}/{split}/captions.jsonl", "".join(lines))
    trained = [caption for caption, _ in made["train"]]
    save(f"{cfg.out_dir}/bpe.tiktoken", train_bpe(trained, cfg.vocab_size))
    save(f"{cfg.out_dir}/prompts.txt", "\n".join(choose_prompts(trained, held)) + "\n")
    save(f"{cfg.out_dir}/meta.json", json.dumps(recipe, indent=1) + "\n")
    print(f"{cfg.out_dir}: {len(emoji)} names, {len(trained)} training images, {len(held)} held out")


if __name__ == "__main__":
    run(prepare, globals(), packs=False)
