"""Tokenizers against open_clip and tiktoken; encoders by golden values (against transformers': test_convert.py)."""

import base64
import copy
import functools
import gzip
import importlib.util
import json
import os
import pickle
import random
import sys
from pathlib import Path

import pytest
import tiktoken
import torch
from conftest import fill, refused

import checkpoint
import convert
from checkpoint import UserError
from text import CLIPTextEncoder, CLIPTokenizer, LayoutTokenizer, TextEncoder, make_tokenizer

PROMPTS = ["a red star", "", "naïve 漢字", "🌟👩‍🚀 two\n\tlines  ", "x" * 2000]
MERGES = [b"re", b"red", b" red", b" s", b" st"]
TINY = b"#version: 0.2\nl o\nlo w</w>\n! !</w>\n"  # 512 lo, 513 low</w>, 514 !!</w>; 515 start, 516 end
SMALL = dict(width=32, layers=3, heads=4, length=12, vocab=517, merges=TINY)


def tiktoken_file(merges=MERGES):
    tokens = [bytes([i]) for i in range(256)] + merges
    return b"".join(base64.b64encode(token) + b" %d\n" % i for i, token in enumerate(tokens))


# --- BPE and bytes ---


def test_tokenizers_decode_what_they_encode(tmp_path):
    file = tmp_path / "bpe.tiktoken"
    file.write_bytes(tiktoken_file() + b"\n")
    for source, size in (("bytes", 256), (b"bytes", 256), (str(file), 261), (tiktoken_file(), 261)):
        tokenizer = make_tokenizer(source)
        assert tokenizer.n_vocab == size
        for prompt in PROMPTS:
            assert tokenizer.decode(tokenizer.encode_ordinary(prompt)) == prompt
        if size == 256:
            assert tokenizer.encode_ordinary(PROMPTS[2]) == list(PROMPTS[2].encode())
        else:
            assert tokenizer.encode_ordinary("a red st") == [ord("a"), 258, 260]


BAD_FILES = [
    (b"no base64 here", "not a .tiktoken file"),
    (b"YQ== zero\n", "not a .tiktoken file of 'base64 rank' lines .ValueError: invalid literal"),
    (tiktoken_file()[:-3], "ranks are not 0, 1, 2, ..."),  # truncated: the last rank is 2
    (b"".join(tiktoken_file().splitlines(True)[1:]), "a single byte is missing"),
]


@pytest.mark.parametrize("content, message", BAD_FILES)
def test_bad_tokenizer_files(tmp_path, content, message):
    file = tmp_path / "bad.tiktoken"
    file.write_bytes(content)
    for source, path in ((content, "tokenizer"), (str(file), str(file))):
        with pytest.raises(UserError, match=f"^{path}: .*{message}"):
            make_tokenizer(source)


def test_unknown_tokenizer_names(monkeypatch, tmp_path):
    for name in ("gpt7", str(tmp_path)):
        refused("not a file, and tiktoken cannot load it (ValueError: ", make_tokenizer, name)

    def offline(name):
        raise ConnectionError("no network")

    monkeypatch.setattr(tiktoken, "get_encoding", offline)
    refused("cannot load it (ConnectionError: no network)", make_tokenizer, "gpt2")


def test_bpe_is_a_source_of_the_same_tokenizer(monkeypatch):
    ranks = {bytes([255 - i]): i for i in range(256)}
    own = tiktoken.Encoding("own", pat_str=r"\S+|\s+", mergeable_ranks=ranks, special_tokens={"<|endoftext|>": 256})
    monkeypatch.setattr(tiktoken, "get_encoding", {"own": own}.__getitem__)
    for source, bpe, end in (("bytes", None, 256), (tiktoken_file(), tiktoken_file(), 261), ("own", b"own", 257)):
        first = TextEncoder(8, 1, 1, 30, source)
        again = TextEncoder(8, 1, 1, 30, first.bpe())
        assert bpe is None or first.bpe() == bpe
        assert again.bpe() == first.bpe() and (again.end, again.pad) == (end, end + 1)
        assert torch.equal(again.tokenize(PROMPTS), first.tokenize(PROMPTS))


# --- layouts ---


def test_layout_tokens_are_the_class_and_two_cells():
    tokenizer = LayoutTokenizer(["circle", "red star", "area 51"], grid=4)
    assert tokenizer.n_vocab == 3 + 16
    assert tokenizer.encode_ordinary("red star 0.1 0.3 0.6 1") == [1, 3 + 4 * 1 + 0, 3 + 4 * 3 + 2]
    text = " circle  0 0 0.24 0.25 ;area 51 0.5 0.5 0.5 0.5;;"
    assert tokenizer.parse(text) == [("circle", 0, 0, 0.24, 0.25), ("area 51", 0.5, 0.5, 0.5, 0.5)]
    assert tokenizer.encode_ordinary(text) == [0, 3, 3 + 4, 2, 3 + 4 * 2 + 2, 3 + 4 * 2 + 2]
    assert tokenizer.encode_ordinary("") == tokenizer.encode_ordinary(" ; ") == []
    assert LayoutTokenizer(["a"]).encode_ordinary("a 0 0 1 1") == [0, 1, 1024]


def test_layout_rows_hold_complete_objects():
    source = 'layout {"names": ["red circle", "grün"], "grid": 8}'
    texts = ["red circle 0 0 0.5 0.5; grün 0.1 0.2 0.9 1", "", "; ".join(["grün 0 0 1 1"] * 9)]
    first = TextEncoder(8, 1, 1, 11, source)
    assert (first.end, first.pad) == (66, 67)
    rows = first.tokenize(texts)
    assert rows[0].tolist() == [0, 2, 2 + 36, 1, 2 + 8, 2 + 63, 66, 67, 67, 67, 67]
    assert rows[1].tolist() == [66] + [67] * 10 and rows[2].tolist() == [1, 2, 65] * 3 + [66, 67], "three of nine"
    assert first.count_tokens(texts[0]) == 7
    for again in (TextEncoder(8, 1, 1, 11, first.bpe()), TextEncoder(8, 1, 1, 11, first.bpe().decode())):
        assert again.bpe() == first.bpe() and torch.equal(again.tokenize(texts), rows)


BAD_LAYOUTS = [
    ("circle 0 0 1 1; tree 0 0 1 1", "'tree 0 0 1 1': unknown class 'tree'; choose from circle, red star"),
    ("circle 0 0 1", "layout 'circle 0 0 1': not an object; write each one as NAME X0 Y0 X1 Y1"),
    ("circle 0 0 1 one", "not an object"),
    ("0 0 1 1", "not an object"),
    ("circle 0.6 0 0.5 1", "not a box; give 0 <= x0 <= x1 <= 1"),
    ("circle 0 0 1 1.01", "not a box"),
    ("circle -0.1 0 1 1", "not a box"),
    ("circle nan 0 1 1", "not a box"),
]
BAD_SOURCES = [
    ("layout ", "tokenizer layout: invalid .*; write layout"),
    (b"layout [1]", "tokenizer layout: invalid"),
    ('layout {"grid": 4}', "tokenizer layout: invalid"),
    ("layout " + "[" * 100_000, "tokenizer layout: invalid"),
    ('layout {"names": []}', r"layout classes: \[\]"),
    ('layout {"names": ["a", "b", "a"]}', r"layout classes: \['a'\]"),
    ('layout {"names": ["a", " b", "c;", 3]}', r"layout classes: \[' b', 'c;', 3\]"),
    ('layout {"names": ["a"], "grid": 1}', "layout grid: 1"),
    ('layout {"names": ["a"], "grid": 1000000000}', "layout grid: 1000000000"),
    ('layout {"names": ["a"], "grid": "x"}', "layout grid: 'x'"),
]


def test_bad_layouts():
    tokenizer = LayoutTokenizer(["circle", "red star"])
    for function, bad in ((tokenizer.encode_ordinary, BAD_LAYOUTS), (make_tokenizer, BAD_SOURCES)):
        for text, message in bad:
            with pytest.raises(UserError, match=message):
                function(text)


# --- CLIP's tokenizer ---

HARD = [
    "",
    " \n\t ",
    "a photo of a cat",
    "A PHOTO of A Cat",
    "a red star,  a\tblue\n\ncircle \r\n",
    "naïve café, Ångström, ÇEDILLA, İstanbul, straße, ΣΊΣΥΦΟΣ, ǅ",
    "e\u0301 and \u00e9, a\u030a and \u00e5, \ufb01 ligature",
    "漢字とかな、한국어 텍스트，中文字符。",
    "مرحبا بالعالم and שלום עולם नमस्ते दुनिया, สวัสดีชาวโลก",
    "🌟👩‍🚀👨‍👩‍👧‍👦 🇫🇷🏳️‍🌈 ✈️ 😀😀😀",
    "zero\u200bwidth\u200djoin\u200cers\ufeff and \u00a0 \u3000 spaces \u2028 \u0085",
    "in 1984, 3.14159 and 1,000,000; x2 H2O 4k ½ ² Ⅷ ٣",
    "it's don't we're I've I'm you'll he'd IT'S 'S rock'n'roll ''s",
    "it\u2019s \u201cquoted\u201d \u2014 dashes\u2026",
    "it'\u017f and the \u212aelvin sign <\u017ftart_of_text>",
    "&lt;b&gt; &amp;amp; &amp;lt; &#39;s &eacute; &nbsp; &notanentity; &amp <b>bold</b> &#x1F600;",
    "<start_of_text> <end_of_text> <END_OF_TEXT> <|endoftext|> </w> a</w> <start_of_text",
    "mojibake: schÃ¶n, donâ€™t, â˜ƒ",
    "\x00\x01\x07\x1b[31mred\x1b[0m\x7f\x80\x9f",
    "lone \ud83d surrogate \ufffd\uffff\U0010ffff\U000e0001 \ue000",
    "!!!!!!!!!! ??? ... --- ___ ***** #hashtag @name http://a.b/c?d=e&f=g $100 50% ſÿþ ÿÿÿ",
    "pneumonoultramicroscopicsilicovolcanoconiosis" * 8,
    "a" * 1000,
    "🙂" * 200,
    *("word " * n for n in (75, 76, 500)),
]

tokenizer_of = functools.cache(CLIPTokenizer)  # a tenth of a second each


@pytest.fixture
def merges(request):
    """CLIP's own file: open_clip's copy, else the one among the real data."""
    found = importlib.util.find_spec("open_clip")
    folder = Path(found.origin).parent if found else request.getfixturevalue("test_data") / "assets"
    return str(folder / "bpe_simple_vocab_16e6.txt.gz")


@pytest.fixture
def reference(open_clip, merges):
    from open_clip.tokenizer import SimpleTokenizer

    return SimpleTokenizer(merges)


def test_ids_of_clip(merges):
    tokenizer = tokenizer_of(merges)
    assert (tokenizer.start, tokenizer.end, tokenizer.n_vocab) == (49406, 49407, 49408)
    assert importlib.util.find_spec("open_clip") is None or CLIPTokenizer().merges == tokenizer.merges
    assert tokenizer.encode_ordinary("a photo of a cat") == [320, 1125, 539, 320, 2368]  # as in CLIP's notebooks
    with open(merges, "rb") as file:
        sources = [tokenizer.merges, file.read()]
    for again in (*map(CLIPTokenizer, sources), copy.deepcopy(tokenizer), pickle.loads(pickle.dumps(tokenizer))):
        assert again.merges == tokenizer.merges and again.n_vocab == tokenizer.n_vocab
        assert [again.encode_ordinary(text) for text in HARD] == [tokenizer.encode_ordinary(text) for text in HARD]


def test_ids_from_merges_written_out():
    tokenizer = CLIPTokenizer(TINY)
    assert (tokenizer.start, tokenizer.end, tokenizer.n_vocab) == (515, 516, 517)
    a, l, o, w = (ord(c) - ord("!") for c in "alow")  # CLIP counts from "!"; + 256 ends a word
    cases = {"LOW": [513], "lo": [l, 256 + o], "low low": [513, 513], "allow": [a, l, 513], "lowa": [512, w, 256 + a]}
    cases |= {"!!": [514], "!": [256], "!!!": [0, 514], "é": [127, 256 + 102]}  # C3 A9, and below C3 A0
    cases |= {"à": [127, 256 + 188 + 66], "12": [256 + 16, 256 + 17], "low<END_OF_TEXT>": [513, 516], "": []}
    for text, ids in cases.items():
        assert tokenizer.encode_ordinary(text) == ids, text


def test_ids_are_open_clips(merges, reference, test_data):
    """Hard strings, captions, words glued from CLIP's tokens (where the order of merges shows), any characters."""
    tokenizer, rng = tokenizer_of(merges), random.Random(0)
    lines = (test_data / "flickr8k_1000" / "metadata.jsonl").read_text().splitlines()
    texts = HARD + [caption for line in lines[::2] for caption in json.loads(line)["text"]]
    tokens = [name.removesuffix("</w>") for name in list(reference.encoder)[512:-2]]
    tokens = [bytes(reference.byte_decoder[c] for c in name).decode("utf-8", "ignore") for name in tokens]
    texts += ["".join(rng.choices(tokens, k=rng.choice((2, 2, 3, 4, 8)))) for _ in range(2000)]
    texts += [" ".join("".join(rng.choices("etaoinshr", k=9)) for _ in range(5)) for _ in range(500)]
    ranges = (range(128), range(0x2500), range(0xD800), range(0xE000, 0x110000))
    texts += ["".join(chr(rng.choice(rng.choice(ranges))) for _ in range(20)) for _ in range(1000)]
    assert len(texts) > 5000
    for text in texts:
        assert tokenizer.encode_ordinary(text) == reference.encode(text), text


def test_rows_are_open_clips(merges, reference):
    zero, end = (CLIPTextEncoder(8, 1, 1, pad=pad, merges=merges) for pad in ("zero", "end"))
    rows, theirs = zero.tokenize(HARD), reference(HARD)
    assert torch.equal(rows, theirs) and rows.dtype == torch.long
    padded = torch.arange(77) >= torch.tensor([zero.count_tokens(text) for text in HARD])[:, None]
    assert torch.equal(end.tokenize(HARD), theirs.masked_fill(padded, 49407))


def test_a_folder_with_vocab_json(tmp_path):
    """As the folder `tokenizer` of Stable Diffusion: merges.txt, and vocab.json, whose order must be CLIP's."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    names = [chr(c) for c in (*plain, *range(256, 256 + 68))]
    names += [name + "</w>" for name in names] + ["lo", "low</w>", "!!</w>", "<|startoftext|>", "<|endoftext|>"]
    vocab = {name: i for i, name in enumerate(names)}
    (tmp_path / "merges.txt").write_bytes(TINY)
    (tmp_path / "vocab.json").write_text(json.dumps(vocab))
    assert CLIPTokenizer(str(tmp_path)).merges == TINY
    vocab["!"], vocab['"'] = vocab['"'], vocab["!"]
    (tmp_path / "vocab.json").write_text(json.dumps(vocab))
    refused("vocab.json: has another order of tokens than CLIP; fetch it again", CLIPTokenizer, str(tmp_path))


def test_without_ftfy(monkeypatch):
    pytest.importorskip("ftfy")
    tokenizer = CLIPTokenizer(TINY)
    assert tokenizer.encode_ordinary("low’s") == tokenizer.encode_ordinary("low's")
    monkeypatch.setitem(sys.modules, "ftfy", None)
    assert tokenizer.encode_ordinary(" LOW &amp;amp;\n low's") == tokenizer.encode_ordinary("low & low's")
    assert tokenizer.encode_ordinary("low’s") != tokenizer.encode_ordinary("low's")
    assert tokenizer.encode_ordinary("e\u0301") == tokenizer.encode_ordinary("\u00e9")
    assert len(tokenizer.encode_ordinary("\ud83d")) == 1, "a lone surrogate is '?', not an error"


BAD_MERGES = [
    (b"#version: 0.2\nl o\nx\n", "'x' does not merge two earlier tokens"),
    (b"#version: 0.2\nl ow\n", "'l ow' does not merge two earlier tokens"),
    (b"#version: 0.2\nl o\nlo w\no w\nl ow\n", "a merge is repeated"),
    (b"\xff\xfe\xfd", "cannot be read .*set --clip_vocab=FILE"),
    (gzip.compress(TINY)[:20], "cannot be read .*set --clip_vocab=FILE"),
    (gzip.compress(os.urandom(999))[:-9] + b"x" * 9, "cannot be read .*set --clip_vocab=FILE"),
    (gzip.compress(b"\0" * 2**27), "more than 64 MB"),
]


@pytest.mark.parametrize("content, message", BAD_MERGES)
def test_bad_merges(tmp_path, content, message):
    (tmp_path / "merges.txt").write_bytes(content)
    for source in (content, tmp_path):
        with pytest.raises(UserError, match=message):
            CLIPTokenizer(source)
    refused("nowhere: no such file", CLIPTokenizer, f"{tmp_path}/nowhere")


# --- encoders ---

TEXTS = ["low low!! slow", "", "a low owl, a lower bowl " * 3]


@pytest.fixture(scope="module")
def tower():
    return fill(CLIPTextEncoder(**SMALL)).eval()


@pytest.fixture(scope="module")
def joint():
    return fill(TextEncoder(32, 2, 2, 12, tiktoken_file())).eval()


def test_rows_are_cut_and_padded(joint):
    assert joint.tokenize([" " * 10**6]).tolist() == [[32] * 11 + [261]], "which tiktoken cannot encode"
    rows = joint.tokenize(["a red star", "", "abcdefghijk", "abcdefghijkl"])
    assert (joint.end, joint.pad) == (261, 262) and rows.dtype == torch.long
    assert rows[0].tolist() == [ord("a"), 258, 260, ord("a"), ord("r"), 261] + [262] * 6
    assert rows[1].tolist() == [261] + [262] * 11
    assert rows[2].tolist() == rows[3].tolist() == [*b"abcdefghijk", 261], "full, and cut: the end token stays"
    assert [joint.count_tokens(p) for p in PROMPTS[:3]] == [6, 1, len(PROMPTS[2].encode()) + 1]
    for pad, pad_id in (("end", 516), ("zero", 0)):
        tower = CLIPTextEncoder(**SMALL, pad=pad)
        rows = tower.tokenize(["low", "", "low " * 10, "low " * 11])
        assert rows[0].tolist() == [515, 513, 516] + [pad_id] * 9 and rows[1].tolist() == [515, 516] + [pad_id] * 10
        assert rows[2].tolist() == rows[3].tolist() == [515] + [513] * 10 + [516]
        assert [tower.count_tokens(text) for text in ("low", "", "low " * 11)] == [3, 2, 13]
    assert tower.tokenize([]).shape == joint.tokenize([]).shape == (0, 12)


@pytest.mark.parametrize("name", ["tower", "joint"])
@torch.no_grad()
def test_strings_tokens_copies_and_batches(request, name):
    encoder = request.getfixturevalue(name)
    out = encoder(TEXTS)
    assert out.shape == (3, 12, 32) and out.isfinite().all()
    assert torch.equal(encoder(encoder.tokenize(TEXTS)), out) and torch.equal(copy.deepcopy(encoder)(TEXTS), out)
    torch.testing.assert_close(encoder(TEXTS[::-1]).flip(0), out, msg="padding does not depend on the batch")
    assert (out[0] - out[1]).abs().max() > 1e-2
    with pytest.raises(AssertionError, match="prompts='a red star': must be a list of strings"):
        encoder("a red star")


@torch.no_grad()
def test_what_attention_sees(tower, joint):
    tokens = tower.tokenize(["low low low a low!! wow"])
    out = tower(tokens)
    for i in range(tower.length):
        changed = tokens.clone()
        changed[0, i] = 42
        moved = (tower(changed) - out).abs().amax(dim=(0, 2))
        assert (moved[:i] == 0).all() and (moved[i:] > 1e-4).all(), "causal"
    assert (joint(["a red star"]) - joint(["a red stay"]))[0, 0].abs().max() > 1e-4, "not causal"


def test_published_towers(merges):
    """Parameter counts of OpenAI's ViT-L/14 and of 23 of the 24 blocks of OpenCLIP's ViT-H/14."""
    published = [("clip_l", 123_060_480, 768, 12, 49407), ("openclip_h", 340_387_840, 1024, 23, 0)]
    for name, count, width, blocks, pad in published:
        with torch.device("meta"):
            tower = CLIPTextEncoder(**convert.TOWERS[name], merges=merges)
            again = CLIPTextEncoder(**json.loads(json.dumps(tower.settings)), merges=tower.bpe())
        assert sum(t.numel() for t in tower.state_dict().values()) == count
        assert (tower.length, tower.width, len(tower.blocks), tower.pad) == (77, width, blocks, pad)
        assert again.settings == tower.settings and again.bpe() == tower.bpe()


JOINT = dict(text_width=16, text_layers=2, text_heads=2, text_length=12)
GOLDEN = [  # fingerprint of the initial weights (seed 0), spread of the float64 outputs by `fill`
    (TextEncoder, JOINT, 42.681892, 0.75825071),
    (CLIPTextEncoder, SMALL, -100.79669, 0.78683917),
    (CLIPTextEncoder, dict(**SMALL, activation="gelu"), -100.79669, 0.78926006),
    (CLIPTextEncoder, dict(**SMALL, layer="penultimate", pad="zero"), -13.352375, 0.81925957),
]


@pytest.mark.parametrize("make, settings, initial, spread", GOLDEN)
def test_golden_values(make, settings, initial, spread):
    """Of the order in which modules are made, their scales and outputs; gradients reach every parameter."""
    torch.manual_seed(0)
    encoder = make(**settings)
    weights = [(i + 1, p) for i, p in enumerate(encoder.parameters()) if p.ndim > 1]
    assert sum(i * p.double().flatten()[::7].sum().item() for i, p in weights) == pytest.approx(initial, rel=1e-5)
    out = fill(encoder).double()(TEXTS)
    assert out.diff(dim=1).std().item() == pytest.approx(spread, rel=1e-6)
    out.square().mean(dim=(0, 1)).mul(torch.arange(out.shape[2])).sum().backward()
    for name, p in encoder.named_parameters():
        assert p.grad.isfinite().all() and (name.endswith("to_k.bias") or p.grad.abs().sum() > 0), name


BAD_SETTINGS = [
    (CLIPTextEncoder, dict(activation="relu"), "activation='relu': must be one of quick_gelu, gelu"),
    (CLIPTextEncoder, dict(layer=-2), "layer=-2: must be one of last, penultimate"),
    (CLIPTextEncoder, dict(pad="eot"), "pad='eot': must be one of end, zero"),
    (CLIPTextEncoder, dict(vocab=49408), "vocab=49408: the merges have 517 tokens"),
    (TextEncoder, dict(text_width=16, text_heads=3), "text width 16: must be a multiple of the number of heads, 3"),
]


def test_bad_settings():
    for make, wrong, message in BAD_SETTINGS:
        with pytest.raises(AssertionError, match=message):
            make(**(SMALL if make is CLIPTextEncoder else {}) | wrong)


def test_the_frozen_encoder_of_a_checkpoint(tmp_path, monkeypatch):
    tower = fill(CLIPTextEncoder(**SMALL | dict(heads=1))).eval()
    small = {name: tower.settings[name] for name in convert.TOWERS["clip_l"]}
    monkeypatch.setitem(convert.TOWERS, "clip_l", small)
    weights, merges, other = f"{tmp_path}/clip.pt", f"{tmp_path}/merges.txt", f"{tmp_path}/other.pt"
    torch.save(tower.state_dict(), weights)
    torch.save(fill(copy.deepcopy(tower), 1).state_dict(), other)
    Path(merges).write_bytes(TINY)
    model = {"cond": "text", "text_encoder": "clip_l", "tower_hash": checkpoint.hash_weights(tower)}
    meta = {"stage": "ldm", "model": model, "config": {"tower_weights": weights, "clip_vocab": merges}}

    def run(name, **changes):
        path = f"{tmp_path}/{name}.safetensors"
        checkpoint.write(path, {"ema.w": torch.ones(1)}, meta | {"model": model | changes})
        return path

    ours = run("ours")
    found = CLIPTextEncoder.of_checkpoint(ours)
    assert torch.equal(found(TEXTS), tower(TEXTS)) and not any(p.requires_grad for p in found.parameters())
    for name, changes in (("joint", dict(text_encoder="joint")), ("classes", dict(cond="class"))):
        assert CLIPTextEncoder.of_checkpoint(run(name, **changes)) is None
    for path in (other, f"{tmp_path}/nowhere.pt"):
        refused("set --tower_weights=FILE", CLIPTextEncoder.of_checkpoint, ours, weights=path)
    os.rename(weights, f"{tmp_path}/moved.pt")
    assert torch.equal(CLIPTextEncoder.of_checkpoint(ours, f"{tmp_path}/moved.pt")(TEXTS), tower(TEXTS))
