# CIFAR-10 at 32 px by class, on the latents of config/cifar10_vae.py: scenes after 700 steps, 3 minutes; soft ships,
# horses and trucks after all 4000, 23 minutes of one CPU core.
dataset = "data/cifar10"  # the parquet files that Hugging Face has, wherever they are: --dataset=DIR
image_size = 32
flip = True
workers = 0
first_stage = "out/cifar10_vae"
cond = "class"
channels = 64
channel_mult = (1, 2)
num_res_blocks = (1,)
attention_ds = (2,)
head_dim = 32
transformer_depth = 0
resample = "pool"
scale_shift = True
norm_groups = 8
timesteps = "logit_normal"
batch_size = 64
max_steps = 4000
lr = 1e-3
lr_schedule = "cosine"
warmup_steps = 50
beta2 = 0.99
ema_decay = 0.999
eval_every = 1000
save_every = 1000
log_every = 100
val_images = 1000
n_samples = 40
guidance = 2.0
out_dir = "out/cifar10_ldm"
