# KL-f16 as published (69.6 M parameters), 256 px: as kl_f8.py. Not yet run.
ch_mult = (1, 1, 2, 2, 4)
z_channels = 16
attn_resolutions = (16,)
out_dir = "out/kl_f16"
