# VQ-f8 as published (67.7 M parameters with its 16,384 codes), 256 px. Not yet run.
ch_mult = (1, 2, 2, 4)
z_channels = 4
attn_resolutions = (32,)
bottleneck = "vq"
codebook_size = 16384
disc_start = 1
disc_weight = 0.6
disc_layers = 2
batch_size = 10
grad_accum = 1
max_steps = 970_000
out_dir = "out/vq_f8"
