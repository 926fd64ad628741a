# LDM-4 on ImageNet, 256 px, by class, as published (cin256-v2): 400.9 M parameters, FID 3.60 at guidance 1.5.
# Not yet run. 8 GPUs x 75 x 2 are the published 1,200 images a step. A class is a context of one token; for your own
# model class_embed = "add" is better: with a single key the softmax of attention is constant.
dataset = "data/imagenet"
first_stage = "out/vq_f4"
cond = "class"
class_embed = "token"
text_width = 512
channels = 192
channel_mult = (1, 2, 3, 5)
attention_ds = (8, 4, 2)
num_heads = 1
head_dim = 0
linear_proj = False
objective = "eps"
schedule = "scaled_linear"
beta_start = 0.0015
beta_end = 0.0195
timesteps = "uniform"
batch_size = 75
grad_accum = 2
max_steps = 178_000
lr = 1e-4
warmup_steps = 0
grad_clip = 0.0
guidance = 1.5
out_dir = "out/cin256_ldm"
