"""Text: tokenizers, the text encoder trained with the U-Net, CLIP's frozen text encoders, and layouts as tokens.

text = TextEncoder(text_width=128)                            # tokens are UTF-8 bytes
text = TextEncoder(tokenizer="out/bpe.tiktoken")              # or a BPE of one's own (data/prepare.py), or "gpt2"
text = TextEncoder(tokenizer='layout {"names": ["cat"]}')     # boxes: "cat 0.1 0.2 0.5 0.6; ..."
text = CLIPTextEncoder.from_pretrained("clip-vit-large-patch14")
context = text(["a red star", ""])                            # (B,length,width)
"""

import base64
import html
import json
import os
import unicodedata

import torch
import torch.nn as nn

import checkpoint
import convert
from attention import Attention
from checkpoint import reject

# --- tokenizers: encode_ordinary(string) -> ids, n_vocab, name ---

# GPT-2's pattern, which splits text into words before BPE; data/prepare.py trains with it too
SPLIT_PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"


def make_tokenizer(source="bytes"):
    """The tokenizer that `source` describes, a tiktoken.Encoding or a LayoutTokenizer.

    source: "bytes"; a .tiktoken file, by path or content; a name that tiktoken knows and may download ("gpt2", ...);
    or `layout {"names": [...], "grid": 32}`. TextEncoder.bpe() is a source of the same tokenizer, as bytes.
    """
    import tiktoken

    if source[:7] in ("layout ", b"layout "):
        return LayoutTokenizer.from_json(source[7:])
    if isinstance(source, bytes) and b" " not in source:  # a name, from a checkpoint
        source = source.decode("utf-8", "replace")
    if source == "bytes":
        ranks = {bytes([i]): i for i in range(256)}
    elif isinstance(source, bytes):
        ranks = read_ranks(source, "tokenizer")
    elif os.path.isfile(source):
        with open(source, "rb") as file:
            ranks = read_ranks(file.read(), source)
    else:
        remedy = "use bytes, a .tiktoken file or one of tiktoken's names"
        with checkpoint.reading(f"tokenizer {source!r}", "not a file, and tiktoken cannot load it", remedy):
            return tiktoken.get_encoding(source)
    return tiktoken.Encoding("bpe", pat_str=SPLIT_PATTERN, mergeable_ranks=ranks, special_tokens={})


def read_ranks(content, path):
    """{token: rank} from the content of a .tiktoken file, lines of "base64(token) rank"."""
    remedy = "train one with data/prepare.py"
    with checkpoint.reading(path, "not a .tiktoken file of 'base64 rank' lines", remedy):
        lines = (line.split() for line in content.splitlines() if line.strip())
        ranks = {base64.b64decode(token): int(rank) for token, rank in lines}
    if sorted(ranks.values()) != list(range(len(ranks))) or not all(bytes([i]) in ranks for i in range(256)):
        reject(path, "its ranks are not 0, 1, 2, ..., or a single byte is missing", remedy)
    return ranks


class LayoutTokenizer:
    """Boxes as text, "red circle 0.10 0.20 0.50 0.60; ...", three tokens each: the class and the cells of two corners.

    A box is a class name and x0 y0 x1 y1 as fractions of the image's sides, y downwards. Ids are those of the names, in
    their order, then those of grid * grid cells, row by row (Rombach et al. 2022, arXiv 2112.10752, appendix on
    layout-to-image). The empty string has no tokens.
    """

    group = 3  # tokens of one object, which are never split

    def __init__(self, names, grid=32):
        """names: class names, unique, without ";".  grid: cells along each side, 2 to 1024."""
        self.names, self.grid = list(names), grid
        bad = [n for n in self.names if not isinstance(n, str) or not n.strip() or n != n.strip() or ";" in n]
        bad = bad or sorted({n for n in self.names if self.names.count(n) > 1})
        if bad or not self.names:
            reject("layout classes", f"{bad or self.names}", "give unique names without ; and outer spaces")
        if not isinstance(grid, int) or not 2 <= grid <= 1024:
            reject("layout grid", f"{grid!r}", "give the number of cells along a side, 2 to 1024")
        self.ids = {name: i for i, name in enumerate(self.names)}
        self.n_vocab = len(self.names) + grid * grid
        self.name = "layout " + json.dumps({"names": self.names, "grid": grid})  # a source for make_tokenizer

    @classmethod
    def from_json(cls, text):
        with checkpoint.reading("tokenizer layout", "invalid", 'write layout {"names": ["cat", "dog"], "grid": 32}'):
            settings = json.loads(text)
            names, grid = settings["names"], settings.get("grid", 32)
        return cls(names, grid)

    def parse(self, text):
        """[(name, x0, y0, x1, y1), ...] of a layout."""
        objects = []
        for part in filter(None, (part.strip() for part in text.split(";"))):
            try:
                name, *box = part.rsplit(None, 4)
                x0, y0, x1, y1 = map(float, box)
            except ValueError:
                reject(f"layout {part!r}", "not an object", "write each one as NAME X0 Y0 X1 Y1, separated by ;")
            if name not in self.ids:
                some = ", ".join(self.names[:8]) + (", ..." if len(self.names) > 8 else "")
                reject(f"layout {part!r}", f"unknown class {name!r}", f"choose from {some}")
            if not (0 <= x0 <= x1 <= 1 and 0 <= y0 <= y1 <= 1):
                reject(f"layout {part!r}", "not a box", "give 0 <= x0 <= x1 <= 1 and 0 <= y0 <= y1 <= 1, y downwards")
            objects.append((name, x0, y0, x1, y1))
        return objects

    def cell(self, x, y):
        column, row = (min(int(v * self.grid), self.grid - 1) for v in (x, y))
        return len(self.names) + row * self.grid + column

    def encode_ordinary(self, text):
        return [
            i for name, *box in self.parse(text) for i in (self.ids[name], self.cell(*box[:2]), self.cell(*box[2:]))
        ]


# CLIP's pattern: spaces are left out, each digit is a word
CLIP_PATTERN = r"<start_of_text>|<end_of_text>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"


class CLIPTokenizer:
    """CLIP's byte-pair encoding, run by tiktoken: the same ids as open_clip's.

    tiktoken merges bytes by rank and has no end-of-word mark, so each word gets the byte 0xFF appended, which UTF-8
    never uses; the merges of 0xFF with single bytes (ids 256-511) come before all others. As in CLIP, ftfy repairs the
    text first if it is installed; without it curly quotes and broken encodings have other ids, composed letters not.
    """

    def __init__(self, merges=None):
        """merges: CLIP's merges, see convert.read_merges; None: those of the package open_clip, if installed."""
        import regex
        import tiktoken

        lines, vocab, where = convert.read_merges(merges)
        letters = convert.byte_letters()
        token = {letter: bytes([b]) for letter, b in letters.items()}
        token |= {letter + "</w>": bytes([b, 255]) for letter, b in letters.items()}
        for line in lines:
            try:
                first, second = line.split()
                token[first + second] = token[first] + token[second]
            except (ValueError, KeyError):
                reject(where, f"{line[:40]!r} does not merge two earlier tokens", convert.AGAIN)
        ranks = {b: i for i, b in enumerate(token.values())}
        if len(ranks) != 512 + len(lines):
            reject(where, "a merge is repeated", convert.AGAIN)
        if vocab is not None and any(vocab.get(name) != i for i, name in enumerate(token)):
            reject(f"{merges}/vocab.json", "has another order of tokens than CLIP", convert.AGAIN)
        self.merges = "\n".join(["#version: 0.2", *lines, ""]).encode()  # a merges.txt, for the same tokenizer
        self.start, self.end, self.n_vocab = len(ranks), len(ranks) + 1, len(ranks) + 2
        self.pattern = regex.compile(CLIP_PATTERN, regex.IGNORECASE)
        self.core = tiktoken.Encoding("clip", pat_str=r"\S+", mergeable_ranks=ranks, special_tokens={})

    def encode_ordinary(self, text):
        """A string -> its ids, without start and end tokens (which a prompt may spell out, as in open_clip)."""
        special = {"<start_of_text>": [self.start], "<end_of_text>": [self.end]}
        words = self.pattern.findall(clean(text))
        encode = self.core._encode_single_piece
        pieces = (special.get(word) or encode(word.encode("utf-8", "replace") + b"\xff") for word in words)
        return [i for piece in pieces for i in piece]


def clean(text):
    """CLIP's normalization of text."""
    try:
        import ftfy

        text = ftfy.fix_text(text)
    except ImportError:
        text = unicodedata.normalize("NFC", text)
    return " ".join(html.unescape(html.unescape(text)).split()).lower()


# --- encoders ---


class QuickGELU(nn.Module):
    """x sigmoid(1.702 x), the activation of OpenAI's CLIP; it differs from GELU by up to 0.02."""

    def forward(self, x):
        return x * torch.sigmoid(1.702 * x)


ACTIVATIONS = {"quick_gelu": QuickGELU, "gelu": nn.GELU}


class TextBlock(nn.Module):
    """Pre-norm transformer block: self-attention, MLP."""

    def __init__(self, width, heads, causal=False, activation=nn.GELU):
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.attn = Attention(width, width, heads, width // heads, bias=True, causal=causal)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), activation(), nn.Linear(4 * width, width))

    def forward(self, x):
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class TextTransformer(nn.Module):
    """What both encoders share: strings -> token ids (B,length) -> (B,length,width).

    Subclasses set tokenizer, first (ids before a prompt's), end and pad (ids after it).
    """

    def __init__(self, vocab, width, length, layers, heads, **block):
        super().__init__()
        assert width % heads == 0, f"text width {width}: must be a multiple of the number of heads, {heads}"
        self.width, self.length = width, length
        self.token_embedding = nn.Embedding(vocab, width)
        self.position_embedding = nn.Parameter(0.01 * torch.randn(length, width))
        self.blocks = nn.ModuleList(TextBlock(width, heads, **block) for _ in range(layers))
        self.norm_out = nn.LayerNorm(width)
        nn.init.normal_(self.token_embedding.weight, std=0.02)

    def encode(self, prompt):
        """Token ids of a prompt, without start and end, of its first 100,000 characters (tiktoken fails at 10^6)."""
        return self.tokenizer.encode_ordinary(prompt[:100_000])

    def count_tokens(self, prompt):
        """Tokens of a prompt with start and end; `tokenize` cuts what exceeds `length`."""
        return len(self.first) + len(self.encode(prompt)) + 1

    def tokenize(self, prompts):
        """List of B strings -> token ids (B,length), cut or padded."""
        assert not isinstance(prompts, str), f"prompts={prompts[:40]!r}: must be a list of strings, not a string"
        room = self.length - len(self.first) - 1
        room -= room % getattr(self.tokenizer, "group", 1)
        rows = torch.full((len(prompts), self.length), self.pad)
        for row, prompt in zip(rows, prompts):
            ids = [*self.first, *self.encode(prompt)[:room], self.end]
            row[: len(ids)] = torch.tensor(ids)
        return rows

    def forward(self, prompts):
        """List of B strings, or their token ids (B,length) -> (B,length,width)."""
        tokens = prompts if isinstance(prompts, torch.Tensor) else self.tokenize(prompts)
        x = self.token_embedding(tokens.to(self.position_embedding.device)) + self.position_embedding
        for block in self.blocks:
            x = block(x)
        return self.norm_out(x)


class TextEncoder(TextTransformer):
    """A transformer trained together with the U-Net, as in LDM's text-to-image model.

    Tokens are the prompt's, one end token, then padding, which is attended to as in Stable Diffusion.
    """

    def __init__(self, text_width=512, text_layers=6, text_heads=8, text_length=77, tokenizer="bytes"):
        """text_width: channels of the context.  text_layers, text_heads: of the transformer.
        text_length: tokens of a prompt, the end token included.  tokenizer: see make_tokenizer.
        """
        tokenizer = make_tokenizer(tokenizer)
        super().__init__(tokenizer.n_vocab + 2, text_width, text_length, text_layers, text_heads)
        self.settings = dict(text_width=text_width, text_layers=text_layers, text_heads=text_heads)
        self.settings |= dict(text_length=text_length)
        self.tokenizer = tokenizer
        self.first, self.end, self.pad = [], tokenizer.n_vocab, tokenizer.n_vocab + 1

    def bpe(self):
        """The tokenizer as bytes: the content of a .tiktoken file, one of tiktoken's names, or `layout {...}`."""
        if self.tokenizer.name != "bpe":
            return self.tokenizer.name.encode()
        tokens = [self.tokenizer.decode_single_token_bytes(i) for i in range(self.tokenizer.n_vocab)]
        return b"".join(base64.b64encode(token) + b" %d\n" % i for i, token in enumerate(tokens))


class CLIPTextEncoder(TextTransformer):
    """CLIP's text encoder without its projection, the context of Stable Diffusion; meant to stay frozen.

    Tokens are start, the prompt's, end, padding. Attention is causal, so padding does not affect the prompt.
    """

    def __init__(
        self, width, layers, heads, length=77, activation="quick_gelu", layer="last", pad="end", vocab=49408,
        merges=None,
    ):  # fmt: skip
        """width, layers, heads: of the transformer.  length: tokens of a prompt, start and end included.
        activation: quick_gelu (OpenAI's) | gelu.
        layer: last | penultimate. Penultimate leaves out the last block; norm_out follows either.
        pad: end (as transformers) | zero (as open_clip), the padding token.
        vocab: number of tokens, 49408 in the published weights.  merges: see CLIPTokenizer.
        """
        settings = {k: v for k, v in locals().items() if k not in ("self", "__class__", "merges")}
        choices = dict(activation=tuple(ACTIVATIONS), layer=("last", "penultimate"), pad=("end", "zero"))
        for name, known in choices.items():
            assert settings[name] in known, f"{name}={settings[name]!r}: must be one of {', '.join(known)}"
        tokenizer = CLIPTokenizer(merges)
        found = tokenizer.n_vocab
        assert found == vocab, f"vocab={vocab}: the merges have {found} tokens; are they those of CLIP?"
        block = dict(causal=True, activation=ACTIVATIONS[activation])
        super().__init__(vocab, width, length, layers - (layer == "penultimate"), heads, **block)
        self.settings, self.tokenizer = settings, tokenizer
        self.first, self.end = [tokenizer.start], tokenizer.end
        self.pad = self.end if pad == "end" else 0

    def bpe(self):
        """The tokenizer as bytes, the content of a merges.txt."""
        return self.tokenizer.merges

    @classmethod
    def from_pretrained(cls, path, name="", merges=None):
        """Load the text encoder in a file or folder, frozen and in eval mode; see convert.load_clip.

        name: clip_l or openclip_h to require that one.  merges: see CLIPTokenizer, if not found next to the weights.
        """
        settings, state, merges = convert.load_clip(path, name, merges or None)
        return checkpoint.build(cls, settings, state, path, merges=merges)

    @classmethod
    def of_checkpoint(cls, path, weights="", merges=""):
        """The frozen text encoder that a stage-2 checkpoint was trained with, or None; its weights are in another file.

        weights, merges: their paths now, if moved since training. UserError if they are other weights.
        """
        with checkpoint.reading(path):
            found = convert.load_tower(path, weights, merges)
            if found is None:
                return None
            settings, state, merges = found
            return checkpoint.build(cls, settings, state, path, merges=merges)
