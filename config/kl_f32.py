# KL-f32 as published (103.9 M parameters), 256 px: as kl_f8.py. Not yet run.
ch_mult = (1, 1, 2, 2, 4, 4)
z_channels = 64
attn_resolutions = (16, 8)
out_dir = "out/kl_f32"
