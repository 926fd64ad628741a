# LDM from label maps, 256 px, as published: 215.2 M parameters, maps through a rescaler (VQ-f4). Not yet run.
# The published attention_ds (32, 16, 8) names levels that do not exist: only the middle has attention, here too.
dataset = "data/landscapes"
first_stage = "out/vq_f4"
cond = "none"
task = "semantic"
channels = 128
channel_mult = (1, 4, 8)
attention_ds = ()
num_heads = 8
head_dim = 0
transformer_depth = 0
objective = "eps"
schedule = "scaled_linear"
beta_start = 0.0015
beta_end = 0.0205
timesteps = "uniform"
loss_type = "l1"
batch_size = 48
max_steps = 500_000  # ours: the published number is not known
lr = 4.8e-5
warmup_steps = 0
grad_clip = 0.0
out_dir = "out/semantic_ldm"
