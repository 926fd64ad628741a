"""Latents on disk, which stage 2 reads instead of images.

    cache = LatentCache(Stream(Dataset("data/mine"), seed), vae, "cache")
    cache.build(vae, device, autocast, workers, rank, world)   # each rank encodes its part; existing files are kept
    cache[position]                                            # an item of the stream, with latents for its image

A cache is a folder named by a hash of all that its content depends on: a change makes another cache. Files are written
to a temporary name first, so after a kill the next build makes only what is missing.
"""

import math
import os
import shutil
import time

import numpy as np
import torch
from tqdm import tqdm

from checkpoint import hash_weights, reject, write_whole
from data.dataset import BadImage, first_good, in_batches, seed_of

SHARD = 1024  # images in a file
PATIENCE = 3600  # seconds without a new file after which the other ranks' files are given up


class Images(torch.utils.data.Dataset):
    """Center crops by index; one that does not decode is all NaN, and so are its latents."""

    def __init__(self, dataset):
        self.dataset = dataset

    def __getitem__(self, i):
        try:
            return self.dataset.pixels(i)
        except BadImage as e:
            print(f"skipped a bad image: {e}", flush=True)
            return torch.full((len(self.dataset.image_mode), *self.dataset.sides), math.nan)


class LatentCache(torch.utils.data.Dataset):
    """cache[p] is stream[p] with mean and std of the posterior (2,C,h,w) instead of the image.

    Files of (SHARD, 1 or 2, 2, C, h, w) float16: of an image and its mirror image, mean and std. The folder's name is a
    hash of the encoder, the precision it runs in, the data (Dataset.fingerprint), image size and flip. After load() the
    items' images are empty: their latents are in the tensor that it returns.
    """

    def __init__(self, stream, vae, cache_dir, precision="float32"):
        self.stream, self.dataset, self.span = stream, stream.dataset, stream.span
        self.flips = 2 if stream.flip else 1
        self.shape = (self.flips, 2, vae.latent_channels, *(side // vae.factor for side in self.dataset.sides))
        encoder = hash_weights(vae, but=("decoder.", "post_quant_conv."))  # the decoder does not matter
        key = seed_of(encoder, precision, self.dataset.fingerprint, self.dataset.sides, self.flips)
        self.folder, self.files, self.undecoded = f"{cache_dir}/latents-{key:016x}", {}, None
        self.count = -(-len(self.dataset) // SHARD)
        self.bytes = 2 * len(self.dataset) * math.prod(self.shape)

    def path(self, shard):
        return f"{self.folder}/{shard:06d}.npy"

    def members(self, shard):
        """The images of a file, as a range."""
        return range(shard * SHARD, min((shard + 1) * SHARD, len(self.dataset)))

    def is_complete(self, shard):
        """Whether the file of a shard is there, with the type and the shape that it must have."""
        try:
            found = np.load(self.path(shard), mmap_mode="r")
        except Exception:  # not there, cut short, or damaged: a header is read as Python, which fails in many ways
            return False
        return (found.dtype, found.shape) == (np.float16, (len(self.members(shard)), *self.shape))

    @torch.no_grad()
    def build(self, vae, device, autocast, workers, rank, world):
        """Encodes this rank's missing files, then waits for those of the other ranks."""
        os.makedirs(self.folder, exist_ok=True)
        missing = [shard for shard in range(self.count) if not self.is_complete(shard)]
        if missing and rank == 0:
            count = sum(len(self.members(shard)) for shard in missing)
            size, free = 2 * count * math.prod(self.shape), shutil.disk_usage(self.folder).free
            print(f"caching the latents of {count} images in {self.folder}: {size / 2**30:.3g} GiB", flush=True)
            if size > free:
                what = f"has no room for the latents ({size / 2**30:.3g} GiB to write, {free / 2**30:.3g} GiB free)"
                reject(self.folder, what, "make room, or set another cache_dir")
        # by number: ranks may see different files missing
        mine = [self.members(shard) for shard in missing if shard % world == rank]
        spans, parts = [span[at : at + 32] for span in mine for at in range(0, len(span), 32)], []
        batches = in_batches(Images(self.dataset), spans, torch.stack, workers)
        hidden = True if rank or not spans else None  # None: shown on a terminal
        with tqdm(desc="caching latents", total=sum(map(len, spans)), disable=hidden) as bar:
            for span, x in zip(spans, batches):
                x = x.to(device, vae.latent_mean.dtype)
                pair = []
                for y in (x, x.flip(-1))[: self.flips]:
                    with autocast:
                        posterior = vae.encode(y)
                    pair.append(torch.stack([posterior.mean, posterior.std], dim=1))
                parts.append(torch.stack(pair, dim=1).half().cpu().numpy())  # (32, flips, 2, C, h, w)
                bar.update(len(span))
                if span.stop % SHARD == 0 or span.stop == len(self.dataset):
                    latents, parts = np.concatenate(parts), []
                    write_whole(self.path(span.start // SHARD), lambda f, latents=latents: np.save(f, latents))
        self._wait(missing)

    def _wait(self, missing):
        """Returns when all files are there."""
        left, since = None, time.monotonic()
        while (now := [shard for shard in missing if not self.is_complete(shard)]) and now:
            since = time.monotonic() if now != left else since
            if time.monotonic() - since > PATIENCE:
                what = f"is not made by the other ranks ({len(now)} files are missing)"
                reject(self.path(now[0]), what, "set cache_dir to a folder that all nodes share")
            left = now
            time.sleep(1)

    def load(self, device):
        """All latents as one tensor (N * flips, 2, C, h, w) float16: image i in row i * flips, its mirror after it."""
        latents = torch.empty(len(self.dataset), *self.shape, dtype=torch.float16, device=device)
        self.undecoded = np.empty((len(self.dataset), self.flips), dtype=bool)  # workers skip these
        for shard in range(self.count):
            part = np.load(self.path(shard))
            self.undecoded[shard * SHARD :][: len(part)] = np.isnan(part).any(axis=(2, 3, 4, 5))
            latents[shard * SHARD :][: len(part)].copy_(torch.from_numpy(part))
        return latents.flatten(0, 1)

    def moments(self, index, flip):
        """(2, C, h, w) float16: mean and std, all NaN where the image did not decode."""
        shard, row = divmod(index, SHARD)
        if shard not in self.files:
            if len(self.files) == 256:  # each open map takes a file descriptor, of which a process has some 1000
                self.files.pop(next(iter(self.files)))
            self.files[shard] = np.load(self.path(shard), mmap_mode="r")
        return torch.from_numpy(np.array(self.files[shard][row, int(flip)]))

    def __getitem__(self, p):
        def read(attempt):
            picked = self.stream.pick(p, attempt)
            index, flip = picked["index"], int(picked["flip"])
            moments = self.moments(index, flip) if self.undecoded is None else torch.empty(0)
            if moments.isnan().any() if self.undecoded is None else self.undecoded[index, flip]:
                raise BadImage(f"{picked['key']}: did not decode when its latents were cached")
            return picked | dict(image=moments)

        return first_good(read, self.dataset)

    def __getstate__(self):
        return {**self.__dict__, "files": {}}  # a worker opens its own
