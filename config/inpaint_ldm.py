# LDM inpainting, 256 px, as published: 387.2 M parameters, conditioned on mask and masked latents (VQ-f4). Not yet run.
# Masks are strokes, boxes and outpainting (data/tasks.py), not the published generator's.
dataset = "data/openimages"
first_stage = "out/vq_f4"
cond = "none"
task = "inpaint"
channels = 256
channel_mult = (1, 2, 3, 4)
attention_ds = (8, 4, 2)
num_heads = 8
head_dim = 0
transformer_depth = 0
resblock_updown = True
objective = "eps"
schedule = "scaled_linear"
beta_start = 0.0015
beta_end = 0.0205
timesteps = "uniform"
loss_type = "l1"
batch_size = 64
max_steps = 500_000  # ours: the published number is not known
lr = 6.4e-5
warmup_steps = 0
grad_clip = 0.0
out_dir = "out/inpaint_ldm"
