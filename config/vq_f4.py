# VQ-f4 as published (55.3 M parameters with its 8,192 codes), 256 px. Not yet run.
# --mid_attention=False is vq-f4-noattn (53.2 M).
ch_mult = (1, 2, 4)
z_channels = 3
bottleneck = "vq"
codebook_size = 8192
disc_start = 1  # the published one is there from the start
disc_weight = 0.75
batch_size = 8
grad_accum = 1
max_steps = 530_000
out_dir = "out/vq_f4"
