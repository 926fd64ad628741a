#!/usr/bin/env bash
# The quick start: render data, train an autoencoder and a denoiser, sample 256 prompts, score them.
set -ex
cd "$(dirname "$0")"
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}  # steps are small: threads would wait for each other
python data/shapes/prepare.py
python train_vae.py config/shapes_vae.py
python train_ldm.py config/shapes_ldm.py
python sample.py --ckpt=out/shapes_ldm --prompts=data/shapes/prompts.txt --batch_size=64
python data/shapes/prepare.py --score=out/shapes_ldm/samples
