"""Text: tokenizers, the text encoder trained beside the U-Net, and CLIP's frozen text towers."""

import base64
import gzip
import html
import importlib.util
import io
import json
import os
import zlib

import torch
import torch.nn as nn

from attention import Attention

# GPT-2's way to split text into words before BPE; prepare.py trains with the same
SPLIT_PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"


def make_tokenizer(source="bytes"):
    """A tiktoken Encoding from: "bytes"; a .tiktoken file of "base64(token) rank" lines, by path or content; a name.

    Only names ("gpt2", "cl100k_base", ...) may need a download, which tiktoken does by itself. What TextEncoder.bpe
    gives, a content or a name as bytes, makes the same tokenizer again. `layout {"names": [...], "grid": 32}`, str or
    bytes, makes a LayoutTokenizer.
    """
    if source[:7] in ("layout ", b"layout "):
        return LayoutTokenizer.from_json(source[7:])
    import tiktoken

    if isinstance(source, bytes) and b" " not in source:  # a name, from a checkpoint
        source = source.decode("utf-8", "replace")
    if source == "bytes":
        ranks = {bytes([i]): i for i in range(256)}
    elif isinstance(source, str) and not os.path.exists(source):
        try:
            return tiktoken.get_encoding(source)
        except ValueError:
            raise ValueError(f"tokenizer {source!r} is no file, not 'bytes', and no name that tiktoken knows") from None
        except Exception as e:  # tiktoken fetches names through requests; offline that fails in many ways
            raise ValueError(
                f"tokenizer {source!r} could not be fetched ({type(e).__name__}): use bytes or a file"
            ) from None
    else:
        if isinstance(source, str):
            with open(source, "rb") as f:
                source = f.read()
        try:
            lines = (line.split() for line in source.splitlines() if line.strip())
            ranks = {base64.b64decode(token): int(rank) for token, rank in lines}
        except ValueError as e:
            raise ValueError(f"not a .tiktoken file of 'base64 rank' lines: {e}") from None
        if sorted(ranks.values()) != list(range(len(ranks))) or not all(bytes([i]) in ranks for i in range(256)):
            raise ValueError(
                "a .tiktoken file needs the ranks 0, 1, 2, ... once each and all 256 single bytes among them"
            )
    return tiktoken.Encoding("bpe", pat_str=SPLIT_PATTERN, mergeable_ranks=ranks, special_tokens={})


class LayoutTokenizer:
    """Boxes as text, "red circle 0.10 0.20 0.50 0.60; ...", three tokens each: the class, and the cells of two corners.

    Names and x0 y0 x1 y1 in shares of the picture, y downwards. Ids are the names', in their order, then those of
    grid * grid cells, row by row (Rombach et al. 2022, arXiv 2112.10752, appendix on layout-to-image). The empty string
    has no tokens. Where there is no room for all, whole objects are cut.
    """

    whole = 3  # tokens of an object

    def __init__(self, names, grid=32):
        self.names, self.grid = list(names), grid
        odd = [n for n in self.names if not isinstance(n, str) or not n.strip() or n != n.strip() or ";" in n]
        odd += sorted({n for n in self.names if self.names.count(n) > 1}) if not odd else []
        if odd or not self.names:
            raise ValueError(f"layout classes {odd or self.names}: give words, each once, without ; and outer spaces")
        if not isinstance(grid, int) or not 2 <= grid <= 1024:
            raise ValueError(f"layout grid {grid!r}: give the number of cells along a side, 2 to 1024")
        self.number = {name: i for i, name in enumerate(self.names)}
        self.n_vocab = len(self.names) + grid * grid
        self.name = "layout " + json.dumps({"names": self.names, "grid": grid})  # what TextEncoder.bpe gives

    @classmethod
    def from_json(cls, text):
        try:
            settings = json.loads(text)
            names, grid = settings["names"], settings.get("grid", 32)
        except (ValueError, TypeError, KeyError, RecursionError) as e:
            example = 'layout {"names": ["cat", "dog"], "grid": 32}'
            raise ValueError(f"tokenizer 'layout ...' does not read ({e!r}): write it like {example}") from None
        return cls(names, grid)

    def parse(self, text):
        """[(name, x0, y0, x1, y1), ...] from the text of a layout."""
        objects = []
        for part in filter(None, (part.strip() for part in text.split(";"))):
            try:
                name, *box = part.rsplit(None, 4)
                x0, y0, x1, y1 = map(float, box)
            except ValueError:
                raise ValueError(f"layout {part!r}: write each object as NAME X0 Y0 X1 Y1, with ; between") from None
            if name not in self.number:
                some = ", ".join(self.names[:8]) + (", ..." if len(self.names) > 8 else "")
                raise ValueError(f"layout class {name!r} is not known: choose from {some}")
            if not (0 <= x0 <= x1 <= 1 and 0 <= y0 <= y1 <= 1):
                raise ValueError(f"layout {part!r}: give 0 <= x0 <= x1 <= 1 and 0 <= y0 <= y1 <= 1, y downwards")
            objects.append((name, x0, y0, x1, y1))
        return objects

    def encode_ordinary(self, text):
        cell = lambda v: min(int(v * self.grid), self.grid - 1)  # noqa: E731
        ids, first = [], len(self.names)
        for name, x0, y0, x1, y1 in self.parse(text):
            corners = [first + cell(y) * self.grid + cell(x) for x, y in ((x0, y0), (x1, y1))]
            ids += [self.number[name], *corners]
        return ids


def _check_list(prompts):
    if isinstance(prompts, str):  # would be as many prompts as it has letters
        raise ValueError(f"one string, {prompts[:40]!r}, where a list of them is wanted: put it in brackets")


class TextEncoder(nn.Module):
    """Strings -> (B, length, width): a transformer trained together with the U-Net, as in LDM's text-to-image model.

    Tokens are the tokenizer's, then one end token, then padding, which is attended to as in Stable Diffusion.
    """

    def __init__(self, text_width=512, text_layers=6, text_heads=8, text_length=77, tokenizer="bytes"):
        """text_length: tokens of a prompt, the end token included.  tokenizer: see make_tokenizer."""
        super().__init__()
        self.settings = dict(
            text_width=text_width, text_layers=text_layers, text_heads=text_heads, text_length=text_length
        )
        if text_width % text_heads:
            raise ValueError(f"text_width={text_width} does not divide into text_heads={text_heads}")
        self.tokenizer = make_tokenizer(tokenizer)
        self.width, self.length = text_width, text_length
        self.end, self.pad = self.tokenizer.n_vocab, self.tokenizer.n_vocab + 1
        self.token_embedding = nn.Embedding(self.tokenizer.n_vocab + 2, text_width)
        self.position_embedding = nn.Parameter(0.01 * torch.randn(text_length, text_width))
        self.blocks = nn.ModuleList(TextBlock(text_width, text_heads) for _ in range(text_layers))
        self.norm_out = nn.LayerNorm(text_width)
        nn.init.normal_(self.token_embedding.weight, std=0.02)

    def bpe(self):
        """The tokenizer as bytes: the content of a .tiktoken file, the name of tiktoken's own, or `layout {...}`."""
        if self.tokenizer.name != "bpe":
            return self.tokenizer.name.encode()
        tokens = [self.tokenizer.decode_single_token_bytes(i) for i in range(self.tokenizer.n_vocab)]
        return b"".join(base64.b64encode(token) + b" %d\n" % i for i, token in enumerate(tokens))

    def count_tokens(self, prompt):
        """Tokens of a prompt, the end token included; more than `length` will be cut."""
        return len(self.tokenizer.encode_ordinary(prompt)) + 1

    def tokenize(self, prompts):
        """List of B strings -> token ids (B, length), cut or padded."""
        _check_list(prompts)
        rows = torch.full((len(prompts), self.length), self.pad)
        whole = getattr(self.tokenizer, "whole", 1)  # tokens that mean something together only
        room = (self.length - 1) // whole * whole
        for row, prompt in zip(rows, prompts):
            ids = self.tokenizer.encode_ordinary(prompt)[:room] + [self.end]
            row[: len(ids)] = torch.tensor(ids)
        return rows

    def forward(self, prompts):
        """List of B strings, or their token ids (B, length) -> (B, length, width)."""
        tokens = prompts if isinstance(prompts, torch.Tensor) else self.tokenize(prompts)
        x = self.token_embedding(tokens.to(self.position_embedding.device)) + self.position_embedding
        for block in self.blocks:
            x = block(x)
        return self.norm_out(x)


class TextBlock(nn.Module):
    def __init__(self, width, heads, causal=False, activation=nn.GELU):
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.attn = Attention(width, width, heads, width // heads, bias=True, causal=causal)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), activation(), nn.Linear(4 * width, width))

    def forward(self, x):
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class QuickGELU(nn.Module):
    """x sigmoid(1.702 x), with which OpenAI trained CLIP; up to 0.02 off GELU, so the two must not be mixed up."""

    def forward(self, x):
        return x * torch.sigmoid(1.702 * x)


# CLIP's way to split text, spaces left out and each digit a word
CLIP_PATTERN = r"<start_of_text>|<end_of_text>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"


class CLIPTokenizer:
    """CLIP's byte-pair encoding, run by tiktoken: open_clip's ids, string for string.

    tiktoken merges bytes by rank and knows no end of a word, so each word gets the byte 0xFF behind it, which UTF-8
    never uses; its merges with the other bytes (ids 256-511) come before all others.  ftfy mends the text first where
    it is installed, as in CLIP; without it curly quotes and broken encodings give other ids.
    """

    def __init__(self, merges=None):
        """merges: path of bpe_simple_vocab_16e6.txt.gz, of a merges.txt or of a folder that holds it, or the content as
        bytes.  None: the file in the package open_clip, where that is installed."""
        import regex
        import tiktoken

        content, vocab = _read_merges(merges)
        plain = [*range(33, 127), *range(161, 173), *range(174, 256)]  # these stand for themselves, and come first
        other = [b for b in range(256) if b not in plain]
        byte = {chr(b): b for b in plain} | {chr(256 + i): b for i, b in enumerate(other)}
        token = {name: bytes([b]) for name, b in byte.items()}
        token |= {name + "</w>": bytes([b, 255]) for name, b in byte.items()}
        lines = content.split("\n")
        lines = lines[1:] if "#version" in lines[0] else lines
        lines = [line for line in lines[: 49152 - 256 - 2] if line.strip()]  # the file goes on, CLIP does not
        for line in lines:
            try:
                first, second = line.split()
                token[first + second] = token[first] + token[second]
            except (ValueError, KeyError):
                raise ValueError(f"{line[:40]!r} does not merge two tokens before it: is this CLIP's file?") from None
        ranks = {b: i for i, b in enumerate(token.values())}
        if len(ranks) != 512 + len(lines):
            raise ValueError("a merge stands there twice: is this CLIP's file?")
        if vocab is not None and any(vocab.get(name) != i for i, name in enumerate(token)):
            raise ValueError("vocab.json numbers its tokens in another order than CLIP does: no tokenizer for it here")
        self.merges = "\n".join(["#version: 0.2", *lines, ""]).encode()  # a merges.txt, to make the same tokenizer of
        self.start, self.end, self.n_vocab = len(ranks), len(ranks) + 1, len(ranks) + 2
        self.pattern = regex.compile(CLIP_PATTERN, regex.IGNORECASE)
        self.core = tiktoken.Encoding("clip", pat_str=r"\S+", mergeable_ranks=ranks, special_tokens={})

    def encode_ordinary(self, text):
        """A string -> its ids, without start and end (which a prompt may spell out, as in open_clip)."""
        special = {"<start_of_text>": [self.start], "<end_of_text>": [self.end]}
        words = self.pattern.findall(_clip_clean(text))
        encode = self.core._encode_single_piece
        pieces = (special.get(word) or encode(word.encode("utf-8", "replace") + b"\xff") for word in words)
        return [i for piece in pieces for i in piece]


def _clip_clean(text):
    try:
        import ftfy

        text = ftfy.fix_text(text)
    except ImportError:
        pass
    return " ".join(html.unescape(html.unescape(text)).split()).lower()


def _read_merges(source):
    """(text of CLIP's merges, the vocab.json beside them or None)."""
    remedy = "give merges=PATH of bpe_simple_vocab_16e6.txt.gz or of a folder with merges.txt"
    vocab = None
    if source is None:
        found = importlib.util.find_spec("open_clip")  # does not import it
        source = os.path.join(os.path.dirname(found.origin or "") if found else "", "bpe_simple_vocab_16e6.txt.gz")
        if not os.path.exists(source):
            raise ValueError(f"CLIP's tokenizer needs its file of merges: pip install open_clip_torch, or {remedy}")
    if not isinstance(source, bytes):
        if os.path.isdir(source):
            if os.path.exists(os.path.join(source, "vocab.json")):
                with open(os.path.join(source, "vocab.json"), encoding="utf-8") as f:
                    vocab = json.load(f)
            source = os.path.join(source, "merges.txt")
        if not os.path.exists(source):
            raise ValueError(f"CLIP's merges are not at {source}: {remedy}")
        with open(source, "rb") as f:
            source = f.read()
    try:
        if source[:2] == b"\x1f\x8b":
            source = gzip.GzipFile(fileobj=io.BytesIO(source)).read(2**26)
            if len(source) == 2**26:  # the real one has 3 MB
                raise ValueError(f"CLIP's merges unpack to more than 64 MB: {remedy}")
        return source.decode(), vocab
    except (OSError, EOFError, UnicodeDecodeError, zlib.error) as e:
        raise ValueError(f"CLIP's merges cannot be read ({e}): {remedy}") from None


class CLIPTextEncoder(nn.Module):
    """Strings -> (B, length, width): CLIP's text tower without its projection, which Stable Diffusion listens to.

    Its weights are random until some are loaded; it is made to stay frozen.  Tokens are start, the prompt's, end,
    padding. Attention is causal and nothing else: what stands in front of padding does not see it.
    """

    towers = {
        # Stable Diffusion 1: OpenAI's CLIP ViT-L/14
        "clip_l": dict(width=768, layers=12, heads=12, activation="quick_gelu", layer="last", pad="end"),
        # Stable Diffusion 2: OpenCLIP's ViT-H/14
        "openclip_h": dict(width=1024, layers=24, heads=16, activation="gelu", layer="penultimate", pad="zero"),
    }

    @classmethod
    def named(cls, name, merges=None):
        """The tower "clip_l" or "openclip_h"."""
        if name not in cls.towers:
            raise ValueError(f"text tower {name!r} is not one of {', '.join(cls.towers)}")
        return cls(**cls.towers[name], merges=merges)

    @classmethod
    def from_pretrained(cls, path, name="", merges=None):
        """The tower in a file or folder, frozen, of whatever is read by convert.py; see CLIPTokenizer for merges.

        name: "clip_l" or "openclip_h" if it must be that one; "" takes what is there.
        """
        import convert

        return convert.load_clip(cls, path, name, merges or None)

    def __init__(
        self,
        width,
        layers,
        heads,
        length=77,  # tokens of a prompt, start and end included
        activation="quick_gelu",  # quick_gelu (OpenAI) | gelu
        layer="last",  # last | penultimate: the last block is left out and not held; norm_out follows either
        pad="end",  # end (as transformers) | zero (as open_clip)
        vocab=49408,  # of the published weights; what the tokenizer must have
        merges=None,  # see CLIPTokenizer
    ):
        super().__init__()
        self.settings = dict(width=width, layers=layers, heads=heads, length=length, activation=activation)
        self.settings |= dict(layer=layer, pad=pad, vocab=vocab)
        activations = {"quick_gelu": QuickGELU, "gelu": nn.GELU}
        choices = dict(activation=activations, layer=("last", "penultimate"), pad=("end", "zero"))
        for name, known in choices.items():
            if self.settings[name] not in known:
                raise ValueError(f"{name}={self.settings[name]!r} is not one of {', '.join(known)}")
        if width % heads:
            raise ValueError(f"width={width} does not divide into heads={heads}")
        self.tokenizer = CLIPTokenizer(merges)
        if self.tokenizer.n_vocab != vocab:
            raise ValueError(
                f"the merges make {self.tokenizer.n_vocab} tokens, the tower has {vocab}: are they CLIP's?"
            )
        self.width, self.length = width, length
        self.start, self.end = self.tokenizer.start, self.tokenizer.end
        self.pad = self.end if pad == "end" else 0
        self.token_embedding = nn.Embedding(vocab, width)
        self.position_embedding = nn.Parameter(0.01 * torch.randn(length, width))
        count = layers - (layer == "penultimate")
        self.blocks = nn.ModuleList(TextBlock(width, heads, True, activations[activation]) for _ in range(count))
        self.norm_out = nn.LayerNorm(width)
        nn.init.normal_(self.token_embedding.weight, std=0.02)

    def bpe(self):
        """The tokenizer as the content of a merges.txt."""
        return self.tokenizer.merges

    def count_tokens(self, prompt):
        """Tokens of a prompt, start and end included; more than `length` will be cut."""
        return len(self.tokenizer.encode_ordinary(prompt)) + 2

    def tokenize(self, prompts):
        """List of B strings -> token ids (B, length), cut or padded."""
        _check_list(prompts)
        rows = torch.full((len(prompts), self.length), self.pad)
        for row, prompt in zip(rows, prompts):
            ids = [self.start, *self.tokenizer.encode_ordinary(prompt)[: self.length - 2], self.end]
            row[: len(ids)] = torch.tensor(ids)
        return rows

    def forward(self, prompts):
        """List of B strings, or their token ids (B, length) -> (B, length, width)."""
        tokens = prompts if isinstance(prompts, torch.Tensor) else self.tokenize(prompts)
        x = self.token_embedding(tokens.to(self.position_embedding.device)) + self.position_embedding
        for block in self.blocks:
            x = block(x)
        return self.norm_out(x)
