# VQ-f16 as published (16,384 codes), 256 px. Not yet run.
ch_mult = (1, 1, 2, 2, 4)
z_channels = 8
attn_resolutions = (16,)
bottleneck = "vq"
codebook_size = 16384
disc_start = 250_001
disc_weight = 0.75
disc_layers = 2
batch_size = 14
grad_accum = 1
max_steps = 1_100_000
out_dir = "out/vq_f16"
