"""CLIP's text towers: the tokenizer against open_clip's and transformers', the towers against theirs."""

import copy
import functools
import gzip
import importlib.util
import json
import pickle
import random
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from conftest import fill

from text import CLIPTextEncoder, CLIPTokenizer, QuickGELU, TextEncoder

TINY = b"#version: 0.2\nl o\nlo w</w>\n! !</w>\n"  # 512 lo, 513 low</w>, 514 !!</w>; 515 start, 516 end
SMALL = dict(width=32, layers=3, heads=4, length=12, vocab=517, merges=TINY)

HARD = [
    "",
    " \n\t ",
    "a photo of a cat",
    "A PHOTO of A Cat",
    "a red star,  a\tblue\n\ncircle \r\n",
    "naïve café, Ångström, ÇEDILLA, İstanbul, straße, ΣΊΣΥΦΟΣ, ǅ",
    "e\u0301 and \u00e9, a\u030a and \u00e5, \ufb01 ligature",
    "漢字とかな、한국어 텍스트，中文字符。",
    "مرحبا بالعالم and שלום עולם",
    "नमस्ते दुनिया, สวัสดีชาวโลก",
    "🌟👩‍🚀👨‍👩‍👧‍👦 🇫🇷🏳️‍🌈 ✈️ 😀😀😀",
    "zero\u200bwidth\u200djoin\u200cers\ufeff and \u00a0 \u3000 spaces \u2028 \u0085",
    "in 1984, 3.14159 and 1,000,000; x2 H2O 4k ½ ² Ⅷ ٣",
    "it's don't we're I've I'm you'll he'd IT'S 'S rock'n'roll ''s",
    "it\u2019s \u201cquoted\u201d \u2014 dashes\u2026",
    "it'\u017f and the \u212aelvin sign <\u017ftart_of_text>",
    "&lt;b&gt; &amp;amp; &amp;lt; &#39;s &eacute; &nbsp; &notanentity; &amp",
    "<b>bold</b> &amp;lt; &amp;amp;#39; &#x1F600;",
    "<start_of_text> <end_of_text> <END_OF_TEXT> <|endoftext|> </w> a</w> <start_of_text",
    "mojibake: schÃ¶n, donâ€™t, â˜ƒ",
    "\x00\x01\x07\x1b[31mred\x1b[0m\x7f\x80\x9f",
    "lone \ud83d surrogate",
    "\ufffd\uffff\U0010ffff\U000e0001 \ue000",
    "!!!!!!!!!! ??? ... --- ___ ***** #hashtag @name http://a.b/c?d=e&f=g $100 50%",
    "ſÿþ ÿÿÿ",
    "pneumonoultramicroscopicsilicovolcanoconiosis" * 8,
    "a" * 1000,
    "🙂" * 200,
    "word " * 75,
    "word " * 76,
    "word " * 500,
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


@pytest.fixture
def captions(test_data):
    lines = (test_data / "flickr8k_1000" / "metadata.jsonl").read_text().splitlines()
    return [caption for line in lines for caption in json.loads(line)["text"]]


@pytest.fixture(scope="module")
def tower():
    return fill(CLIPTextEncoder(**SMALL)).eval()


# --- the tokenizer ---


def test_ids_are_clips(merges):
    tokenizer = tokenizer_of(merges)
    assert (tokenizer.start, tokenizer.end, tokenizer.n_vocab) == (49406, 49407, 49408)
    assert tokenizer.encode_ordinary("a photo of a cat") == [320, 1125, 539, 320, 2368]  # as in everyone's notebooks
    assert tokenizer.encode_ordinary("") == []


def test_ids_from_merges_written_out():
    tokenizer = CLIPTokenizer(TINY)
    assert (tokenizer.start, tokenizer.end, tokenizer.n_vocab) == (515, 516, 517)
    a, l, o, w = (ord(c) - ord("!") for c in "alow")  # CLIP counts from "!"; + 256 ends a word
    cases = {"LOW": [513], "lo": [l, 256 + o], "low low": [513, 513], "allow": [a, l, 513], "lowa": [512, w, 256 + a]}
    cases |= {"!!": [514], "!": [256], "!!!": [0, 514], "é": [127, 256 + 102]}  # C3 A9, and below C3 A0
    cases |= {"à": [127, 256 + 188 + 66], "12": [256 + 16, 256 + 17], "low<END_OF_TEXT>": [513, 516]}
    for text, ids in cases.items():
        assert tokenizer.encode_ordinary(text) == ids, text


def test_hard_strings_give_open_clips_ids(merges, reference):
    tokenizer = tokenizer_of(merges)
    for text in HARD:
        assert tokenizer.encode_ordinary(text) == reference.encode(text), text


def test_captions_give_open_clips_ids(merges, reference, captions):
    tokenizer = tokenizer_of(merges)
    assert len(captions) == 5000
    for text in captions:
        assert tokenizer.encode_ordinary(text) == reference.encode(text), text


def test_random_strings_give_open_clips_ids(merges, reference):
    """Words glued from CLIP's own tokens, where a wrong order of merges would show, and any characters at all."""
    tokenizer, rng = tokenizer_of(merges), random.Random(0)
    tokens = [name.removesuffix("</w>") for name in list(reference.encoder)[512:-2]]
    tokens = [bytes(reference.byte_decoder[c] for c in name).decode("utf-8", "ignore") for name in tokens]
    texts = ["".join(rng.choices(tokens, k=rng.choice((2, 2, 3, 4, 8)))) for _ in range(3000)]
    texts += [" ".join("".join(rng.choices("etaoinshr", k=9)) for _ in range(5)) for _ in range(1000)]
    ranges = (range(128), range(0x2500), range(0xD800), range(0xE000, 0x110000))
    texts += ["".join(chr(rng.choice(rng.choice(ranges))) for _ in range(20)) for _ in range(2000)]
    for text in texts:
        assert tokenizer.encode_ordinary(text) == reference.encode(text), text


def test_folder_of_transformers(merges, transformers, captions, tmp_path):
    """vocab.json and merges.txt, as Stable Diffusion's folder `tokenizer` holds them; transformers reads them too."""
    lines = gzip.open(merges).read().decode().split("\n")[1 : 49152 - 256 - 2 + 1]
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    names = [chr(c) for c in (*plain, *range(256, 256 + 68))]
    names += [name + "</w>" for name in names] + [line.replace(" ", "") for line in lines]
    vocab = {name: i for i, name in enumerate((*names, "<|startoftext|>", "<|endoftext|>"))}
    (tmp_path / "merges.txt").write_text("\n".join(["#version: 0.2", *lines, ""]))
    (tmp_path / "vocab.json").write_text(json.dumps(vocab))
    ours = CLIPTextEncoder(8, 1, 1, merges=str(tmp_path))
    assert ours.bpe() == tokenizer_of(merges).merges

    theirs = transformers.CLIPTokenizer.from_pretrained(str(tmp_path))
    texts = ["", "naïve café 漢字 🌟", "it's 1984!!", "word " * 500, *captions[:500]]
    rows = theirs(texts, padding="max_length", max_length=77, truncation=True, return_tensors="pt").input_ids
    assert torch.equal(ours.tokenize(texts), rows)

    vocab["!"], vocab['"'] = vocab['"'], vocab["!"]
    (tmp_path / "vocab.json").write_text(json.dumps(vocab))
    with pytest.raises(ValueError, match="vocab.json numbers its tokens in another order than CLIP"):
        CLIPTokenizer(str(tmp_path))


def test_the_same_tokenizer_again(merges):
    first = tokenizer_of(merges)
    for again in (CLIPTokenizer(first.merges), copy.deepcopy(first), pickle.loads(pickle.dumps(first))):
        assert again.merges == first.merges and again.n_vocab == first.n_vocab
        assert [again.encode_ordinary(text) for text in HARD] == [first.encode_ordinary(text) for text in HARD]
    with open(merges, "rb") as f:
        assert CLIPTokenizer(f.read()).merges == first.merges


def test_merges_of_the_open_clip_package(merges, monkeypatch):
    if not importlib.util.find_spec("open_clip"):
        pytest.skip("no package open_clip")
    assert CLIPTokenizer().merges == tokenizer_of(merges).merges
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="pip install open_clip_torch, or give merges=PATH of bpe_simple_vocab"):
        CLIPTokenizer()


def test_without_ftfy(monkeypatch):
    tokenizer = CLIPTokenizer(TINY)
    pytest.importorskip("ftfy")
    assert tokenizer.encode_ordinary("low’s") == tokenizer.encode_ordinary("low's")
    monkeypatch.setitem(sys.modules, "ftfy", None)
    assert tokenizer.encode_ordinary(" LOW &amp;amp;\n low's") == tokenizer.encode_ordinary("low & low's")
    assert tokenizer.encode_ordinary("low’s") != tokenizer.encode_ordinary("low's")
    assert len(tokenizer.encode_ordinary("\ud83d")) == 1, "a lone surrogate is '?', not an error"


@pytest.mark.parametrize(
    "content, message",
    [
        (b"#version: 0.2\nl o\nx\n", "'x' does not merge two tokens before it"),
        (b"#version: 0.2\nl ow\n", "'l ow' does not merge two tokens before it"),
        (b"#version: 0.2\nl o\nl o\n", "a merge stands there twice"),
        (b"#version: 0.2\nl o\nlo w\no w\nl ow\n", "a merge stands there twice"),
        (b"YQ== 0\nYg== 1\n", "'YQ== 0' does not merge"),
        (b"\xff\xfe\xfd", "CLIP's merges cannot be read .* give merges=PATH"),
        (gzip.compress(TINY)[:20], "CLIP's merges cannot be read .* give merges=PATH"),
        (b"\x1f\x8bno gzip", "CLIP's merges cannot be read .* give merges=PATH"),
    ],
)
def test_bad_merges(tmp_path, content, message):
    (tmp_path / "merges.txt").write_bytes(content)
    for source in (content, str(tmp_path / "merges.txt"), tmp_path):
        with pytest.raises(ValueError, match=message):
            CLIPTokenizer(source)


def test_no_merges(tmp_path):
    for path in (tmp_path, tmp_path / "merges.txt"):
        with pytest.raises(ValueError, match="CLIP's merges are not at .*merges.txt: give merges=PATH"):
            CLIPTokenizer(str(path))


# --- rows of tokens ---


def test_rows_are_open_clips(merges, reference, captions):
    zero = CLIPTextEncoder(8, 1, 1, pad="zero", merges=merges)
    end = CLIPTextEncoder(8, 1, 1, pad="end", merges=merges)
    texts = HARD + captions[:500]
    rows, theirs = zero.tokenize(texts), reference(texts)
    assert torch.equal(rows, theirs) and rows.dtype == torch.long
    padded = torch.arange(77) >= torch.tensor([zero.count_tokens(text) for text in texts])[:, None]
    assert torch.equal(end.tokenize(texts), theirs.masked_fill(padded, 49407))


def test_one_string_is_no_list_of_prompts(tower):
    with pytest.raises(ValueError, match="one string, 'a red star', where a list of them is wanted"):
        tower("a red star")


def test_rows_are_cut_and_padded():
    kinds = {"end": CLIPTextEncoder(**SMALL, pad="end"), "zero": CLIPTextEncoder(**SMALL, pad="zero")}
    for name, tower in kinds.items():
        start, end, pad = 515, 516, 516 if name == "end" else 0
        assert (tower.start, tower.end, tower.pad, tower.length) == (start, end, pad, 12)
        rows = tower.tokenize(["low", "", "low " * 10, "low " * 11])
        assert rows[0].tolist() == [start, 513, end] + [pad] * 9
        assert rows[1].tolist() == [start, end] + [pad] * 10
        assert rows[2].tolist() == rows[3].tolist() == [start] + [513] * 10 + [end], "full, and cut: end stays last"
        assert [tower.count_tokens(text) for text in ("low", "", "low " * 10, "low " * 11)] == [3, 2, 12, 13]
        assert tower.tokenize([]).shape == (0, 12)


# --- the towers ---

NAMES = {"norm1": "layer_norm1", "norm2": "layer_norm2", "mlp.0": "mlp.fc1", "mlp.2": "mlp.fc2"}
NAMES |= {f"attn.to_{x}": f"self_attn.{y}_proj" for x, y in (("q", "q"), ("k", "k"), ("v", "v"), ("out", "out"))}


def from_transformers(theirs):
    """A CLIPTextModel's state dict in our names."""
    embeddings = {f"{name}_embedding": f"embeddings.{name}_embedding.weight" for name in ("token", "position")}
    prefix = "text_model." if any(name.startswith("text_model.") for name in theirs) else ""
    ours = {"token_embedding.weight": theirs[prefix + embeddings["token_embedding"]]}
    ours["position_embedding"] = theirs[prefix + embeddings["position_embedding"]]
    for kind in ("weight", "bias"):
        ours[f"norm_out.{kind}"] = theirs[f"{prefix}final_layer_norm.{kind}"]
        i = 0
        while f"{prefix}encoder.layers.{i}.layer_norm1.weight" in theirs:
            for name, other in NAMES.items():
                ours[f"blocks.{i}.{name}.{kind}"] = theirs[f"{prefix}encoder.layers.{i}.{other}.{kind}"]
            i += 1
    return ours


def from_open_clip(theirs, layers):
    """The text part of an open_clip model in our names, its first `layers` blocks."""
    ours = {"token_embedding.weight": theirs["token_embedding.weight"]}
    ours["position_embedding"] = theirs["positional_embedding"]
    for kind in ("weight", "bias"):
        ours[f"norm_out.{kind}"] = theirs[f"ln_final.{kind}"]
        for i in range(layers):
            block = f"transformer.resblocks.{i}"
            for name, part in zip("qkv", theirs[f"{block}.attn.in_proj_{kind}"].chunk(3)):
                ours[f"blocks.{i}.attn.to_{name}.{kind}"] = part
            names = {"norm1": "ln_1", "norm2": "ln_2", "attn.to_out": "attn.out_proj"}
            for name, other in (names | {"mlp.0": "mlp.c_fc", "mlp.2": "mlp.c_proj"}).items():
                ours[f"blocks.{i}.{name}.{kind}"] = theirs[f"{block}.{other}.{kind}"]
    return ours


TEXTS = ["low low!! slow", "", "a low owl, a lower bowl " * 3]


@pytest.mark.parametrize("activation", ["quick_gelu", "gelu"])
def test_tower_equals_transformers(transformers, activation):
    settings = dict(hidden_size=32, intermediate_size=128, num_hidden_layers=3, num_attention_heads=4)
    settings |= dict(max_position_embeddings=12, vocab_size=517, bos_token_id=515, eos_token_id=516, pad_token_id=516)
    theirs = fill(transformers.CLIPTextModel(transformers.CLIPTextConfig(**settings, hidden_act=activation))).eval()
    weights = from_transformers(theirs.state_dict())

    last = CLIPTextEncoder(**SMALL, activation=activation).eval()
    last.load_state_dict(weights)
    penultimate = CLIPTextEncoder(**SMALL, activation=activation, layer="penultimate").eval()
    penultimate.load_state_dict({name: w for name, w in weights.items() if not name.startswith("blocks.2.")})
    with torch.no_grad():
        out = theirs(input_ids=last.tokenize(TEXTS), output_hidden_states=True)
        torch.testing.assert_close(last(TEXTS), out.last_hidden_state, atol=1e-5, rtol=0)
        norm = {name: weights[f"norm_out.{name}"] for name in ("weight", "bias")}
        before = F.layer_norm(out.hidden_states[-2], (32,), **norm, eps=1e-5)
        torch.testing.assert_close(penultimate(TEXTS), before, atol=1e-5, rtol=0)
    assert (last(TEXTS) - penultimate(TEXTS)).abs().max() > 0.1, "or the comparison could not fail"


@pytest.mark.parametrize("activation", ["quick_gelu", "gelu"])
def test_tower_equals_open_clip(open_clip, activation):
    from open_clip import transformer

    act = {"quick_gelu": transformer.QuickGELU, "gelu": torch.nn.GELU}[activation]
    theirs = transformer.TextTransformer(12, 517, width=32, heads=4, layers=3, output_dim=8, act_layer=act)
    theirs = fill(theirs).eval()
    for layer, index in (("last", -1), ("penultimate", -2)):
        tower = CLIPTextEncoder(**SMALL, activation=activation, layer=layer, pad="zero").eval()
        tower.load_state_dict(from_open_clip(theirs.state_dict(), len(tower.blocks)))
        options = dict(normalize_intermediates=True, intermediates_only=True, output_fmt="NLC")
        with torch.no_grad():
            out = theirs.forward_intermediates(tower.tokenize(TEXTS), **options)["text_intermediates"]
            assert len(out) == 3
            torch.testing.assert_close(tower(TEXTS), out[index], atol=1e-5, rtol=0)


def test_activations_are_not_the_same(tower):
    other = CLIPTextEncoder(**SMALL, activation="gelu").eval()
    other.load_state_dict(tower.state_dict())
    with torch.no_grad():
        assert (other(TEXTS) - tower(TEXTS)).abs().max() > 1e-3
    x = torch.linspace(-8, 8, 1001)
    torch.testing.assert_close(QuickGELU()(x), x / (1 + torch.exp(-1.702 * x)))
    assert (QuickGELU()(x) - F.gelu(x)).abs().max() < 0.021


def test_named_towers(merges):
    """Parameter counts of the published towers: OpenAI's of ViT-L/14; 23 of the 24 blocks of OpenCLIP's ViT-H/14."""
    for name, count, width, blocks, pad in (
        ("clip_l", 123_060_480, 768, 12, 49407),
        ("openclip_h", 340_387_840, 1024, 23, 0),
    ):
        with torch.device("meta"):
            tower = CLIPTextEncoder.named(name, merges)
        assert sum(p.numel() for p in tower.parameters()) == count
        assert sum(t.numel() for t in tower.state_dict().values()) == count, "no buffers to carry about"
        assert (tower.length, len(tower.blocks), tower.pad) == (77, blocks, pad)
        assert tower(torch.zeros(2, 77, dtype=torch.long)).shape == (2, 77, width)
        with torch.device("meta"):
            again = CLIPTextEncoder(**json.loads(json.dumps(tower.settings)), merges=tower.bpe())
        assert again.settings == tower.settings and again.bpe() == tower.bpe()
        assert {k: v.shape for k, v in again.state_dict().items()} == {
            k: v.shape for k, v in tower.state_dict().items()
        }
    with pytest.raises(ValueError, match="text tower 'clip_g' is not one of clip_l, openclip_h"):
        CLIPTextEncoder.named("clip_g", merges)


@torch.no_grad()
def test_attention_is_causal(tower):
    tokens = tower.tokenize(["low low low a low!! wow"])
    out = tower(tokens)
    for i in range(tower.length):
        changed = tokens.clone()
        changed[0, i] = 42
        moved = (tower(changed) - out).abs().amax(dim=(0, 2))
        assert (moved[:i] == 0).all()
        assert (moved[i:] > 1e-4).all(), "itself and all behind it, padding too"
    whole = fill(TextEncoder(16, 2, 2, 12)).eval()  # the jointly trained one sees the whole prompt
    assert (whole(["a red star"]) - whole(["a red stay"]))[0, 0].abs().max() > 1e-4


@torch.no_grad()
def test_strings_tokens_copies_and_batches(tower):
    out = tower(TEXTS)
    assert out.shape == (3, 12, 32) and out.isfinite().all()
    assert torch.equal(tower(tower.tokenize(TEXTS)), out) and torch.equal(copy.deepcopy(tower)(TEXTS), out)
    torch.testing.assert_close(tower(TEXTS[::-1]).flip(0), out)
    torch.testing.assert_close(tower([TEXTS[2] + " and more"]), out[2:])  # cut alike
    assert (out[0] - out[1]).abs().max() > 1e-2
    again = CLIPTextEncoder(**tower.settings, merges=tower.bpe()).eval()
    again.load_state_dict(tower.state_dict())
    assert torch.equal(again(TEXTS), out)


def test_bad_settings():
    for wrong, message in (
        (dict(activation="relu"), "activation='relu' is not one of quick_gelu, gelu"),
        (dict(layer=-2), "layer=-2 is not one of last, penultimate"),
        (dict(pad="eot"), "pad='eot' is not one of end, zero"),
        (dict(heads=5), "width=32 does not divide into heads=5"),
        (dict(vocab=49408), "the merges make 517 tokens, the tower has 49408: are they CLIP's?"),
    ):
        with pytest.raises(ValueError, match=message):
            CLIPTextEncoder(**SMALL | wrong)
