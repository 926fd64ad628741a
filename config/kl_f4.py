# KL-f4 as published (55.3 M parameters), 256 px: as kl_f8.py. Not yet run.
ch_mult = (1, 2, 4)
z_channels = 3
out_dir = "out/kl_f4"
