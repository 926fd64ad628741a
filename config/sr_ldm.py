# LDM super-resolution x4 to 256 px, as published: 113.6 M parameters, conditioned on the small image (VQ-f4).
# Not yet run. The degradation is a lighter BSRGAN than the published one (data/tasks.py).
dataset = "data/openimages"
first_stage = "out/vq_f4"
cond = "none"
task = "sr"
sr_scale = 4
sr_degradation = "bsr"
channels = 160
channel_mult = (1, 2, 2, 4)
attention_ds = (16, 8)
head_dim = 32
transformer_depth = 0
objective = "eps"
schedule = "scaled_linear"
beta_start = 0.0015
beta_end = 0.0155
timesteps = "uniform"
batch_size = 64
max_steps = 500_000  # ours: the published number is not known
lr = 6.4e-5
warmup_steps = 0
grad_clip = 0.0
out_dir = "out/sr_ldm"
