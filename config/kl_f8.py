# KL-f8 as published (83.7 M parameters), 256 px: train_vae.py's own defaults, the headline run. Not yet run.
# torchrun --nproc_per_node=8 train_vae.py config/kl_f8.py: 192 images a step (8 x 12 x 2) at lr 1e-4, where the
# published one took 24 at 1.08e-4.
ch_mult = (1, 2, 4, 4)
z_channels = 4
out_dir = "out/kl_f8"
