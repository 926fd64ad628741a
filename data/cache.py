"""What stage 2 reads instead of pictures and captions: latents, and what a frozen text encoder makes of captions.

    cache = LatentCache(Stream(Dataset("data/mine"), seed), vae, "cache")
    cache.build(vae, device, autocast, workers, rank, world)   # every rank its part; what is there stays
    cache[position]                                            # a stream's item, with latents for an image

A cache is a folder named by a hash of all that its content hangs on, so a change of any makes another. Its files are
written whole or not at all, so a build that was killed goes on where it was.
"""

import io
import itertools
import math
import os
import platform
import shutil
import time
import zlib

import numpy as np
import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from checkpoint import hash_weights
from data.dataset import BadImage, in_batches, seed_of
from data.shards import write_whole

SHARD = 1024  # images in a file


def announce(what, folder, size):
    """Says what will be written, in bytes; OSError where the disk has not the room."""
    print(f"caching {what} in {folder}: {size / 2**30:.3g} GiB", flush=True)
    free = shutil.disk_usage(folder).free
    if size > free:
        room = f"{size / 2**30:.3g} GiB to write, and {free / 2**30:.3g} GiB free"
        raise OSError(f"no room for the cache in {folder} ({room}): make room, or set another cache_dir")


def check_shared(cache, rank, world):
    """ValueError on all ranks where one does not see what rank 0 writes into the cache's folder.

    A cache that is complete everywhere may lie on each node's own disk, or where nothing can be written.
    """
    ranks = [None] * world
    if world > 1:
        complete = all(cache.is_whole(shard) for shard in range(cache.count))
        dist.all_gather_object(ranks, complete)
    if world == 1 or all(ranks):
        return
    mark = [f"{cache.folder}/shared.{time.time_ns()}"]
    if rank == 0:
        os.makedirs(cache.folder, exist_ok=True)
        open(mark[0], "w").close()
    dist.broadcast_object_list(mark, 0)  # it is there
    end = time.monotonic() + 60  # a network disk may take its time to show it
    while not (there := os.path.exists(mark[0])) and time.monotonic() < end:
        time.sleep(0.1)
    dist.all_gather_object(ranks, there or platform.node())
    if rank == 0:
        os.remove(mark[0])
    blind = [node for node in ranks if node is not True]
    if blind:
        raise ValueError(
            f"{cache.folder} on {blind[0]} is another folder than on rank 0's node: set cache_dir to one that all "
            f"nodes share, copy the finished cache to each, or do without the cache"
        )


def members(images, shard):
    """The images of a shard, as a range."""
    return range(shard * SHARD, min((shard + 1) * SHARD, len(images)))


def chunks(images, shards, size):
    """The images of some shards, in ranges of at most `size` that lie in one shard."""
    spans = [members(images, shard) for shard in shards]
    return [span[at : at + size] for span in spans for at in range(0, len(span), size)]


# -- latents --


class Images(torch.utils.data.Dataset):
    """Centre crops by index; one that does not decode is all NaN, and so are its latents."""

    def __init__(self, images):
        self.images = images

    def __getitem__(self, i):
        try:
            return self.images.pixels(i)
        except BadImage as e:
            print(f"skipped a bad image: {e}", flush=True)
            return torch.full((3, self.images.image_size, self.images.image_size), math.nan)


class LatentCache(torch.utils.data.Dataset):
    """cache[p] is stream[p] with the posterior's mean and std (2,C,h,w) in the place of the image.

    Shard files of (SHARD, 1 or 2, 2, C, h, w) float16: of an image and its mirror, mean and std. The file's name is its
    done mark. The folder's name is a hash of the encoder, the precision it runs in, the data's index, size and flip: a
    change of any of them makes another cache. After load() the items' images are empty: their latents are elsewhere.
    """

    def __init__(self, stream, vae, folder, precision="float32"):
        self.stream, self.images = stream, stream.dataset
        self.flips = 2 if stream.flip else 1
        side = self.images.image_size // vae.factor
        self.shape = (self.flips, 2, vae.latent_channels, side, side)
        encoder = hash_weights(vae, but=("decoder.", "post_quant_conv."))  # another decoder has the same latents
        key = seed_of(encoder, precision, self.images.fingerprint, self.images.image_size, self.flips)
        self.folder, self.shards, self.undecoded = f"{folder}/latents-{key:016x}", {}, None
        self.count = -(-len(self.images) // SHARD)
        self.bytes = 2 * len(self.images) * math.prod(self.shape)

    def path(self, shard):
        return f"{self.folder}/{shard:06d}.npy"

    def is_whole(self, shard):
        """Whether the file of a shard is there, with the head and the size that it must have."""
        head, shape = io.BytesIO(), (len(members(self.images, shard)), *self.shape)
        np.lib.format.write_array_header_1_0(head, {"descr": "<f2", "fortran_order": False, "shape": shape})
        try:
            with open(self.path(shard), "rb") as f:
                same = f.read(len(head.getvalue())) == head.getvalue()
                return same and f.seek(0, os.SEEK_END) == len(head.getvalue()) + 2 * math.prod(shape)
        except FileNotFoundError:
            return False

    @torch.no_grad()
    def build(self, vae, device, autocast, workers, rank, world):
        """Every rank encodes its shards, those that are there already excepted, then waits for the others'."""
        os.makedirs(self.folder, exist_ok=True)
        missing = [shard for shard in range(self.count) if not self.is_whole(shard)]
        if missing and rank == 0:
            count = sum(len(members(self.images, shard)) for shard in missing)
            announce(f"the latents of {count} images", self.folder, 2 * count * math.prod(self.shape))
        mine = [shard for shard in missing if shard % world == rank]  # by number: ranks may find others missing
        spans, parts = chunks(self.images, mine, 32), []
        batches = in_batches(Images(self.images), spans.__getitem__, len(spans), torch.stack, workers, rank)
        for span, x in zip(spans, batches):
            x = x.to(device, vae.latent_mean.dtype)
            pair = []
            for y in (x, x.flip(-1))[: self.flips]:
                with autocast():
                    posterior = vae.encode(y)
                pair.append(torch.stack([posterior.mean, posterior.std], dim=1))
            parts.append(torch.stack(pair, dim=1).half().cpu().numpy())  # (32, flips, 2, C, h, w)
            shard = span.start // SHARD
            if span.stop == members(self.images, shard).stop:
                if os.path.exists(self.path(shard)):
                    print(f"{self.path(shard)} is cut short or damaged: it is made again", flush=True)
                latents, parts = np.concatenate(parts), []
                write_whole(self.path(shard), lambda f, latents=latents: np.save(f, latents))
        while not all(self.is_whole(shard) for shard in missing):
            time.sleep(1)

    def load(self, device):
        """All latents as one tensor (N * flips, 2, C, h, w) float16: image i in row i * flips, its mirror after it."""
        latents = torch.empty(len(self.images), *self.shape, dtype=torch.float16, device=device)
        self.undecoded = np.empty((len(self.images), self.flips), dtype=bool)  # the workers must know
        for shard in range(self.count):
            part = np.load(self.path(shard))
            self.undecoded[shard * SHARD :][: len(part)] = np.isnan(part).any(axis=(2, 3, 4, 5))
            latents[shard * SHARD :][: len(part)].copy_(torch.from_numpy(part))
        return latents.flatten(0, 1)

    def moments(self, index, flip):
        """(2, C, h, w) float16: mean and std, all NaN where the image did not decode."""
        shard, row = divmod(index, SHARD)
        if shard not in self.shards:
            if len(self.shards) == 256:  # each open map takes a file descriptor, of which a process has some 1000
                self.shards.pop(next(iter(self.shards)))
            self.shards[shard] = np.load(self.path(shard), mmap_mode="r")
        return torch.from_numpy(np.array(self.shards[shard][row, int(flip)]))

    def __getitem__(self, p):
        bad = []
        for attempt in range(100):
            try:
                drawn = self.stream.draw(p, attempt)
            except BadImage as e:
                bad.append(str(e))
                continue
            if self.undecoded is None:
                moments = self.moments(drawn["index"], drawn["flip"])
                undecoded = moments.isnan().any()
            else:
                moments, undecoded = torch.empty(0), self.undecoded[drawn["index"], int(drawn["flip"])]
            if not undecoded:
                return {"image": moments, "bad": bad, **drawn}
            bad.append(f"{drawn['key']}: did not decode when its latents were cached")
        raise ValueError(f"all {len(bad)} images tried in {self.images.path} are bad ({bad[0]}): look at the data")

    def __getstate__(self):
        return {**self.__dict__, "shards": {}}  # a worker maps its own


# -- text --


class Captions(torch.utils.data.Dataset):
    """All captions by index, [] where they do not read: training names such an image when it is drawn."""

    def __init__(self, images):
        self.images = images

    def __getitem__(self, i):
        try:
            return self.images.meta(i)["text"]
        except BadImage:
            return []


class TextCache(torch.utils.data.Dataset):
    """cache[p] is stream[p] and "context" (L,D) float16, what a frozen tower makes of the caption drawn.

    Shard files of SHARD images: starts (SHARD+1,), the rows of each image's captions; crc (M,) of those captions;
    context (M,L,D) float16. The file's name is its done mark, the folder's a hash of the tower, its tokenizer, the
    precision it runs in and the data's index. What has no caption is told the empty prompt, which is kept in memory.
    """

    def __init__(self, stream, tower, tower_hash, folder, precision="float32"):
        """stream: a WithCondition, whose items tell which caption was drawn."""
        self.stream, self.images, self.shape = stream, stream.images, (tower.length, tower.width)
        text = zlib.crc32(tower.bpe()), self.images.text_fingerprint  # `fingerprint` is that of the images
        key = seed_of(tower_hash, tower.settings, precision, self.images.fingerprint, *text)
        self.folder, self.shards, self.null = f"{folder}/text-{key:016x}", {}, None
        self.count = -(-len(self.images) // SHARD)

    def path(self, shard):
        return f"{self.folder}/{shard:06d}.safetensors"

    def is_whole(self, shard):
        """Whether the file of a shard is there and as long as its head says."""
        try:
            with safe_open(self.path(shard), framework="pt"):
                return True
        except (OSError, SafetensorError):
            return False

    @torch.no_grad()
    def build(self, tower, device, autocast, workers, rank, world):
        """Every rank embeds its shards, those that are there already excepted, then waits for the others'."""

        def embed(texts):
            parts = [torch.empty(0, *self.shape, dtype=torch.float16)]
            for start in range(0, len(texts), 128):
                with autocast():
                    parts.append(tower(tower.tokenize(texts[start : start + 128]).to(device)).half().cpu())
            return torch.cat(parts)  # (M, L, D)

        def captions(shards):
            spans = chunks(self.images, shards, 64)
            batches = in_batches(Captions(self.images), spans.__getitem__, len(spans), list, workers, rank)
            return (texts for batch in batches for texts in batch)

        self.null = embed([""])[0]
        os.makedirs(self.folder, exist_ok=True)
        missing = [shard for shard in range(self.count) if not self.is_whole(shard)]
        if missing and rank == 0:
            counts = [len(texts) for texts in captions(missing)]
            what = f"the text of {len(counts)} images ({sum(counts)} captions)"
            announce(what, self.folder, 2 * sum(counts) * math.prod(self.shape))
        mine = [shard for shard in missing if shard % world == rank]
        told = captions(mine)
        for shard in mine:
            if os.path.exists(self.path(shard)):
                print(f"{self.path(shard)} is cut short or damaged: it is made again", flush=True)
            texts = list(itertools.islice(told, len(members(self.images, shard))))
            starts, texts = np.cumsum([0, *map(len, texts)]), [text for several in texts for text in several]
            crc = [zlib.crc32(text.encode("utf-8", "surrogatepass")) for text in texts]
            tensors = {"starts": torch.from_numpy(starts), "crc": torch.tensor(crc, dtype=torch.int64)}
            data = save(tensors | {"context": embed(texts)})
            write_whole(self.path(shard), lambda f, data=data: f.write(data))
        while not all(self.is_whole(shard) for shard in missing):
            time.sleep(1)

    def context(self, item):
        """(L,D) float16 of the caption of a stream's item; ValueError if the data now have another."""
        if not item["text"]:
            return self.null
        shard, row = divmod(item["index"], SHARD)
        if shard not in self.shards:
            if len(self.shards) == 4096:  # maps of memory, which hold no file descriptors
                self.shards.pop(next(iter(self.shards)))
            f = safe_open(self.path(shard), framework="pt")
            self.shards[shard] = [f.get_slice(name) for name in ("starts", "crc", "context")]
        starts, crc, context = self.shards[shard]
        first, end = starts[row : row + 2].tolist()
        at = first + item["caption"]
        if at >= end or crc[at].item() != zlib.crc32(item["text"].encode("utf-8", "surrogatepass")):
            raise ValueError(f"{item['key']} has other captions than were cached: delete {self.path(shard)}")
        return context[at]

    def __getitem__(self, p):
        item = self.stream[p]
        return item | {"context": self.context(item)}

    def __getstate__(self):
        return {**self.__dict__, "shards": {}}


class Remembered:
    """A frozen tower's embeddings of a few prompts, in its place once it has been taken off the device."""

    def __init__(self, tower, prompts):
        self.number = {prompt: i for i, prompt in enumerate(dict.fromkeys(prompts))}
        self.contexts = tower(list(self.number))

    def tokenize(self, prompts):
        return torch.tensor([self.number[prompt] for prompt in prompts])

    def __call__(self, numbers):
        return self.contexts[numbers.to(self.contexts.device)]
