#!/usr/bin/env bash
# From nothing to pictures from a prompt: prepare, train both stages, draw 256 prompts, score them.
set -ex
cd "$(dirname "$0")"
export GOMP_SPINCOUNT=${GOMP_SPINCOUNT:-30000}  # a waiting thread gives its core away: others may want it
python data/shapes/prepare.py
python train_vae.py config/shapes_vae.py
python train_ldm.py config/shapes_ldm.py
python sample.py --ckpt=out/shapes_ldm --prompts=data/shapes/prompts.txt --steps=20 --cfg=1.5 --batch_size=64
python data/shapes/prepare.py --score=out/shapes_ldm/samples
